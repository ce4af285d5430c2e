"""TOFU's model utility: one number for everything that a model should know.

The model utility is the harmonic mean, over probes, of the mean ROUGE-L recall, probability and
truth ratio (Maini et al. 2024, arXiv 2401.06121, section 2.2.2). Three probes give nine numbers.
New knowledge is trained on like TOFU's retain set, and its probability is that of the answer. Old
knowledge is like TOFU's real authors and world facts, and its probability is normalised by those of
the wrong answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from forgetting.analysis.intervals import tango_interval, wilson_interval
from forgetting.evaluation.metrics import item_scores

UTILITIES = {
    "model_utility_arithmetic": "truth_ratio_arithmetic",
    "model_utility_geometric": "truth_ratio_geometric",
}
"""The truth ratio of each utility: that of TOFU's paper, and that of TOFU's code."""


@dataclass(frozen=True)
class ModelUtility:
    """A model utility and the contributions of the questions.

    Attributes:
        value: in [0, 1]; 0 where one of the means is 0.
        contributions: for each probe, the derivative of the utility by a question's scores times
            these scores. To first order, the mean over a probe's questions varies as the utility
            does with them (delta method).
        largest: for each probe, the contribution of a question whose scores are all 1.
    """

    value: float
    contributions: Mapping[str, pd.Series]
    largest: Mapping[str, float]

    @property
    def n(self) -> int:
        """Number of questions."""
        return sum(map(len, self.contributions.values()))


def model_utility(
    items: pd.DataFrame, knowledge: Mapping[str, str], truth_ratio: str
) -> ModelUtility | None:
    """Return the utility of a model, or None where a probe has no wrong answers.

    Args:
        items: the items that `evaluate_probes` returns.
        knowledge: `new` or `old` for each probe; items of other probes are ignored.
        truth_ratio: the column of the truth ratio.
    """
    probes, names = items["probe"].to_numpy(dtype=object), items["item"].to_numpy(dtype=object)
    # The three scores of each question, (questions, 3).
    scores = {kind: _utility_scores(items, kind, truth_ratio) for kind in ("new", "old")}
    by_probe = {
        name: (names[probes == name], scores[kind][probes == name])
        for name, kind in knowledge.items()
        if kind in scores and (probes == name).any()
    }
    means = {name: rows.mean(axis=0) for name, (_, rows) in by_probe.items()}
    all_means = [float(mean) for probe_means in means.values() for mean in probe_means]
    if not all_means or not np.isfinite(all_means).all():
        return None
    value = harmonic_mean(all_means)
    # d value / d m = value^2 / (k m^2) for each of the k means m.
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = {name: value**2 / len(all_means) / mean**2 for name, mean in means.items()}
    return ModelUtility(
        value,
        {name: pd.Series(rows @ slopes[name], index) for name, (index, rows) in by_probe.items()},
        {name: float(slope.sum()) for name, slope in slopes.items()},
    )


def harmonic_mean(values: Sequence[float]) -> float:
    """Return k / sum of 1/x, or 0 where a value is 0."""
    if min(values) <= 0:
        return 0.0
    return len(values) / math.fsum(1 / value for value in values)


def _utility_scores(items: pd.DataFrame, knowledge: str, truth_ratio: str) -> np.ndarray:
    probability = "probability" if knowledge == "new" else "normalised_probability"
    columns = ("rougeL_recall", probability, truth_ratio)
    return np.column_stack([item_scores(items, name).to_numpy(dtype=float) for name in columns])


def utility_row(
    items: pd.DataFrame,
    knowledge: Mapping[str, str],
    metric: str,
    base: pd.DataFrame | None = None,
) -> dict[str, float] | None:
    """Return value, low, high, n and the change against the base, as `aggregate_items` has them.

    The intervals use the delta method and take questions as independent. `_sum_interval` adds the
    probes' contributions, each with an interval of its own. The change is paired by question.
    Bounds are NaN where a mean is 0, since the harmonic mean has no slope there.
    """
    tuned = model_utility(items, knowledge, UTILITIES[metric])
    if tuned is None:
        return None
    parts = [(values, tuned.largest[name]) for name, values in tuned.contributions.items()]
    low, high = _sum_interval(tuned.value, parts, wilson_interval)
    row = {
        "value": tuned.value,
        "low": float(np.clip(low, 0.0, 1.0)),
        "high": float(np.clip(high, 0.0, 1.0)),
        "n": tuned.n,
        **dict.fromkeys(("change", "change_low", "change_high"), math.nan),
    }
    before = None if base is None else model_utility(base, knowledge, UTILITIES[metric])
    if before is not None:
        change = tuned.value - before.value
        parts = [
            (values - before.contributions[name], max(tuned.largest[name], before.largest[name]))
            for name, values in tuned.contributions.items()
        ]
        low, high = _sum_interval(change, parts, tango_interval)
        row |= {
            "change": change,
            "change_low": float(np.clip(low, -1.0, 1.0)),
            "change_high": float(np.clip(high, -1.0, 1.0)),
        }
    return row


def _sum_interval(
    total: float,
    parts: Iterable[tuple[pd.Series, float]],
    interval: Callable[[Any], tuple[float, float]],
) -> tuple[float, float]:
    """Return the 95 % interval of a sum of independent means m.

    The lower bound is total - sqrt(sum of (m - low)^2), with low from the interval of each mean;
    the upper bound likewise (Zou and Donner 2008, Statistics in Medicine 27:1693).

    Args:
        total: the sum.
        parts: the values of each mean, and the largest that a value may be. The interval sees the
            values divided by it.
        interval: the interval of one mean.
    """
    below, above = 0.0, 0.0
    for values, largest in parts:
        with np.errstate(invalid="ignore"):
            scaled = values.to_numpy(dtype=float) / largest
        if not np.isfinite(scaled).all():
            return math.nan, math.nan
        low, high = interval(scaled)
        below += (largest * (scaled.mean() - low)) ** 2
        above += (largest * (high - scaled.mean())) ** 2
    return total - math.sqrt(below), total + math.sqrt(above)
