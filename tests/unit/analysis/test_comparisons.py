"""Tests of differences between methods: pairing, means over seeds, intervals."""

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


def test_compare_methods_pairs_means_over_seeds() -> None:
    """A small constant difference is found where two separate intervals would overlap."""
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


def test_compare_methods_has_the_interval_of_differences() -> None:
    first, second = [1.0, 0.5, 0.75, 1.0], [0.5, 0.5, 0.25, 0.75]
    items = pd.concat([_items("a", first), _items("b", second)])
    selection = pd.DataFrame({"label": ["a", "b"], "run": ["a", "b"], "step": [5, 5]})
    row = compare_methods(items, selection).iloc[0]
    expected = tango_interval([one - two for one, two in zip(first, second, strict=True)])
    assert (row["low"], row["high"]) == pytest.approx(expected)
    assert (row["low_all"], row["high_all"]) == pytest.approx(expected), (
        "the only pair needs no correction"
    )


def _methods(draw: np.random.Generator, better: float, n: int = 60) -> pd.DataFrame:
    """Return items of five methods that get half of the questions right, the first `better` more.

    As in an old probe, 60 % of the questions are hard or easy for all methods.
    """
    shared, luck = draw.random(n), draw.random((5, n))
    tables = []
    for index, label in enumerate("abcde"):
        share = 0.5 + better * (index == 0)
        own = (luck[index] < share).astype(float)
        tables.append(
            _items(label, np.where(shared < 0.6, shared < 0.3, own).astype(float).tolist())
        )
    return pd.concat(tables).assign(truth_ratio_arithmetic=math.nan)


FIVE = pd.DataFrame({"label": list("abcde"), "run": list("abcde"), "step": [5] * 5})


def test_compare_methods_rarely_separates_equal_methods() -> None:
    """At most 6 % of 200 studies do by the simultaneous bounds, over 20 % by the bounds of a pair.

    The standard error of a true 5 % is 1.5 %.
    """
    draw = np.random.default_rng(5)
    single, simultaneous = [], []
    for _ in range(200):
        table = compare_methods(_methods(draw, 0.0), FIVE)
        assert len(table) == 10
        single.append(((table["low"] > 0) | (table["high"] < 0)).any())
        simultaneous.append(((table["low_all"] > 0) | (table["high_all"] < 0)).any())
        assert (table["low_all"] < table["low"]).all()
        assert (table["high_all"] > table["high"]).all()
    assert np.mean(single) > 0.2
    assert np.mean(simultaneous) <= 0.06


def test_compare_methods_finds_a_real_difference() -> None:
    """One method is better by 40 % of the questions that are not hard or easy for all."""
    draw = np.random.default_rng(6)
    separated = []
    for _ in range(30):
        table = compare_methods(_methods(draw, 0.4, 200), FIVE)
        pairs = table[table["label"] == "a"]
        separated.append((pairs["low_all"] > 0).any())
    assert np.mean(separated) >= 0.9


def test_compare_methods_keeps_columns_without_selection() -> None:
    selection = pd.DataFrame({"label": ["a"], "run": [None], "step": [None]})
    table = compare_methods(_items("a", [1.0]), selection)
    assert table.empty
    assert "difference" in table
