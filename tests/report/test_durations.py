"""A study with durations has one trajectory per setting, with a point for each duration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from forgetting.report.charts import old_versus_new
from forgetting.report.frames import at_selected, measured_probes, per_duration, read_tables
from forgetting.report.summary import run_rows
from support.result_tables import tables, write

DURATIONS = {2.0: 80, 4.0: 160, 8.0: 320}


@pytest.fixture
def made() -> dict[str, Any]:
    """Return the tables of a study whose runs have three branches, evaluated every epoch."""
    whole = tables(ranks=(8,), rates=(1e-3, 5e-3), epochs=8)
    runs, trajectory = whole["runs"], whole["trajectory"]
    base, tuned = runs[runs["kind"] == "base"], runs[runs["kind"] != "base"]
    branches, points = [base], [trajectory[trajectory["run"] == "base"]]
    for duration, steps in DURATIONS.items():
        names = {run: f"{run}/duration{duration:g}" for run in tuned["run"]}
        picked = tuned["selected_step"] == steps
        branches.append(
            tuned.assign(
                run=tuned["run"].map(names),
                duration=duration,
                steps=steps,
                epochs=duration,
                chosen=tuned["chosen"] & picked,
                selected_step=tuned["selected_step"].where(picked),
            )
        )
        part = trajectory[trajectory["run"].isin(names) & (trajectory["step"] <= steps)]
        points.append(part.assign(run=part["run"].map(names)))
    return whole | {
        "runs": pd.concat(branches, ignore_index=True),
        "trajectory": pd.concat(points, ignore_index=True),
        "selection": _at_ends(whole["selection"]),
        "benchmarks": _at_ends(whole["benchmarks"]),
    }


def _at_ends(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows as those of the second duration's branch; rows of the base are unchanged."""
    base = table["run"] == "base"
    ends = table["run"].where(base, table["run"] + "/duration4")
    return table.assign(run=ends, step=table["step"].where(base, 160))


def test_run_is_drawn_by_the_ends_of_its_branches(made: dict[str, Any], tmp_path: Path) -> None:
    made["runs"]["chosen"] = made["runs"]["run"].isin(made["selection"]["run"])
    read = read_tables(write(tmp_path, made))
    assert len(read.tuned) == 4
    assert set(read.tuned["steps"]) == {320}
    rows = measured_probes(read, "rougeL_recall", "new_authors")
    for run, group in rows.groupby("run"):
        assert "duration" not in str(run)
        assert list(group["step"]) == [0, 80, 160, 320]
    picked = at_selected(read, "rougeL_recall", "new_authors")
    assert list(picked["step"]) == [160, 160]
    assert set(picked["run"]) == set(read.tuned[read.tuned["chosen"]]["run"])
    assert set(read.benchmarks["run"]) == {"base", *picked["run"]}
    assert len(run_rows(read)) == 4
    assert old_versus_new(read).to_dict()


def test_benchmarks_of_other_durations_are_not_drawn(made: dict[str, Any]) -> None:
    """The figure has the selected checkpoints only."""
    scored = made["benchmarks"]
    other = scored[scored["run"] != "base"]
    other = other.assign(run=other["run"].str.replace("duration4", "duration8"), step=320)
    folded = per_duration(made | {"benchmarks": pd.concat([scored, other])})
    assert len(folded["benchmarks"]) == len(scored)
    assert set(folded["benchmarks"]["step"]) == {0, 160}


def test_run_with_a_diverged_branch_is_marked(made: dict[str, Any]) -> None:
    runs = made["runs"]
    broken = runs["run"] == "full/seed0/lr0.005-wd0/duration8"
    made["runs"] = runs.assign(status=runs["status"].mask(broken, "diverged"))
    folded = per_duration(made)["runs"].set_index("run")["status"]
    assert folded["full/seed0/lr0.005-wd0"] == "diverged"
    assert set(folded.drop("full/seed0/lr0.005-wd0")) == {"ok"}


def test_durations_with_equal_steps_are_one_point(made: dict[str, Any]) -> None:
    runs, trajectory = made["runs"], made["trajectory"]
    twin = runs[runs["duration"] == 8.0]
    names = {run: run.replace("duration8", "duration8.001") for run in twin["run"]}
    points = trajectory[trajectory["run"].isin(names)]
    made["runs"] = pd.concat([runs, twin.assign(run=twin["run"].map(names), duration=8.001)])
    made["trajectory"] = pd.concat([trajectory, points.assign(run=points["run"].map(names))])
    points = per_duration(made)["trajectory"]
    assert not points.duplicated(["run", "step", "probe", "metric"]).any()


def test_study_without_durations_is_unchanged() -> None:
    plain = tables(ranks=(8,))
    assert per_duration(plain) is plain
    empty = plain | {"runs": plain["runs"].assign(duration=float("nan"))}
    assert per_duration(empty) is empty
