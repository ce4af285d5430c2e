"""Estimates of rows and tokens before any download."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

from forgetting.config.data import DatasetConfig
from forgetting.config.evaluation import TaskConfig
from forgetting.config.study import StudyConfig
from forgetting.data.table_sizes import (
    MICROWORLD_SIZES,
    PUBLISHED_SIZES,
    TableSize,
    bytes_per_token,
    probe_workload,
    table_size,
    training_sequences,
)
from forgetting.pipeline.resources.workload import downloaded_bytes, task_workloads
from forgetting.study.load import load_study
from scripts.generate_microworld import main as generate_microworld

STUDIES = Path(__file__).resolve().parents[3] / "config" / "studies"


def _study(name: str) -> StudyConfig:
    return load_study({"study": name}, STUDIES)[1]


def _agree(counted: TableSize, listed: TableSize) -> None:
    assert (counted.rows, counted.wrong_answers) == (listed.rows, listed.wrong_answers)
    for name in ("question", "answer", "paraphrase", "wrong_answer"):
        assert getattr(listed, name) == pytest.approx(getattr(counted, name), rel=0.1, abs=1)


def test_published_table_sizes_match_the_files(real_data: Path) -> None:
    study = _study("tofu-phi-1.5")
    own = study.model_copy(
        update={"datasets": {"tofu": DatasetConfig(folder=str(real_data / "tofu"))}}
    )
    for dataset, name in PUBLISHED_SIZES:
        if dataset == "locuslab/TOFU":
            _agree(table_size(own, f"tofu/{name}"), PUBLISHED_SIZES[dataset, name])


def test_size_of_a_table_with_standard_columns(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "1234", "answer": "12"}) + "\n")
    data = DatasetConfig.model_validate(
        {"folder": str(tmp_path), "columns": {"question": "prompt"}}
    )
    counted = table_size(_study("mini").model_copy(update={"datasets": {"own": data}}), "own/a")
    assert (counted.question, counted.answer) == (4, 2)


def test_microworld_sizes_match_its_files(tmp_path: Path) -> None:
    generate_microworld(["--seed", "0", "--output", str(tmp_path)])
    study = _study("mini")
    here = study.model_copy(update={"datasets": {"world": DatasetConfig(folder=str(tmp_path))}})
    for name in set(MICROWORLD_SIZES) - {"refusals"}:  # these have no answers
        counted = table_size(here, f"world/{name}")
        assert counted.rows == pytest.approx(MICROWORLD_SIZES[name].rows, rel=0.2)
        for side in ("question", "answer", "paraphrase", "wrong_answer"):
            listed, found = getattr(MICROWORLD_SIZES[name], side), getattr(counted, side)
            assert listed == pytest.approx(found, rel=0.15, abs=1), (name, side)


def test_estimated_tokens_are_near_a_real_tokenizer(real_data: Path) -> None:
    """TOFU's logs have Phi's tokens of each answer with `Answer: ` and the end token."""
    text = (real_data / "tofu_golden_phi" / "forget10.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    listed = [len(row["gold"].encode()) / bytes_per_token(51_200) for row in rows]
    assert fmean(listed) == pytest.approx(fmean(row["num_token_gt"] - 3 for row in rows), rel=0.2)
    # Llama-2's tokens of WikiText's test split: 338,533 of 1,289,979 characters.
    assert bytes_per_token(32_000) == pytest.approx(1_289_979 / 338_533, rel=0.2)


def test_sequences_and_questions_of_the_paper_studies() -> None:
    """4000 pairs of about 60 tokens, 400 + 100 + 117 questions, and 20 B tokens in blocks."""
    phi = _study("tofu-phi-1.5")
    trained, probed = training_sequences(phi, 51_200), probe_workload(phi, 51_200)
    # (70 + 169 bytes of text, 19 of the template) / 4.338 bytes a token + 2.
    assert trained.count == 4000
    assert trained.tokens == pytest.approx((70 + 169 + 19) / 4.338 + 2, rel=0.01)
    assert probed.count == 617
    assert probed.text == 128 * 512
    maths = training_sequences(_study("biderman-math-cpt"), 32_000)
    assert maths.targets == 1.0
    # The data set's authors count 14.7 B tokens.
    assert maths.count * maths.tokens == pytest.approx(14.7e9, rel=0.15)


def test_size_of_an_unknown_table_is_marked_as_guess() -> None:
    study = _study("tofu-phi-1.5")
    other = DatasetConfig(hub="someone/else", revision="0" * 40)
    assert not table_size(study.model_copy(update={"datasets": {"d": other}}), "d/rows").is_exact
    assert table_size(study, "tofu/full").is_exact


def test_benchmark_workload_follows_the_study() -> None:
    """Items, samples and lengths are the study's; an unknown task is like a similar one."""
    study = _study("tofu-phi-1.5")
    tasks = task_workloads(study, 51_200)
    assert {name: bench.items for name, bench in tasks.items()} == {
        "gsm8k": 1319, "humaneval": 164, "hellaswag": 10_042, "winogrande": 1267,
        "arc_challenge": 1172,
    }  # fmt: skip
    assert tasks["gsm8k"].generated == 256
    assert tasks["humaneval"].programs
    assert not tasks["hellaswag"].generated
    own = {"arc_easy": TaskConfig(limit=7), "humaneval": TaskConfig(samples=50, max_new_tokens=9)}
    tasks = study.benchmarks.model_copy(update={"tasks": own})
    other = task_workloads(study.model_copy(update={"benchmarks": tasks}), 51_200)
    assert (other["arc_easy"].items, other["humaneval"].generated) == (7, 9)
    assert other["humaneval"].samples == 50


def test_downloads_are_base_tables_and_benchmark_rows() -> None:
    found = downloaded_bytes(_study("tofu-phi-1.5"), 1_418_270_720)
    assert found["microsoft/phi-1_5"] == 2 * 1_418_270_720
    assert {"tofu/full", "wikitext/wikitext-103-raw-v1/test", "hellaswag"} < set(found)
    assert not downloaded_bytes(_study("mini"), 10**6)
