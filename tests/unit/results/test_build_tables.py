"""Tests of the tables that are built from the results of jobs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from forgetting.benchmarks.programs import Program, ProgramOutcomes, describe, write_outcomes
from forgetting.benchmarks.sandbox import Outcome
from forgetting.benchmarks.scores import ITEM_COLUMNS, SCORE_COLUMNS
from forgetting.errors import InputError
from forgetting.io import read_json, write_json, write_table
from forgetting.results.build_tables import benchmark_tables, chosen_runs, main_metric_items

LABELS = {"base": {"run": "base", "method": "base", "label": "base"}}

PROGRAM = Program("humaneval", "h/0", 0, 0, "", "check()")


def _model(folder: Path) -> Path:
    """Write results of a model on a scored task and on one with generated programs."""
    scores = pd.DataFrame([("arc", "acc,none", True, 0.0, 0.0, 50, 0.25)], columns=SCORE_COLUMNS)
    items = pd.DataFrame(
        [("arc", item, "acc,none", 0.0) for item in range(50)], columns=ITEM_COLUMNS
    )
    write_table(folder / "scores.parquet", scores)
    write_table(folder / "items.parquet", items)
    write_json(
        folder / "programs.json",
        describe([PROGRAM]),
    )
    tasks = {"arc": {"num_fewshot": 25}, "humaneval": {"num_fewshot": 0}}
    write_json(
        folder / "record.json",
        {"model": {"run": "base", "step": 0}, "notes": [], "tasks": tasks},
    )
    write_outcomes(
        folder / "outcomes.json", [PROGRAM], ProgramOutcomes("made", "", [Outcome("passed")])
    )
    return folder


def test_benchmark_tables_have_the_number_of_examples(tmp_path: Path) -> None:
    scores, _, notes = benchmark_tables([_model(tmp_path / "base")], LABELS)
    assert dict(zip(scores["task"], scores["num_fewshot"], strict=True)) == {
        "arc": 25,
        "humaneval": 0,
    }
    assert not notes


def test_benchmark_tables_say_how_to_run_programs(tmp_path: Path) -> None:
    """The note names what to install, what to type, and the risk of no sandbox."""
    folder = _model(tmp_path / "base")
    write_json(folder / "outcomes.json", {"sandbox": None, "why": "no bwrap", "outcomes": []})
    scores, _, (note,) = benchmark_tables([folder], LABELS)
    assert set(scores["task"]) == {"arc"}
    assert note.startswith("humaneval is not scored, because there is no sandbox: no bwrap. ")
    for part in ("bubblewrap", "run the study again", "`benchmarks.sandbox: none`", "delete"):
        assert part in note


@pytest.mark.parametrize("damage", ["truncated", "one short", "of another item", "no list"])
def test_benchmark_tables_refuse_damaged_outcomes(tmp_path: Path, damage: str) -> None:
    """The message names the file and the remedy."""
    folder = _model(tmp_path / "base")
    outcomes = folder / "outcomes.json"
    whole = read_json(outcomes)
    if damage == "truncated":
        outcomes.write_text(outcomes.read_text()[:-20])
    elif damage == "one short":
        write_json(outcomes, whole | {"outcomes": []})
    elif damage == "of another item":
        write_json(outcomes, whole | {"outcomes": [whole["outcomes"][0] | {"item": 7}]})
    else:
        write_json(outcomes, [])
    with pytest.raises(InputError) as error:
        benchmark_tables([folder], LABELS)
    message = str(error.value)
    assert message.startswith(str(outcomes)) and "run `rm -rf " in message
    assert "\n" not in message


def test_benchmark_intervals_of_counts_and_perplexities(tmp_path: Path) -> None:
    """Counts have Student's interval, also if all are 0 or 1; others the harness's error."""
    folder = _model(tmp_path / "base")
    programs = [
        Program("humaneval", f"h/{n}", n, s, f"{s}", "") for n in range(3) for s in range(2)
    ]
    write_json(folder / "programs.json", describe(programs))
    outcomes = [Outcome("passed" if number < 2 else "failed") for number in range(6)]
    write_outcomes(folder / "outcomes.json", programs, ProgramOutcomes("made", "", outcomes))
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
    table, every, _ = benchmark_tables([folder], LABELS)
    table = table.set_index("metric")
    assert table.loc["perplexity,none", ["low", "high"]].tolist() == [20 - 3.92, 20 + 3.92]
    # 2, 0 and 0 different answers pass: 2/3 with t(0.975, 2) = 4.303 times 1.1547 / sqrt(3). The
    # lower bound is cut at 0.
    bounds = table.loc["distinct_passing,create_test", ["low", "high"]].tolist()
    assert bounds == pytest.approx([0.0, 2 / 3 + 4.30265 * 2 / 3], rel=1e-5)
    assert (
        0 <= table.loc["pass@1,create_test", "low"] < table.loc["pass@1,create_test", "high"] <= 1
    )
    assert main_metric_items(
        table.reset_index(), every
    ).empty  # neither is the only answer of the model


def test_benchmark_interval_of_none_right_starts_at_zero(tmp_path: Path) -> None:
    scores, _, _ = benchmark_tables([_model(tmp_path / "base")], LABELS)
    assert scores["low"][0] == 0.0


def test_chosen_runs_have_a_row_for_every_method_and_seed() -> None:
    """All branches of a chosen setting end a trajectory; a method without a setting has no run."""
    rows = [
        *(("a", 0.1, f"a/{end}", duration, end, end == 8) for duration, end in ((1, 4), (2, 8))),
        ("a", 0.2, "a/other", 1, 4, False),
        ("b", 0.1, "b/4", 1, 4, False),
    ]
    columns = ["label", "learning_rate", "run", "duration", "steps", "chosen"]
    runs = pd.DataFrame(rows, columns=columns).assign(seed=0, weight_decay=0.0, status="ok")
    selection = pd.DataFrame({"label": ["a", "b"], "seed": [0, 0]})
    chosen = chosen_runs(runs.astype({"seed": "Int64"}), selection)
    assert chosen["label"].tolist() == ["a", "a", "b"]
    assert chosen["run"].tolist()[:2] == ["a/4", "a/8"]
    assert chosen["end"].tolist()[:2] == [4, 8]
    assert chosen["run"].isna().tolist() == [False, False, True]
