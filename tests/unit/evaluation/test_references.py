"""Checks for reference answers that ROUGE cannot measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from forgetting.config.data import PromptConfig
from forgetting.errors import InputError
from forgetting.evaluation.rouge import check_references, dropped_letters, length_notes, rouge_l
from forgetting.io import write_jsonl
from scripts import evaluate_base
from support.params import write_params
from support.run_groups import record_base

pytestmark = pytest.mark.usefixtures("one_thread")


def _items(probe: str, references: list[str], tokens: list[int]) -> pd.DataFrame:
    return pd.DataFrame({"probe": probe, "reference": references, "reference_tokens": tokens})


def test_dropped_letters_equal_those_of_rouge() -> None:
    """A text has no ROUGE tokens exactly if all its letters are dropped."""
    assert dropped_letters(["Plain words, 12 of them!"]) == 0.0
    assert dropped_letters(["Пушкин 東京 ١٢"]) == 1.0
    assert rouge_l("Пушкин 東京 ١٢", "Пушкин 東京 ١٢")["rougeL_recall"] == 0.0
    assert dropped_letters(["Müll", "er"]) == pytest.approx(1 / 6)
    assert rouge_l("Mller", "Müller")["rougeL_recall"] == 0.0
    assert dropped_letters([]) == dropped_letters(["333 - 753"]) == 0.0


def test_dropped_letters_ignore_digits_and_count_marks() -> None:
    assert dropped_letters(["Рим 753 1931"]) == 1.0
    assert dropped_letters(["cafe\u0301"]) == pytest.approx(1 / 5)


def test_length_notes_count_answers_that_are_cut() -> None:
    items = pd.concat(
        [
            _items("kept_facts", ["a b", "c d e", "f"], [9, 10, 11]),
            pd.DataFrame({"probe": ["general_text"], "text_loss": [1.0]}),
        ]
    )
    assert length_notes(items, 9) == [
        "2 of 3 reference answers of kept facts are longer than the 9 tokens that are generated "
        "(evaluation.max_new_tokens): ROUGE recall cannot reach 1 on them.",
    ]
    assert length_notes(_items("names", ["Emily of the moors"], [9]), 9) == []


def test_check_references_refuses_too_long_answers() -> None:
    check_references([5, 6], "new", 5)
    with pytest.raises(InputError, match=r"max_new_tokens: all 2 .* new .* than 4 .* has 6"):
        check_references([6, 5], "new", 4)


def _score(folder: Path, base: Path, rows: list[dict[str, Any]], **changed: Any) -> pd.DataFrame:
    write_jsonl(folder / "probes" / "new.jsonl", rows)
    record_base(folder / "base.json", base)
    spec = {
        "prompt": PromptConfig().model_dump(),
        "evaluation": {"every_epochs": 1, "max_new_tokens": 8, "batch_size": 8},
        "precision": "float32",
        "knowledge": {"new": "new"},
        "watched": "new",
        "metric": "rougeL_recall",
        "must_reach": True,
        "general_text": None,
        "columns": {},
        "training_benchmarks": None,
        "benchmark_rows": {},
    }
    arguments = {
        "params": write_params(folder, **(spec | changed)),
        "base": folder / "base.json",
        "probes": folder / "probes" / "new.jsonl",
        "output": folder / "items.parquet",
    }
    evaluate_base.main([f"--{key}={value}" for key, value in arguments.items()])
    return pd.read_parquet(folder / "items.parquet")


def test_reference_tokens_count_the_answer_without_its_end(
    tmp_path: Path,
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
) -> None:
    """The count is the tokens to generate: the templated answer without its end."""
    items = _score(tmp_path, base_folder, rows)
    question_tokens = len(tokenizer(f"Question: {rows[0]['question']}\n")["input_ids"])
    both = tokenizer(f"Question: {rows[0]['question']}\nAnswer: {rows[0]['answer']}")["input_ids"]
    assert items["reference_tokens"][0] == len(both) - question_tokens
    assert items["reference_tokens"].nunique() > 1
    computed = items.attrs["computed"]
    assert computed["precision"] == "float32"
    assert computed["device"].startswith(f"CPU, {torch.get_num_threads()} of ")
    assert computed["machine"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"evaluation": {"every_epochs": 1, "max_new_tokens": 1, "batch_size": 8}},
            "evaluation.max_new_tokens: all 10 reference answers of new are longer than 1 tokens",
        ),
        (
            {"metric": "truth_ratio_geometric"},
            "selection.metric: truth_ratio_geometric of the base",
        ),
    ],
)
def test_unmeasurable_selection_is_refused(
    tmp_path: Path,
    base_folder: Path,
    rows: list[dict[str, Any]],
    changed: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bare = [row | {"wrong_answers": []} for row in rows]
    with pytest.raises(SystemExit):
        _score(tmp_path, base_folder, bare, **changed)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "items.parquet").exists()


def test_too_short_answers_are_noted_with_a_fallback(
    tmp_path: Path, base_folder: Path, rows: list[dict[str, Any]]
) -> None:
    short = {"every_epochs": 1, "max_new_tokens": 1, "batch_size": 8}
    items = _score(tmp_path, base_folder, rows, evaluation=short, must_reach=False)
    assert (items["reference_tokens"] > 1).all()


def test_evaluate_base_warns_about_unknown_probes(
    tmp_path: Path,
    base_folder: Path,
    rows: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A random base knows no answer; for new knowledge there is no warning."""
    short = {"every_epochs": 1, "max_new_tokens": 4, "batch_size": 8}
    changed: dict[str, Any] = {"evaluation": short, "must_reach": False}
    items = _score(tmp_path, base_folder, rows, knowledge={"new": "old"}, **changed)
    value = items["rougeL_recall"].mean()
    assert value < 0.1
    cut = int((items["reference_tokens"] > 4).sum())
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert warnings[0].startswith(f"warning: {cut} of 10 reference answers of new are longer than")
    assert f"warning: the base itself has a ROUGE-L recall of only {value:.2f}" in warnings[1]
    assert "`new` of old knowledge" in warnings[1]
    long = {"every_epochs": 1, "max_new_tokens": 60, "batch_size": 8}
    _score(tmp_path, base_folder, rows, evaluation=long, must_reach=False)
    assert "warning" not in capsys.readouterr().out


def test_rouge_tokenizer_of_the_study_is_used(
    tmp_path: Path, base_folder: Path, rows: list[dict[str, Any]]
) -> None:
    """ROUGE with words of any script scores the same answers."""
    answer = "Der Müller heißt Anaïs"
    other = [row | {"answer": answer} for row in rows]
    settings = {"every_epochs": 1, "max_new_tokens": 8, "batch_size": 8}
    measured = settings | {"rouge_tokenizer": "unicode"}
    items = _score(tmp_path, base_folder, other, evaluation=measured, must_reach=False)
    expected = [rouge_l(answer, text, "unicode")["rougeL_f1"] for text in items["generated"]]
    assert items["rougeL_f1"].tolist() == expected
