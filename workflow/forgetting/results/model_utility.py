"""TOFU's model utility: one number for all that a model should know.

The harmonic mean over probes of their mean ROUGE-L recall, probability and truth ratio (Maini et
al. 2024, arXiv 2401.06121, section 2.2.2): three probes give its nine numbers. Of new knowledge,
which the model was trained on as TOFU's on the retain set, the probability is that of the answer;
of old knowledge, as on real authors and world facts, it is normalised by those of the wrong ones.
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
"""By the name of a utility, the truth ratio that it takes: the paper's, and that of TOFU's code."""


@dataclass(frozen=True)
class ModelUtility:
    """A model utility, and what each question has to do with it.

    Attributes:
        value: in [0, 1]; 0 where one of the means is 0.
        shares: by probe, for each question, the utility's derivative by its scores times these
            scores. The mean over a probe's questions varies as the utility does with them, to
            first order (delta method).
        largest: by probe, what a question would have to do with it that scored 1 throughout.
    """

    value: float
    shares: Mapping[str, pd.Series]
    largest: Mapping[str, float]

    @property
    def n(self) -> int:
        """Number of questions."""
        return sum(map(len, self.shares.values()))


def model_utility(
    items: pd.DataFrame, knowledge: Mapping[str, str], truth_ratio: str
) -> ModelUtility | None:
    """The utility of a model; None where a probe has no wrong answers.

    Args:
        items: what `probes.measure` returned; other rows are left out.
        knowledge: `new` or `old` for each probe.
        truth_ratio: the column of R.
    """
    asked, names = items["probe"].to_numpy(dtype=object), items["item"].to_numpy(dtype=object)
    # What each question adds to the three means of its probe, (questions, 3).
    scores = {kind: _utility_scores(items, kind, truth_ratio) for kind in ("new", "old")}
    values = {
        name: (names[asked == name], scores[kind][asked == name])
        for name, kind in knowledge.items()
        if kind in scores and (asked == name).any()
    }
    means = {name: added.mean(axis=0) for name, (_, added) in values.items()}
    every = [float(mean) for several in means.values() for mean in several]
    if not every or not np.isfinite(every).all():
        return None
    value = harmonic_mean(every)
    # d value / d m = value^2 / (k m^2) for each of the k means m.
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = {name: value**2 / len(every) / mean**2 for name, mean in means.items()}
    return ModelUtility(
        value,
        {name: pd.Series(added @ slopes[name], item) for name, (item, added) in values.items()},
        {name: float(slope.sum()) for name, slope in slopes.items()},
    )


def harmonic_mean(values: Sequence[float]) -> float:
    """k / sum of 1/x; 0 where a value is 0."""
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
    """Value, low, high, n and the change against the base, as `trajectory.aggregate` has them.

    The intervals are those of the delta method, questions of a probe taken as independent: what the
    probes have to do with the utility, each with an interval of its own, is added up by
    `_summed_counts`. The change is paired by question. NaN where a mean is 0, since nothing is
    linear there.
    """
    mine = model_utility(items, knowledge, UTILITIES[metric])
    if mine is None:
        return None
    parts = [(shares, mine.largest[name]) for name, shares in mine.shares.items()]
    low, high = _summed_counts(mine.value, parts, wilson_interval)
    row = {
        "value": mine.value,
        "low": float(np.clip(low, 0.0, 1.0)),
        "high": float(np.clip(high, 0.0, 1.0)),
        "n": mine.n,
        **dict.fromkeys(("change", "change_low", "change_high"), math.nan),
    }
    theirs = None if base is None else model_utility(base, knowledge, UTILITIES[metric])
    if theirs is not None:
        change = mine.value - theirs.value
        parts = [
            (shares - theirs.shares[name], max(mine.largest[name], theirs.largest[name]))
            for name, shares in mine.shares.items()
        ]
        low, high = _summed_counts(change, parts, tango_interval)
        row |= {
            "change": change,
            "change_low": float(np.clip(low, -1.0, 1.0)),
            "change_high": float(np.clip(high, -1.0, 1.0)),
        }
    return row


def _summed_counts(
    total: float,
    parts: Iterable[tuple[pd.Series, float]],
    interval: Callable[[Any], tuple[float, float]],
) -> tuple[float, float]:
    """95 % interval of a sum of independent means, of values between 0 (or its negative) and a
    largest one: total - sqrt(sum of (m - low)^2), and likewise upwards.

    Zou and Donner 2008 (Statistics in Medicine 27:1693), with the interval of each mean.
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
