"""Tests of the comparison at matched learning on the page."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from forgetting.report.frames import ReportTables
from forgetting.report.matched import matched_rows, matched_sentence
from support.result_tables import report_tables
from support.result_tables import tables as make_tables


def test_methods_are_compared_with_the_best() -> None:
    rows = dict(matched_rows(report_tables()))
    assert list(rows) == ["rank 2", "rank 8", "rank 32", "rank 128", "full"]
    assert rows["full"]["real_authors"].difference is None
    cell = rows["rank 2"]["world_facts"]
    assert cell.top == cell.mean == pytest.approx((0.4, 0.35, 0.45))
    assert cell.difference == (-0.1, -0.2, 0.05)


def test_sentence_says_range_short_runs_and_single_runs() -> None:
    assert matched_sentence(report_tables(ranks=(2, 8), seeds=(0,))) == (
        "At equal new knowledge, ROUGE-L recall from 0.27 to 0.80 on new authors, which all "
        "compared runs reach, the methods keep this much of the old; these are single runs, which "
        "do not rank the methods. Not all runs reach 0.90: rank 2 (0 of 1 runs)."
    )
    made = make_tables(ranks=(2, 8), seeds=(0, 1, 2))
    made["matched_values"].loc[made["matched_values"]["label"] == "full", "diverged"] = 1
    sentence = matched_sentence(ReportTables(**made))
    assert "single" not in sentence
    assert sentence.endswith("reach 0.90: rank 2 (2 of 3 runs) and full (1 diverged).")


def test_nothing_is_said_where_nothing_is_matched() -> None:
    made = make_tables()
    for name in ("matched_values", "matched_differences"):
        made[name] = pd.DataFrame(columns=made[name].columns)
    tables = ReportTables(**made)
    assert matched_rows(tables) == []
    assert matched_sentence(tables) == ""


def test_the_page_begins_with_matched_learning(written: Path) -> None:
    page = (written / "tradeoff.html").read_text("utf-8")
    first, second = page.index("At equal new knowledge"), page.index("Methods are compared at")
    assert first < page.index("difference to the best") < second
