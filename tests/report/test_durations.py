"""A study with durations has one trajectory per setting, with a point for each duration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from forgetting.analysis.durations import duration_table
from forgetting.report.charts import benchmark_durations, old_versus_new
from forgetting.report.frames import (
    ReportTables,
    at_selected,
    available_scores,
    duration_rows,
    measured_probes,
    per_duration,
    read_tables,
)
from forgetting.report.page import chart_spec, figure_numbers
from forgetting.report.summary import run_rows
from support.result_tables import TASKS, tables, write

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


def _all_ends(made: dict[str, Any]) -> dict[str, Any]:
    """Return the study with benchmarks of the ends of every duration, and their table."""
    scored = made["benchmarks"]
    tuned = scored[scored["run"] != "base"]
    parts = [scored[scored["run"] == "base"]]
    for duration, steps in DURATIONS.items():
        run = tuned["run"].str.replace("duration4", f"duration{duration:g}")
        parts.append(tuned.assign(run=run, step=steps, value=tuned["value"] - steps / 10_000))
    benchmarks = pd.concat(parts, ignore_index=True)
    runs = made["runs"].assign(tokens=1000 * made["runs"]["steps"])
    durations = duration_table(benchmarks, runs)
    return made | {"benchmarks": benchmarks, "runs": runs, "durations": durations}


def test_benchmarks_of_every_duration_are_kept(made: dict[str, Any], tmp_path: Path) -> None:
    """The figure of selected checkpoints has one duration, the tables and the others have all."""
    whole = _all_ends(made)
    read = read_tables(write(tmp_path, whole))
    assert len(read.benchmarks) == len(whole["benchmarks"]) == (1 + 2 * 3) * 5
    assert len(read.durations) == (1 + 2 * 3) * 6
    drawn = available_scores(read)
    assert len(drawn) == (1 + 2) * 5
    assert set(drawn["step"]) == {0, 160}
    for task in (*TASKS, "forgetting_mean"):
        rows = duration_rows(read, task)
        for _, group in rows.groupby("run"):
            assert list(group["tokens"]) == [0, 80_000, 160_000, 320_000]
            assert list(group["epoch"]) == [0, 2, 4, 8]
            assert group["value"].iloc[1:].is_monotonic_decreasing


def test_benchmarks_are_drawn_by_tokens(made: dict[str, Any], tmp_path: Path) -> None:
    read = read_tables(write(tmp_path, _all_ends(made)))
    spec = chart_spec(benchmark_durations(read))
    titles = [" ".join(panel["title"]["text"]) for panel in spec["concat"]]
    assert titles == [*(task.replace("_", " ") for task in TASKS), "forgetting mean"]
    assert "durations" in figure_numbers(read)
    assert "durations" not in figure_numbers(ReportTables(**tables(ranks=(8,), epochs=8)))


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
