"""Differences between methods: paired by question, means over seeds, known intervals."""

from __future__ import annotations

import pandas as pd
import pytest

from forgetting.comparisons import compare_methods
from forgetting.statistics import mean_interval


def _items(run: str, values: list[float]) -> pd.DataFrame:
    rows = [
        {
            "run": run,
            "step": 5,
            "probe": "old",
            "item": f"q{number}",
            "rougeL_recall": value,
            "truth_ratio_arithmetic": 1.0 - value,
            "truth_ratio_geometric": float("nan"),
        }
        for number, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_a_difference_is_paired_by_question_after_the_mean_over_seeds() -> None:
    """A small steady difference is seen where two separate intervals would overlap."""
    hard_and_easy = [0.1, 0.9, 0.2, 0.8, 0.3]
    items = pd.concat(
        [
            _items("a/seed0", [v + 0.10 for v in hard_and_easy]),
            _items("a/seed1", [v + 0.08 for v in hard_and_easy]),
            _items("b/seed0", hard_and_easy),
            _items("c/seed0", hard_and_easy),
        ]
    )
    selection = pd.DataFrame(
        [("a", "a/seed0", 5), ("a", "a/seed1", 5), ("b", "b/seed0", 5), ("c", "c/seed0", None)],
        columns=["label", "run", "step"],
    ).astype({"step": "Int64"})
    table = compare_methods(items, selection)
    row = table[table["metric"] == "rougeL_recall"].iloc[0]
    assert (row["label"], row["other"], row["n"]) == ("a", "b", 5)
    assert row["difference"] == pytest.approx(0.09)
    assert row["low"] == pytest.approx(0.09)
    assert set(table["label"]) | set(table["other"]) == {"a", "b"}, "c has no checkpoint"
    assert set(table["metric"]) == {"rougeL_recall", "truth_ratio_arithmetic"}


def test_the_interval_is_students_on_the_differences() -> None:
    first, second = [1.0, 0.5, 0.75, 1.0], [0.5, 0.5, 0.25, 0.75]
    items = pd.concat([_items("a", first), _items("b", second)])
    selection = pd.DataFrame({"label": ["a", "b"], "run": ["a", "b"], "step": [5, 5]})
    row = compare_methods(items, selection).iloc[0]
    expected = mean_interval([one - two for one, two in zip(first, second, strict=True)])
    assert (row["low"], row["high"]) == pytest.approx(expected)


def test_nothing_selected_gives_an_empty_table_with_its_columns() -> None:
    selection = pd.DataFrame({"label": ["a"], "run": [None], "step": [None]})
    table = compare_methods(_items("a", [1.0]), selection)
    assert table.empty
    assert "difference" in table
