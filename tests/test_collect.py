"""Results of jobs on disk become the tables of the report."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from forgetting.benchmarks.harness import ITEM_COLUMNS, SCORE_COLUMNS
from forgetting.benchmarks.programs import Program, describe
from forgetting.collect import benchmark_tables
from forgetting.records import write_json, write_table

WHO = {"base": {"run": "base", "method": "base", "label": "base"}}


def _model(folder: Path) -> Path:
    """Results of a model on two tasks: one scored, and one whose programs are still to be."""
    scores = pd.DataFrame([("arc", "acc,none", True, 0.0, 0.0, 50, 0.25)], columns=SCORE_COLUMNS)
    items = pd.DataFrame(
        [("arc", item, "acc,none", 0.0) for item in range(50)], columns=ITEM_COLUMNS
    )
    write_table(folder / "scores.parquet", scores)
    write_table(folder / "items.parquet", items)
    write_json(
        folder / "programs.json",
        describe([Program("humaneval", "h/0", 0, 0, "", "")]),
    )
    tasks = {"arc": {"num_fewshot": 25}, "humaneval": {"num_fewshot": 0}}
    write_json(
        folder / "record.json",
        {"model": {"run": "base", "step": 0}, "notes": [], "tasks": tasks},
    )
    outcome = {"status": "passed"}
    write_json(folder / "outcomes.json", {"sandbox": "made", "why": "", "outcomes": [outcome]})
    return folder


def test_scores_tell_how_many_examples_the_loaded_tasks_had(tmp_path: Path) -> None:
    scores, _, notes = benchmark_tables([_model(tmp_path / "base")], WHO)
    assert dict(zip(scores["task"], scores["num_fewshot"], strict=True)) == {
        "arc": 25,
        "humaneval": 0,
    }
    assert not notes


def test_none_right_has_a_bound_of_zero(tmp_path: Path) -> None:
    scores, _, _ = benchmark_tables([_model(tmp_path / "base")], WHO)
    assert scores["low"][0] == 0.0
