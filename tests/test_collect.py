"""Results of jobs on disk become the tables of the report."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from forgetting.benchmarks.harness import ITEM_COLUMNS, SCORE_COLUMNS
from forgetting.benchmarks.programs import Program, describe
from forgetting.records import read_json, write_json, write_table
from forgetting.results.collect import benchmark_tables, main_items

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


def test_programs_that_were_not_run_come_with_the_remedy(tmp_path: Path) -> None:
    """What to install, what to type, and what it risks to do without."""
    folder = _model(tmp_path / "base")
    write_json(folder / "outcomes.json", {"sandbox": None, "why": "no bwrap", "outcomes": []})
    scores, _, (note,) = benchmark_tables([folder], WHO)
    assert set(scores["task"]) == {"arc"}
    assert note.startswith("humaneval is not scored, for want of a sandbox: no bwrap. ")
    for part in ("bubblewrap", "run the study again", "`benchmarks.sandbox: none`", "delete"):
        assert part in note


def test_counts_and_perplexities_have_intervals_of_their_own(tmp_path: Path) -> None:
    """Also where all counts happen to be 0 or 1: Student's; what is no mean has the harness's."""
    folder = _model(tmp_path / "base")
    programs = [
        Program("humaneval", f"h/{n}", n, s, f"{s}", "") for n in range(3) for s in range(2)
    ]
    write_json(folder / "programs.json", describe(programs))
    outcomes = [{"status": "passed" if number < 2 else "failed"} for number in range(6)]
    write_json(folder / "outcomes.json", {"sandbox": "made", "why": "", "outcomes": outcomes})
    scores = pd.DataFrame(
        [("lambada", "perplexity,none", True, 20.0, 2.0, 3, float("nan"))], columns=SCORE_COLUMNS
    )
    items = pd.DataFrame(
        [("lambada", item, "perplexity,none", -3.0) for item in range(3)], columns=ITEM_COLUMNS
    )
    write_table(folder / "scores.parquet", scores)
    write_table(folder / "items.parquet", items)
    record = read_json(folder / "record.json")
    write_json(folder / "record.json", record | {"tasks": {"humaneval": {"num_fewshot": 0}}})
    table, every, _ = benchmark_tables([folder], WHO)
    table = table.set_index("metric")
    assert table.loc["perplexity,none", ["low", "high"]].tolist() == [20 - 3.92, 20 + 3.92]
    # 2, 0 and 0 different answers pass: 2/3 with t(0.975, 2) = 4.303 times 1.1547 / sqrt(3); no
    # count is below 0.
    bounds = table.loc["distinct_passing,create_test", ["low", "high"]].tolist()
    assert bounds == pytest.approx([0.0, 2 / 3 + 4.30265 * 2 / 3], rel=1e-5)
    assert (
        0 <= table.loc["pass@1,create_test", "low"] < table.loc["pass@1,create_test", "high"] <= 1
    )
    assert main_items(table.reset_index(), every).empty  # neither is the model's one answer


def test_none_right_has_a_bound_of_zero(tmp_path: Path) -> None:
    scores, _, _ = benchmark_tables([_model(tmp_path / "base")], WHO)
    assert scores["low"][0] == 0.0
