"""Tests of the table of benchmarks by duration."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest

from forgetting.analysis.durations import FORGETTING_TASKS, duration_table

RUNS = pd.DataFrame(
    [
        {"run": "base", "duration": math.nan, "tokens": None},
        *({"run": f"full/duration{d}", "duration": d, "tokens": 100 * d} for d in (1, 2)),
    ]
).astype({"tokens": "Int64"})


def _score(run: str, task: str, value: float, **changes: Any) -> dict[str, Any]:
    row = {"run": run, "step": 0 if run == "base" else 5, "method": run.partition("/")[0]}
    row |= {"label": row["method"], "seed": 0, "task": task, "metric": "acc,none", "main": True}
    row |= {"value": value, "low": value - 0.03, "high": value + 0.06, "n": 10, "chance": 0.25}
    return row | changes


def _benchmarks() -> pd.DataFrame:
    """Return three tasks and one more of every model; the second duration lacks one of them."""
    rows = [
        _score(run, task, value)
        for run in RUNS["run"]
        for task, value in zip((*FORGETTING_TASKS, "gsm8k"), (0.6, 0.4, 0.5, 0.2), strict=True)
        if (run, task) != ("full/duration2", "winogrande")
    ]
    return pd.DataFrame([*rows, _score("base", "gsm8k", 0.9, metric="other", main=False)])


def test_no_benchmark_is_lost() -> None:
    table = duration_table(_benchmarks(), RUNS)
    kept = table[table["task"] != "forgetting_mean"]
    assert len(kept) == 11
    lengths = kept.groupby("run")[["duration", "tokens"]].first()
    assert lengths.loc["base"].tolist() == [0, 0]
    assert lengths.loc["full/duration2"].tolist() == [2, 200]


def test_forgetting_mean_needs_all_three_tasks() -> None:
    """Its interval is that of a mean of independent tasks: 1 / sqrt(3) as wide as theirs."""
    table = duration_table(_benchmarks(), RUNS)
    means = table[table["task"] == "forgetting_mean"].set_index("run")
    assert set(means.index) == {"base", "full/duration1"}
    row = means.loc["full/duration1"]
    assert row["value"] == pytest.approx(0.5)
    assert (row["low"], row["high"]) == pytest.approx(
        (0.5 - 0.03 / math.sqrt(3), 0.5 + 0.06 / math.sqrt(3))
    )
    assert (row["n"], row["chance"], row["tokens"], row["duration"]) == (30, 0.25, 100, 1)


def test_study_without_benchmarks_has_an_empty_table() -> None:
    assert duration_table(_benchmarks().iloc[:0], RUNS).empty
