"""Old knowledge at equal new knowledge: the comparison of methods at matched learning.

What learns less has less to forget. So every trajectory is interpolated at fixed levels of the new
knowledge, and methods are compared at each level and in the mean over the common range. The range
ends at the smallest maximum of all compared runs: a mean over those runs alone that reach a higher
level would flatter a method of which only the best runs reach it.

The variance of training seeds is that of `forgetting.analysis.method_differences`. The variance of
items is that of bootstrap draws of items, new and old, for all runs and evaluations at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize

from forgetting.analysis.comparisons import COMPARED_METRICS
from forgetting.analysis.method_differences import (
    COLUMNS,
    RunNoise,
    Variance,
    difference_row,
    holm,
    item_clusters,
    least_item_variance,
    resampled,
    total_variance,
)
from forgetting.config.evaluation import SelectionConfig
from forgetting.evaluation.metrics import TEXT_SCORES, UNBOUNDED_METRICS, item_scores

LEVELS = 12
"""Number of levels from the beginning of the range to the threshold of the selection."""

RANGE_START = 0.3
"""Beginning of the range as a share of the threshold."""

LARGEST_STEP = 0.4
"""The first bracket is not interpolated if it is wider: the old score bends most there."""

ITEM_DRAWS = 120
"""Number of draws of items."""

_BETTER = dict.fromkeys(UNBOUNDED_METRICS & set(TEXT_SCORES), "lower")
_Measure = Mapping[str, Any]
_Lost = Mapping[str, Mapping[str, int]]

MEASURE = ["probe", "metric", "better", "level", "range_low", "range_high"]
DIFFERENCE_COLUMNS = [*MEASURE, *COLUMNS, "reached", "reached_other"]
VALUE_COLUMNS = [
    *MEASURE,
    *("label", "value", "low", "high", "scope", "seeds", "reached", "diverged", "missing"),
]


def value_at_level(x: np.ndarray, y: np.ndarray, level: float) -> float:
    """Return y where x first reaches a level, linear in x between two evaluations.

    Args:
        x: new knowledge along the steps, the base model first. It is made isotonic first.
        y: old knowledge at the same evaluations.
        level: of x.

    Returns:
        The value; NaN if x never reaches the level, or in a first bracket above `LARGEST_STEP`.
    """
    rising = _isotonic(np.asarray(x, dtype=float)[None])
    first = int(np.argmax(rising[0] >= level))
    if rising[0, -1] < level or (first == 1 and rising[0, 1] - rising[0, 0] > LARGEST_STEP):
        return math.nan
    return float(_interpolate(rising, np.asarray(y, dtype=float)[None], np.array([level]))[0, 0])


def _isotonic(x: np.ndarray) -> np.ndarray:
    """Return every row made isotonic, without rounding errors, which would miss a level."""
    return np.stack([optimize.isotonic_regression(row, increasing=True).x for row in x]).round(12)


def _interpolate(x: np.ndarray, y: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return y at levels of x, (draws, levels); where x stays below, y at the maximum of x.

    Args:
        x: isotonic curves, (draws, evaluations).
        y: the other curves, of the same shape.
        levels: of x.
    """
    reached = x[:, :, None] >= levels
    after = np.where(reached.any(axis=1), reached.argmax(axis=1), x.argmax(axis=1)[:, None])
    before = np.maximum(after - 1, 0)
    rows = np.arange(len(x))[:, None]
    x_before, width = x[rows, before], x[rows, after] - x[rows, before]
    weight = np.divide(levels - x_before, width, out=np.ones_like(width), where=width > 0)
    values: np.ndarray = y[rows, before] + weight.clip(0, 1) * (y[rows, after] - y[rows, before])
    return values


@dataclass(frozen=True)
class _Run:
    """The trajectory of a method and seed.

    Attributes:
        points: rows of its evaluations in the tables of scores, the base first.
        x: isotonic new knowledge: of the sample in the first row, then of the draws.
    """

    label: str
    seed: int
    points: np.ndarray
    x: np.ndarray

    @property
    def maximum(self) -> float:
        """Return the highest level that the run reaches."""
        return float(self.x[0, -1])


@dataclass(frozen=True)
class _Range:
    """Levels of new knowledge, and the part of them at which methods are compared."""

    levels: np.ndarray
    low: float
    high: float

    def with_mean(self, values: np.ndarray) -> np.ndarray:
        """Return values at the levels (last axis), NaN above the range, then their mean over it."""
        inside = self.levels <= self.high
        area = np.trapezoid(values[..., inside], self.levels[inside], axis=-1)
        mean = area / (self.high - self.low) if self.high > self.low else np.full_like(area, np.nan)
        return np.concatenate([np.where(inside, values, np.nan), mean[..., None]], axis=-1)


def compare_at_matched_learning(
    items: pd.DataFrame, chosen: pd.DataFrame, rule: SelectionConfig, old: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the differences of all pairs of methods at matched learning, and the methods' values.

    Args:
        items: run, step, probe, item and scores; the base is run `base` at step 0. Without a column
            `cluster`, items are independent.
        chosen: label, seed, run, status and `end`, at least one row per method and seed. A missing
            run is None. Only the step `end` of a cooldown branch counts, all steps where it is NaN.
        rule: the selection; its probe and metric measure the new knowledge.
        old: probes that are compared, the general text among them.

    Returns:
        Two tables with a row per probe, metric, level and pair or method; level NaN is the mean
        over the range. The range is from `RANGE_START` of the threshold, or the base's value if
        that is larger, to the threshold, or to the smallest maximum of the compared runs if that is
        smaller. Methods are compared if all their runs reach its beginning. Runs that diverge
        before the threshold, and missing runs, count apart. docs/results.md has the columns.
    """
    trajectories = chosen[["label", "seed"]].drop_duplicates().reset_index(drop=True)
    keyed = _keyed(items, chosen, trajectories)
    new, clusters = _scores(keyed, rule.probe, rule.metric)
    x = (_draw_weights(clusters, seed=0) @ new.to_numpy().T).round(12)
    start = max(RANGE_START * rule.threshold, float(x[0, 0]))
    runs, owners = [], new.index.get_level_values("trajectory")
    lost = {str(label): {"diverged": 0, "missing": 0} for label in trajectories["label"]}
    for number, (label, seed) in enumerate(trajectories.itertuples(index=False)):
        points = np.flatnonzero(owners.isin([-1, number]) & np.isfinite(x[0]))
        run = _Run(str(label), int(seed), points, _isotonic(x[:, points]))
        status = chosen[(chosen["label"] == label) & (chosen["seed"] == seed)]["status"]
        if (status == "diverged").any() and run.maximum < rule.threshold:
            lost[run.label]["diverged"] += 1
        elif len(points) < 2:
            lost[run.label]["missing"] += 1
        else:
            runs.append(run)
    slow = {run.label for run in runs if run.maximum < start}
    ends = [run.maximum for run in runs if run.label not in slow]
    if not ends or start >= rule.threshold:
        old = []  # There is nothing to match.
    high = min([rule.threshold, *ends])
    levels = np.union1d(np.linspace(start, rule.threshold, LEVELS), [high])
    span = _Range(levels, start, high)
    differences, values = [], []
    for probe, metric in product(old, (name for name in COMPARED_METRICS if name in keyed)):
        scores, clusters = _scores(keyed, probe, metric)
        if scores.empty:
            continue
        measure = {
            **{"probe": probe, "metric": metric, "better": _BETTER.get(metric, "higher")},
            **{"range_low": start, "range_high": high, "n": scores.shape[1]},
            "clusters": clusters.nunique(),
        }
        y = _draw_weights(clusters, seed=1) @ scores.reindex(new.index).to_numpy().T
        pairs, methods = _compare(runs, _values(runs, y, span, slow), span, lost, measure)
        differences.append(pairs)
        values.append(methods)
    if not values:
        return pd.DataFrame(columns=DIFFERENCE_COLUMNS), pd.DataFrame(columns=VALUE_COLUMNS)
    return pd.concat(differences, ignore_index=True), pd.concat(values, ignore_index=True)


def _keyed(items: pd.DataFrame, chosen: pd.DataFrame, trajectories: pd.DataFrame) -> pd.DataFrame:
    """Return the items of the chosen runs, with the number of the trajectory; the base's is -1."""
    numbered = trajectories.assign(trajectory=trajectories.index)
    runs = chosen.dropna(subset=["run"]).merge(numbered, on=["label", "seed"])
    rows = items.merge(runs[["run", "end", "trajectory"]], on="run")
    rows = rows[rows["end"].isna() | (rows["end"] == rows["step"])]
    # Two durations may round to the same number of steps. Their ends are then equal.
    is_repeated = rows.duplicated(["trajectory", "step", "probe", "item"]) & rows["end"].notna()
    keyed = pd.concat([items[items["run"] == "base"].assign(trajectory=-1), rows[~is_repeated]])
    return keyed if "cluster" in keyed else keyed.assign(cluster=math.nan)


def _scores(keyed: pd.DataFrame, probe: str, metric: str) -> tuple[pd.DataFrame, pd.Series]:
    """Return scores (evaluations in order, the base first; items) and clusters of the items.

    Items for which the base has no score, such as questions without wrong answers, are left out.
    """
    rows = keyed[keyed["probe"] == probe]
    rows = rows.assign(value=item_scores(rows, metric))
    table = rows.pivot(index=["trajectory", "step"], columns="item", values="value").sort_index()
    table = table.loc[:, table.iloc[:1].notna().all()]
    return table, item_clusters(rows).loc[table.columns]


def _draw_weights(clusters: pd.Series, seed: int) -> np.ndarray:
    """Return weights (1 + ITEM_DRAWS, items): of the sample, then of draws of clusters."""
    codes, known = pd.factorize(clusters)
    weights = resampled(len(known), ITEM_DRAWS, np.random.default_rng(seed))[:, codes]
    shares: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return shares


def _values(runs: Sequence[_Run], y: np.ndarray, span: _Range, slow: set[str]) -> np.ndarray:
    """Return a value per run, draw (the sample first) and level (the mean last); NaN if unknown."""
    values = np.stack([_interpolate(run.x, y[:, run.points], span.levels) for run in runs])
    for of_run, run in zip(values, runs, strict=True):
        of_run[0] = [value_at_level(run.x[0], y[0, run.points], level) for level in span.levels]
    values[[run.label in slow for run in runs]] = math.nan
    return span.with_mean(values)


def _compare(
    runs: Sequence[_Run], values: np.ndarray, span: _Range, lost: _Lost, measure: _Measure
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the differences and the methods' values at every level and in the mean.

    Args:
        runs: that are compared.
        values: of the runs, (runs, 1 + draws, levels and mean).
        span: of the levels.
        lost: numbers of diverged and missing runs by label.
        measure: columns that describe the metric and its sample.
    """
    pairs: list[dict[str, Any]] = []
    methods: list[dict[str, Any]] = []
    table = pd.DataFrame({"label": [run.label for run in runs], "seed": [run.seed for run in runs]})
    members = table.groupby("label", sort=False).indices
    for column, level in enumerate([*span.levels, math.nan]):
        goal = span.high if math.isnan(level) else level
        reached = Counter(run.label for run in runs if run.maximum >= goal)
        # A mean over all runs of a method, or NaN: never a mean over those that get far.
        means = {label: values[rows, :, column].mean(axis=0) for label, rows in members.items()}
        means = {label: mean for label, mean in means.items() if math.isfinite(mean[0])}
        known = table["label"].isin(means)
        noise = RunNoise(table[known].assign(value=values[known, 0, column])) if means else None
        for label, count in lost.items():
            row = {**measure, **count, "level": level, "label": label, "reached": reached[label]}
            row["seeds"] = len(members.get(label, ()))
            if noise and label in means:
                seeds = Variance(noise.sd**2 / row["seeds"], noise.df) if noise.df > 0 else None
                interval = _interval(means[label], seeds, noise, 1, measure)
                row |= interval | {"value": interval["difference"]}
            methods.append(row)
        for label, other in combinations(members, 2):
            row = {**measure, "level": level, "label": label, "other": other}
            row |= {"reached": reached[label], "reached_other": reached[other]}
            row["seeds"] = min(len(members[label]), len(members[other]))
            if noise and label in means and other in means:
                draws, seeds = means[label] - means[other], noise.variance(label, other)
                row |= _interval(draws, seeds, noise, math.comb(len(means), 2), measure)
            pairs.append(row)
    differences = pd.DataFrame(pairs, columns=DIFFERENCE_COLUMNS)
    differences["p_holm"] = holm(differences["p"].where(differences["level"].isna()))
    return differences, pd.DataFrame(methods, columns=VALUE_COLUMNS)


def _interval(
    draws: np.ndarray, seeds: Variance | None, noise: RunNoise, pairs: int, measure: _Measure
) -> dict[str, Any]:
    """Return the columns of `difference_row` for an estimate that is followed by its draws."""
    items = Variance(math.nan, math.nan)
    if measure["clusters"] > 1:
        least = least_item_variance(measure["n"], measure["metric"] not in UNBOUNDED_METRICS)
        items = Variance(max(float(draws[1:].var(ddof=1)), least), measure["clusters"] - 1)
    variance = total_variance(seeds, items)
    return difference_row(float(draws[0]), variance, pairs, noise.sd, seeds is not None)
