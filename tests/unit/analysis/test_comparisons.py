"""Tests of the comparison of methods: which items, probes and benchmarks it reads."""

from __future__ import annotations

import pandas as pd
import pytest

from forgetting.analysis.comparisons import compare_methods
from forgetting.analysis.method_differences import pairwise_differences

NO_BENCHMARKS = pd.DataFrame()


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


def _selection(*runs: tuple[str, int, int | None]) -> pd.DataFrame:
    """Return the selected steps of runs LABEL/seedN."""
    rows = [(label, seed, f"{label}/seed{seed}", step) for label, seed, step in runs]
    table = pd.DataFrame(rows, columns=["label", "seed", "run", "step"])
    return table.astype({"step": "Int64"})


HARD_AND_EASY = [0.1, 0.9, 0.2, 0.8, 0.3] * 8


def test_methods_are_compared_on_the_same_items_at_selected_steps() -> None:
    """A small constant difference is found; a method without a checkpoint is left out."""
    items = pd.concat(
        [
            _items("a/seed0", [v + 0.10 for v in HARD_AND_EASY]),
            _items("a/seed1", [v + 0.08 for v in HARD_AND_EASY]),
            _items("b/seed0", HARD_AND_EASY),
            _items("b/seed1", HARD_AND_EASY),
            _items("b/seed0", [0.0] * 40).assign(step=6),
            _items("c/seed0", HARD_AND_EASY),
        ]
    )
    chosen = _selection(("a", 0, 5), ("a", 1, 5), ("b", 0, 5), ("b", 1, 5), ("c", 0, None))
    table = compare_methods(items, NO_BENCHMARKS, chosen)
    row = table[table["metric"] == "rougeL_recall"].iloc[0]
    assert (row["label"], row["other"], row["n"], row["seeds"]) == ("a", "b", 40, 2)
    assert row["difference"] == pytest.approx(0.09)
    assert set(table["label"]) | set(table["other"]) == {"a", "b"}
    assert set(table["metric"]) == {"rougeL_recall", "truth_ratio_arithmetic"}


def test_benchmarks_and_general_text_are_compared() -> None:
    """Losses have no range, so equal ones have an interval without width."""
    text = [
        pd.DataFrame(
            {"run": f"{label}/seed0", "step": 5, "probe": "general_text", "item": range(6)}
        ).assign(forgetting_kl=[0.1 * n for n in range(6)])
        for label in "ab"
    ]
    tasks = [
        pd.DataFrame({"run": f"{label}/seed0", "step": 5, "task": "sciq", "item": range(4)}).assign(
            metric="acc,none", value=value
        )
        for label, value in (("a", 1.0), ("b", 0.0))
    ]
    chosen = _selection(("a", 0, 5), ("b", 0, 5))
    table = compare_methods(pd.concat(text), pd.concat(tasks), chosen).set_index("probe")
    assert table.loc["general_text", "metric"] == "forgetting_kl"
    assert table.loc["general_text", ["low", "high"]].tolist() == [0.0, 0.0]
    assert table.loc["sciq", "difference"] == 1.0
    assert table.loc["sciq", "scope"] == "models"


def test_the_intervals_are_those_of_pairwise_differences() -> None:
    values = {("a", 0): [1.0, 0.5, 0.75, 1.0], ("b", 0): [0.5, 0.5, 0.25, 0.75]}
    items = pd.concat([_items(f"{label}/seed{seed}", v) for (label, seed), v in values.items()])
    row = compare_methods(items, NO_BENCHMARKS, _selection(("a", 0, 5), ("b", 0, 5))).iloc[0]
    scores = pd.DataFrame(
        [
            {"label": label, "seed": seed, "item": f"q{n}", "cluster": None, "value": value}
            for (label, seed), by_item in values.items()
            for n, value in enumerate(by_item)
        ]
    )
    expected = pairwise_differences(scores).iloc[0]
    assert row[["low", "high", "p"]].tolist() == expected[["low", "high", "p"]].tolist()


def test_a_metric_that_no_probe_has_is_left_out() -> None:
    """Probes without wrong answers have an empty column of truth ratios."""
    items = pd.concat(
        [
            _items(f"{label}/seed0", HARD_AND_EASY).assign(truth_ratio_arithmetic=None)
            for label in "ab"
        ]
    )
    table = compare_methods(items, NO_BENCHMARKS, _selection(("a", 0, 5), ("b", 0, 5)))
    assert table["metric"].tolist() == ["rougeL_recall"]


def test_compare_methods_keeps_columns_without_selection() -> None:
    table = compare_methods(_items("a/seed0", [1.0]), NO_BENCHMARKS, _selection(("a", 0, None)))
    assert table.empty
    assert "difference" in table
