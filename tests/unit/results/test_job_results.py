"""Tests of the tables that are made of the results of all jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from forgetting.evaluation.metrics import PROBE_METRICS, TEXT_SCORES
from forgetting.pipeline.paths import Paths
from forgetting.results.job_results import tables_of
from golden.invented_results import job_results, make_study

BENCHMARKS = {"tasks": {"sciq": {}}, "dataset": "made", "during_training": {"sciq": 5}}
THREE_RANKS = [{"method": "lora", "rank": [2, 4, 8], "learning_rate": 0.01}]

DURATIONS = {"epochs": 2, "batch_size": 4, "schedule": "wsd", "durations": [2]}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"benchmarks": BENCHMARKS},
        {"selection": {"probe": "new", "wise_ft": [0.5]}},
        {"methods": THREE_RANKS},
        {"training": DURATIONS},
    ],
    ids=["defaults", "during_training", "wise_ft", "three_ranks", "durations"],
)
def test_the_tables_are_those_that_the_workflow_expects(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Every table that a rule names is made, and no other."""
    study = make_study(**options)
    tables, notes = tables_of(study, job_results(study, tmp_path))
    expected = {Path(path).stem for path in Paths(study, "made").tables}
    assert set(tables) == expected
    assert all(isinstance(table, pd.DataFrame) for table in tables.values())
    # The runs have two evaluations.
    few = [note for note in notes if "The laws of forgetting need 3 ranks" in note]
    assert len(few) == ("law_power" in tables)


SHARED = {"run", "step", "epoch", "tokens", "method", "label", "seed", "probe", "task", "item", "n"}
SHARED |= {"metric", "value", "low", "high"}


def test_every_column_is_documented(tmp_path: Path) -> None:
    document = Path(__file__).resolve().parents[3] / "docs" / "results.md"
    text = document.read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    metrics = {*PROBE_METRICS, *TEXT_SCORES}
    tables: dict[str, pd.DataFrame] = {}
    measured = {"benchmarks": BENCHMARKS, "methods": THREE_RANKS}
    for number, options in enumerate([measured, {"training": DURATIONS}]):
        study = make_study(**options)
        tables |= tables_of(study, job_results(study, tmp_path / str(number)))[0]
    for name, table in tables.items():
        documented = " ".join(
            row[1] for row in rows if name in row[0].removeprefix("| ").split(", ")
        )
        if name.startswith("benchmark_"):
            documented += " ".join(row[1] for row in rows if row[0].startswith("| benchmark"))
        missing = [
            column
            for column in {*table.columns} - SHARED - (metrics if name == "items" else set())
            if f"`{column}`" not in documented
        ]
        assert missing == [], name
    assert [metric for metric in metrics - {"generated_tokens"} if f"`{metric}`" not in text] == []
