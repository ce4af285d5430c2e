"""Differences between methods: paired by question, means over seeds, known intervals."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from forgetting.analysis.comparisons import compare_methods
from forgetting.analysis.intervals import tango_interval, wilson_interval


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
    hard_and_easy = [0.1, 0.9, 0.2, 0.8, 0.3] * 8
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
    assert (row["label"], row["other"], row["n"]) == ("a", "b", 40)
    assert row["difference"] == pytest.approx(0.09)
    assert 0.06 < row["low"] < 0.09 < row["high"] < 0.12
    assert wilson_interval([v + 0.09 for v in hard_and_easy])[0] < wilson_interval(hard_and_easy)[1]
    assert set(table["label"]) | set(table["other"]) == {"a", "b"}, "c has no checkpoint"
    assert set(table["metric"]) == {"rougeL_recall", "truth_ratio_arithmetic"}


def test_the_interval_is_that_of_the_differences() -> None:
    first, second = [1.0, 0.5, 0.75, 1.0], [0.5, 0.5, 0.25, 0.75]
    items = pd.concat([_items("a", first), _items("b", second)])
    selection = pd.DataFrame({"label": ["a", "b"], "run": ["a", "b"], "step": [5, 5]})
    row = compare_methods(items, selection).iloc[0]
    expected = tango_interval([one - two for one, two in zip(first, second, strict=True)])
    assert (row["low"], row["high"]) == pytest.approx(expected)
    assert (row["low_all"], row["high_all"]) == pytest.approx(expected), "one pair is all pairs"


def _methods(draw: np.random.Generator, better: float, n: int = 60) -> pd.DataFrame:
    """Five methods that get half of the same questions right, but for the first: `better` more.

    Of the questions 60 % are hard or easy for all, as an old probe's are.
    """
    shared, luck = draw.random(n), draw.random((5, n))
    tables = []
    for place, label in enumerate("abcde"):
        share = 0.5 + better * (place == 0)
        own = (luck[place] < share).astype(float)
        tables.append(
            _items(label, np.where(shared < 0.6, shared < 0.3, own).astype(float).tolist())
        )
    return pd.concat(tables).assign(truth_ratio_arithmetic=math.nan)


FIVE = pd.DataFrame({"label": list("abcde"), "run": list("abcde"), "step": [5] * 5})


def test_of_five_equal_methods_few_studies_find_an_unequal_pair() -> None:
    """At most 6 % of 200 studies by the bounds for all pairs, a fifth and more by each pair's own.

    The standard error of a true 5 % is 1.5.
    """
    draw = np.random.default_rng(5)
    alone, at_once = [], []
    for _ in range(200):
        table = compare_methods(_methods(draw, 0.0), FIVE)
        assert len(table) == 10
        alone.append(((table["low"] > 0) | (table["high"] < 0)).any())
        at_once.append(((table["low_all"] > 0) | (table["high_all"] < 0)).any())
        assert (table["low_all"] < table["low"]).all()
        assert (table["high_all"] > table["high"]).all()
    assert np.mean(alone) > 0.2
    assert np.mean(at_once) <= 0.06


def test_a_real_difference_is_still_found_among_five() -> None:
    """The one better method, by 40 of 100 questions that are not the same for all."""
    draw = np.random.default_rng(6)
    found = []
    for _ in range(30):
        table = compare_methods(_methods(draw, 0.4, 200), FIVE)
        pairs = table[table["label"] == "a"]
        found.append((pairs["low_all"] > 0).any())
    assert np.mean(found) >= 0.9


def test_nothing_selected_gives_an_empty_table_with_its_columns() -> None:
    selection = pd.DataFrame({"label": ["a"], "run": [None], "step": [None]})
    table = compare_methods(_items("a", [1.0]), selection)
    assert table.empty
    assert "difference" in table
