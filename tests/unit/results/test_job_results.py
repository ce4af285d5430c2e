"""Tests of the tables that are made of the results of all jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from forgetting.pipeline.paths import Paths
from forgetting.results.job_results import tables_of
from golden.invented_results import job_results, make_study

BENCHMARKS = {"tasks": {"sciq": {}}, "dataset": "made", "during_training": {"sciq": 5}}


@pytest.mark.parametrize(
    "options",
    [{}, {"benchmarks": BENCHMARKS}, {"selection": {"probe": "new", "wise_ft": [0.5]}}],
    ids=["defaults", "during_training", "wise_ft"],
)
def test_the_tables_are_those_that_the_workflow_expects(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Every table that a rule names is made, and no other."""
    study = make_study(**options)
    tables, _ = tables_of(study, job_results(study, tmp_path))
    expected = {Path(path).stem for path in Paths(study, "made").tables}
    assert set(tables) == expected
    assert all(isinstance(table, pd.DataFrame) for table in tables.values())
