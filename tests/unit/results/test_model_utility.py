"""Tests of TOFU's model utility: values by hand, and coverage of the intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from forgetting.analysis.intervals import t_interval
from forgetting.config.evaluation import ALL_PROBES
from forgetting.results.model_utility import harmonic_mean, model_utility, utility_row
from forgetting.results.trajectories import aggregate_items

KNOWLEDGE = {"new": "new", "authors": "old", "facts": "old", "general_text": "text"}
RATIO = "truth_ratio_arithmetic"
UTILITY = "model_utility_arithmetic"


def _items(draw: np.random.Generator, n: int = 60, knows: float = 4.0) -> pd.DataFrame:
    """Return items of three probes, whose questions are hard or easy in all scores."""
    tables = []
    for probe in ("new", "authors", "facts"):
        ease = draw.normal(size=n)

        def score(shift: float, ease: np.ndarray = ease) -> np.ndarray:
            return 1 / (1 + np.exp(-(ease + shift + draw.normal(size=n))))

        tables.append(
            pd.DataFrame(
                {
                    "probe": probe,
                    "item": [f"{probe}/{number}" for number in range(n)],
                    "rougeL_recall": score(knows - 3),
                    "probability": score(knows - 4),
                    "normalised_probability": score(knows - 4),
                    # Some are above 1, which counts as 1.
                    RATIO: 1.2 * score(4 - knows),
                    "truth_ratio_geometric": score(4 - knows),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def test_model_utility_equals_values_by_hand() -> None:
    """New knowledge has the plain probability, old the normalised one; R counts as 1 - R."""
    row: dict[str, Any] = {"rougeL_recall": 1.0, "probability": 0.5, "normalised_probability": 0.25}
    row |= {RATIO: 0.5, "truth_ratio_geometric": 0.75}
    items = pd.DataFrame(
        [{"probe": probe, "item": "a", **row} for probe in ("new", "authors", "facts")]
    )
    arithmetic = model_utility(items, KNOWLEDGE, RATIO)
    # 1/1, 1/0.5, 1/0.5 for the new probe, twice 1/1, 1/0.25, 1/0.5 for the old probes.
    assert arithmetic is not None
    assert arithmetic.value == pytest.approx(9 / (1 + 2 + 2 + 2 * (1 + 4 + 2)))
    assert arithmetic.n == 3
    geometric = model_utility(items, KNOWLEDGE, "truth_ratio_geometric")
    assert geometric is not None
    assert geometric.value == pytest.approx(9 / (1 + 2 + 4 + 2 * (1 + 4 + 4)))
    assert harmonic_mean([0.5, 0.0, 1.0]) == 0.0


def test_model_utility_intervals_cover() -> None:
    """At least 92 % of 300 samples are covered at level 95 %.

    With three probes of sixty questions the intervals are conservative.
    """
    draw = np.random.default_rng(0)
    many = 200_000
    truth, before = (model_utility(_items(draw, many, k), KNOWLEDGE, RATIO) for k in (4.0, 5.0))
    assert truth is not None
    assert before is not None
    covered, changed = [], []
    for _ in range(300):
        base = _items(draw, 60, 5.0)
        row = utility_row(_items(draw, 60, 4.0), KNOWLEDGE, UTILITY, base)
        assert row is not None
        covered.append(row["low"] <= truth.value <= row["high"])
        change = truth.value - before.value
        changed.append(row["change_low"] <= change <= row["change_high"])
    assert 0.92 <= np.mean(covered) <= 0.995
    assert 0.92 <= np.mean(changed) <= 0.98


def test_model_utility_change_covers_if_few_answers_change() -> None:
    """With 2 % of 60 questions changed, 90 % are covered; with variances only, 78 %."""

    def pair(draw: np.random.Generator, n: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        base, other = _items(draw, n, 5.0), _items(draw, n, 4.0)
        changed = pd.Series(draw.random(3 * n) < 0.02)
        return base, base.where(~changed, other)

    before, after = (
        model_utility(items, KNOWLEDGE, RATIO) for items in pair(np.random.default_rng(0), 200_000)
    )
    assert before is not None
    assert after is not None
    covered, draw = [], np.random.default_rng(1)
    for _ in range(300):
        base, items = pair(draw, 60)
        row = utility_row(items, KNOWLEDGE, UTILITY, base)
        assert row is not None
        change = after.value - before.value
        covered.append(row["change_low"] <= change <= row["change_high"])
    assert np.mean(covered) >= 0.90


def test_model_utility_of_equal_answers_does_not_change() -> None:
    """Items are paired by question in any order; the interval is not empty."""
    items = _items(np.random.default_rng(1))
    row = utility_row(items, KNOWLEDGE, UTILITY, items.sample(frac=1, random_state=0))
    assert row is not None
    assert row["change"] == pytest.approx(0, abs=1e-12)
    assert -0.1 < row["change_low"] < -0.01
    assert row["change_high"] == pytest.approx(-row["change_low"])
    assert row["low"] < row["value"] < row["high"]


def test_model_utility_is_zero_without_one_kind_of_knowledge() -> None:
    """There is no interval, because the harmonic mean has no slope at zero."""
    items = _items(np.random.default_rng(2))
    items.loc[items["probe"] == "facts", "rougeL_recall"] = 0.0
    row = utility_row(items, KNOWLEDGE, UTILITY, items)
    assert row is not None
    assert row["value"] == 0.0
    assert math.isnan(row["low"])
    assert math.isnan(row["change_high"])


def test_aggregate_items_changes_of_shares_and_counts() -> None:
    """Shares have intervals in [-1, 1], with a width if nothing changed; counts Student's."""
    base = _items(np.random.default_rng(4), 20).assign(generated_tokens=9.0)
    tuned = base.assign(rougeL_recall=1.0, probability=base["probability"] ** 0.5)
    tuned["generated_tokens"] = 30.0 + np.arange(60) % 3
    table = aggregate_items(tuned, KNOWLEDGE, base)
    table = table[table["probe"] == "new"].set_index("metric")
    shares = table.drop(index="generated_tokens")
    assert (shares["change_low"] < shares["change_high"]).all()
    assert (shares["change_low"] >= -1).all()
    assert (shares["change_high"] <= 1).all()
    same = table.loc["normalised_probability"]
    assert same["change"] == 0
    assert same["change_high"] == pytest.approx(1.959964**2 / (20 + 1.959964**2))
    counts = table.loc["generated_tokens"]
    assert (counts["change_low"], counts["change_high"]) == pytest.approx(
        t_interval((tuned["generated_tokens"] - base["generated_tokens"])[:20])
    )


def test_aggregate_items_has_both_model_utilities() -> None:
    items = _items(np.random.default_rng(3))
    text = pd.DataFrame([{"probe": "general_text", "item": "t", "text_loss": 1.0}])
    both = pd.concat([items, text])
    table = aggregate_items(both, KNOWLEDGE, both)
    mine = table[table["probe"] == ALL_PROBES].set_index("metric")
    assert set(mine.index) == {"model_utility_arithmetic", "model_utility_geometric"}
    assert set(mine["knowledge"]) == {"all"}
    assert set(mine["n"]) == {180}
    items.loc[items["probe"] == "facts", [RATIO, "truth_ratio_geometric"]] = math.nan
    assert ALL_PROBES not in set(aggregate_items(items, KNOWLEDGE)["probe"])
