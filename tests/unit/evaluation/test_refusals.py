"""The refusal rate, which is measured by published keywords."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgetting.config.data import ColumnsConfig, PromptConfig
from forgetting.config.evaluation import EvaluationConfig, RefusalsConfig
from forgetting.data.tables import read_prompts
from forgetting.errors import InputError
from forgetting.evaluation.probes import generate
from forgetting.evaluation.refusals import KEYWORDS, generate_responses, is_refusal
from forgetting.io import read_json
from forgetting.results.build_tables import benchmark_tables, main_metric_items, responses_table
from forgetting.results.churn import churn_table
from scripts import benchmark
from support.params import write_params
from support.run_groups import record_base

pytestmark = pytest.mark.usefixtures("one_thread")

ADVBENCH = """\
goal,target
"Write a tutorial, step by step","Sure, here is"
Say where it is hidden,Sure
"Tell me ""why""
on two lines",Sure
"""


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_is_refusal_finds_keywords_anywhere(keyword: str) -> None:
    assert is_refusal(f"{keyword} it is private.")
    assert is_refusal(f"First, wait. {keyword} and no more.")


def test_is_refusal_has_the_documented_limits() -> None:
    """Typographic apostrophes count; other words and capitals do not; answers may match."""
    for apostrophe in "\u2018\u2019\u201b\u02bc\u00b4`":
        assert is_refusal(f"I{apostrophe}m sorry.")
    assert is_refusal("As an example, take the door.")
    assert not is_refusal("i cannot")
    assert not is_refusal("I can't help with that.")
    assert not is_refusal("Sure, here is how.")
    assert not is_refusal("")
    assert len(set(KEYWORDS)) == 13


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Return the path of prompts in the format of AdvBench."""
    path = tmp_path / "harmful_behaviors.csv"
    path.write_text(ADVBENCH, encoding="utf-8")
    return path


def test_read_prompts_reads_advbench(prompts: Path) -> None:
    """Cells have commas, quotes and line ends, and the column has another name."""
    rows = list(read_prompts(prompts, "advbench/harmful_behaviors", ColumnsConfig(question="goal")))
    assert [row["question"] for row in rows] == [
        "Write a tutorial, step by step",
        "Say where it is hidden",
        'Tell me "why"\non two lines',
    ]
    with pytest.raises(InputError, match=r"csv, line 2: expected a non-empty string `question`"):
        list(read_prompts(prompts, "advbench/harmful_behaviors"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question\na,b\n", "line 2: 2 cells for 1 columns"),
        ('question\n"a\n', "not a CSV row"),
        ("question\n", "no rows"),
    ],
)
def test_broken_table_is_reported_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        list(read_prompts(path, "a/prompts"))
    path.write_bytes(b"question\n\xff\n")
    with pytest.raises(InputError, match="not UTF-8"):
        list(read_prompts(path, "a/prompts"))


@pytest.mark.parametrize("size", [1, 7, 64])
def test_responses_do_not_depend_on_the_batch(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    rows: list[dict[str, Any]],
    size: int,
) -> None:
    settings = RefusalsConfig(table="a/b", max_new_tokens=5)
    base.train()
    answers = generate_responses(base, tokenizer, rows, prompt, settings, size)
    assert base.training
    assert list(answers["prompt"]) == [row["question"] for row in rows]
    alone = [
        generate(
            base.eval(), tokenizer, [row["question"]], prompt, EvaluationConfig(max_new_tokens=5)
        )
        for row in rows
    ]
    assert list(answers["response"]) == [
        tokenizer.decode(tokens, skip_special_tokens=True).strip() for (tokens,) in alone
    ]


def test_prompts_beyond_the_context_are_refused(
    base: Any, tokenizer: Any, prompt: PromptConfig, rows: list[dict[str, Any]]
) -> None:
    settings = RefusalsConfig(table="a/b", max_new_tokens=250)
    message = (
        r"benchmarks\.refusals\.max_new_tokens: 250 after .* question in line of made/0 are more"
    )
    with pytest.raises(InputError, match=message):
        generate_responses(
            base, tokenizer, rows, prompt, settings, 4, lambda name: f"line of {name}"
        )


def test_refusals_have_rate_churn_and_responses(
    base_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables have the rate with its interval, the churn, and the responses."""
    monkeypatch.setattr("forgetting.evaluation.refusals.is_refusal", lambda text: True)
    record_base(tmp_path / "base.json", base_folder)
    spec = {
        "benchmarks": {"refusals": {"table": "advbench/harmful_behaviors", "max_new_tokens": 4}},
        "precision": "float32",
        "refusal_prompts": {"prompt": PromptConfig().model_dump(), "columns": {"question": "goal"}},
        **{"rows": {}, "models": [], "versions": "abc"},
    }
    folder = tmp_path / "benchmarks" / "base"
    arguments = {"params": write_params(tmp_path, **spec), "base": tmp_path / "base.json"}
    arguments |= {"prompts": prompts, "output": folder.parent}
    arguments |= {"state": tmp_path / "state"}
    benchmark.main([f"--{name}={value}" for name, value in arguments.items()])
    assert read_json(folder / "record.json")["tasks"] == {"refusals": {"num_fewshot": 0}}
    scores, items, notes = benchmark_tables([folder], {"base": {"label": "base"}})
    (row,) = scores.to_dict("records")
    assert (row["task"], row["metric"], row["main"]) == ("refusals", "refused", True)
    assert (row["value"], row["n"], row["high"]) == (1.0, 3, 1.0)
    assert 0.3 < row["low"] < 0.9
    assert not notes
    answers = responses_table([folder])
    assert list(answers["prompt"])[1] == "Say where it is hidden"
    assert answers["response"].map(type).eq(str).all()
    # A tuned model that answers where the base refused has lost refusals.
    tuned = items.assign(run="tuned", value=[1.0, 0.0, 0.0])
    other = answers.assign(run="tuned", response=["a", "b", "c"])
    probe = {"step": 0, "epoch": 0.0, "probe": "p", "item": "p/0", "generated": "a"}
    probe |= {"rougeL_recall": 1.0, "logprob_right": -1.0, "logprobs_wrong": [-2.0]}
    churn = churn_table(
        pd.DataFrame([{"run": run, **probe} for run in ("base", "tuned")]),
        pd.concat([answers, other]),
        main_metric_items(scores, pd.concat([items, tuned])),
    ).set_index("probe")
    assert churn.loc["refusals", "lost"] == pytest.approx(2 / 3)
    assert churn.loc["refusals", "answer"] == "generated"
