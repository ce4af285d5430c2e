"""Difference of two methods, with the uncertainty of their items and of their training seeds.

The estimand is the difference over all items of the kind and all seeds. The variance of the seeds
is pooled over all methods and blocked by seed, because two or three seeds of one pair say little.
The variance of the items is computed over clusters of items, such as questions of one template.
No library has this combination: statsmodels' two-way clustered errors have a negative variance with
few runs, and its mixed models have no degrees of freedom for small samples. The parts are
statsmodels' least squares and Holm's correction, and Satterthwaite's degrees of freedom (1946,
Biometrics Bulletin 2:110). tests/unit/analysis/test_method_differences.py simulates the coverage.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.tools.sm_exceptions import SingularMatrixWarning

LEVEL = 0.95
POWER = 0.80

UNEQUAL_NOISE = 3.0
"""Ratio of the largest to the smallest standard deviation of runs beyond which it is not pooled."""

MIN_SEEDS_UNPOOLED = 5
"""With fewer seeds, equal standard deviations often differ by a factor of three in the sample."""

POWER_ALLOWANCE = 1.05
"""Factor of the smallest detectable difference: its formula alone has a power of .75 to .78."""

COLUMNS = (
    *("label", "other", "difference", "low", "high", "low_all", "high_all", "p", "p_holm"),
    *("scope", "seeds", "n", "clusters", "df", "run_sd", "smallest_detectable"),
)


@dataclass(frozen=True)
class Variance:
    """Variance of an estimate, with its degrees of freedom."""

    value: float
    df: float


def pairwise_differences(scores: pd.DataFrame, *, is_fraction: bool = True) -> pd.DataFrame:
    """Return the difference of every pair of methods by one metric.

    Args:
        scores: label, seed, item, cluster and value, one row per label, seed and item. Items
            without a cluster (NaN) are independent.
        is_fraction: whether the values are between 0 and 1.

    Returns:
        One row per pair: `difference` of the means (label minus other) over the items that both
        have; `low` and `high`, its 95 % interval; `low_all` and `high_all`, the bounds that hold
        for all pairs simultaneously (Bonferroni); `p` and `p_holm`, of no difference, alone and
        corrected for all pairs (Holm); `scope`: `methods` if the interval has the noise of
        training, `models` if one seed alone was trained, so that nothing follows for the methods;
        `seeds` of the method that has fewer; `n` items; `clusters`; degrees of freedom; `run_sd`,
        standard deviation of a run's mean around its method's; `smallest_detectable`, the true
        difference that such a study finds in 80 % of cases.

    Raises:
        ValueError: a label, seed and item occur twice.
    """
    if scores.duplicated(["label", "seed", "item"]).any():
        raise ValueError("a method, seed and item occur twice")
    table = scores.pivot(index="item", columns=["label", "seed"], values="value")
    values = {str(label): table[label].dropna(how="all") for label in scores["label"].unique()}
    clusters = item_clusters(scores)
    noise = RunNoise(scores)
    pairs = list(combinations(values, 2))
    rows = [
        compare_pair(
            {label: values[label] for label in pair}, clusters, noise, len(pairs), is_fraction
        )
        for pair in pairs
    ]
    differences = pd.DataFrame(rows, columns=list(COLUMNS))
    differences["p_holm"] = holm(differences["p"])
    return differences


def item_clusters(scores: pd.DataFrame) -> pd.Series:
    """Return the cluster of each item as a number; an item without one is a cluster of its own."""
    clusters = scores.drop_duplicates("item").set_index("item")["cluster"]
    codes, known = pd.factorize(clusters)
    own = np.arange(len(known), len(known) + len(codes))
    return pd.Series(np.where(codes < 0, own, codes), index=clusters.index)


class RunNoise:
    """Variance of the means of runs around the effects of their method and seed.

    Args:
        scores: label, seed and value, one or more rows per run.
    """

    def __init__(self, scores: pd.DataFrame) -> None:
        runs = scores.groupby(["label", "seed"], sort=False)["value"].mean().reset_index()
        labels, seeds = pd.get_dummies(runs["label"]), pd.get_dummies(runs["seed"])
        self.labels = [str(label) for label in labels]
        self.design = np.hstack([labels, seeds.iloc[:, 1:]]).astype(float)
        with warnings.catch_warnings():
            # Without a chain of common seeds; `variance` then returns None.
            warnings.simplefilter("ignore", SingularMatrixWarning)
            self.fit = sm.OLS(runs["value"].to_numpy(), self.design).fit()
        by_label = runs.groupby("label")["value"]
        self.variances = by_label.var()
        self.counts = by_label.size()
        self.df = float(self.fit.df_resid)
        self.sd = math.sqrt(self.fit.mse_resid) if self.df > 0 else math.nan

    def variance(self, label: str, other: str) -> Variance | None:
        """Return the variance of a difference that training causes; None if it is not known.

        It is pooled over all methods, unless their runs clearly vary to different degrees.
        """
        if self.df <= 0:
            return None
        contrast = np.zeros(self.design.shape[1])
        contrast[self.labels.index(label)], contrast[self.labels.index(other)] = 1.0, -1.0
        if not np.allclose(contrast @ self._projection, contrast):
            return None  # No chain of common seeds connects the two.
        if self._is_unequal:
            return self._unpooled(label, other)
        return Variance(float(contrast @ self.fit.cov_params() @ contrast), self.df)

    @cached_property
    def _projection(self) -> np.ndarray:
        """Return the projection onto the contrasts that the runs determine."""
        projection: np.ndarray = np.linalg.pinv(self.design) @ self.design
        return projection

    @cached_property
    def _is_unequal(self) -> bool:
        sds = np.sqrt(self.variances.to_numpy())
        enough = self.counts.min() >= MIN_SEEDS_UNPOOLED
        return bool(enough and sds.max() > UNEQUAL_NOISE * sds.min())

    def _unpooled(self, label: str, other: str) -> Variance:
        parts = [self.variances[name] / self.counts[name] for name in (label, other)]
        freedom = [self.counts[name] - 1 for name in (label, other)]
        return _with_freedom(sum(parts), *map(Variance, parts, freedom))


def _with_freedom(total: float, *parts: Variance) -> Variance:
    """Return a variance that is made of these parts, with Satterthwaite's degrees of freedom."""
    spread = sum(part.value**2 / part.df for part in parts)
    return Variance(total, total**2 / spread if spread else min(part.df for part in parts))


def item_variance(
    differences: pd.Series, clusters: pd.Series, *, is_fraction: bool = True
) -> Variance:
    """Return the variance of a mean difference that the choice of items causes.

    That of fractions is at least what one item that changes by 1 adds, 1/n^2: where none of few
    items has changed, others of their kind may.

    Args:
        differences: by item, means over seeds.
        clusters: of the items.
        is_fraction: whether the scores are between 0 and 1.
    """
    sums = _cluster_sums((differences - differences.mean()).to_numpy(), differences.index, clusters)
    count = len(sums)
    if count < 2:
        return Variance(math.nan, math.nan)
    variance = count / (count - 1) * float((sums**2).sum())
    return Variance(max(variance, least_item_variance(len(differences), is_fraction)), count - 1)


def least_item_variance(items: int, is_fraction: bool) -> float:
    """Return the least variance that the choice of items causes: 0 unless scores are fractions."""
    return 1 / items**2 if is_fraction else 0.0


def resampled(count: int, draws: int, random: np.random.Generator) -> np.ndarray:
    """Return how often items or seeds are in the sample (once each), then in every resample.

    Returns:
        (1 + draws, count).
    """
    drawn = np.ones((1 + draws, count))
    if count:
        drawn[1:] = random.multinomial(count, np.full(count, 1 / count), draws)
    return drawn


def _cluster_sums(values: np.ndarray, items: pd.Index, clusters: pd.Series) -> np.ndarray:
    """Return the sum of values over the items of each cluster, divided by the number of items."""
    _, codes = np.unique(clusters.loc[items].to_numpy(), return_inverse=True)
    sums: np.ndarray = np.bincount(codes, weights=values)
    return sums / len(values)


def _twice_counted(table: pd.DataFrame, clusters: pd.Series) -> float:
    """Return the part of a method's variance that both seeds and items contain."""
    columns = [_cluster_sums(table[seed].to_numpy(), table.index, clusters) for seed in table]
    sums = np.stack(columns, axis=1)
    count, seeds = sums.shape
    if count < 2 or seeds < 2:
        return 0.0
    rest = sums - sums.mean(axis=0) - sums.mean(axis=1, keepdims=True) + sums.mean()
    mean_square = (rest**2).sum() / ((seeds - 1) * (count - 1))
    return float(mean_square * count / seeds)


def total_variance(seeds: Variance | None, items: Variance, twice: float = 0.0) -> Variance:
    """Return the variance of a difference over items and seeds.

    Args:
        seeds: of training; without it the items' alone counts.
        items: of the items.
        twice: the part that both contain.
    """
    if seeds is None:
        return items
    total = max(seeds.value + items.value - twice, seeds.value, items.value)
    return _with_freedom(total, seeds, items)


def difference_row(
    difference: float, variance: Variance, pairs: int, run_sd: float, has_seeds: bool
) -> dict[str, object]:
    """Return the interval and the test of a difference.

    Args:
        difference: of two methods.
        variance: of the difference.
        pairs: number of pairs that are compared.
        run_sd: standard deviation of a run's mean.
        has_seeds: whether the variance has the noise of training.
    """
    error = math.sqrt(variance.value)

    def quantile(probability: float) -> float:
        return float(stats.t.ppf(probability, variance.df))

    half, half_all = (
        error * quantile(1 - (1 - LEVEL) / (2 * count)) for count in (1, max(pairs, 1))
    )
    return {
        "difference": difference,
        "low": difference - half,
        "high": difference + half,
        "low_all": difference - half_all,
        "high_all": difference + half_all,
        "p": 2 * float(stats.t.sf(abs(difference) / error, variance.df)) if error else math.nan,
        "scope": "methods" if has_seeds else "models",
        "df": variance.df,
        "run_sd": run_sd,
        "smallest_detectable": POWER_ALLOWANCE * (half + error * quantile(POWER)),
    }


def compare_pair(
    values: Mapping[str, pd.DataFrame],
    clusters: pd.Series,
    noise: RunNoise,
    pairs: int,
    is_fraction: bool,
) -> dict[str, object]:
    """Return the row of `pairwise_differences` of a pair, without Holm's correction.

    Args:
        values: by the two labels, tables of items and seeds.
        clusters: of all items.
        noise: of the runs of all methods.
        pairs: number of pairs that are compared.
        is_fraction: whether the values are between 0 and 1.
    """
    (label, first), (other, second) = values.items()
    shared = first.index.intersection(second.index, sort=False)
    first, second = first.loc[shared], second.loc[shared]
    by_item = (first.mean(axis=1) - second.mean(axis=1)).dropna()
    seeds = noise.variance(label, other)
    items = item_variance(by_item, clusters, is_fraction=is_fraction)
    twice = sum(_twice_counted(table.dropna(), clusters) for table in (first, second))
    variance = total_variance(seeds, items, twice)
    row = difference_row(float(by_item.mean()), variance, pairs, noise.sd, seeds is not None)
    return row | {
        "label": label,
        "other": other,
        "seeds": min(first.shape[1], second.shape[1]),
        "n": len(by_item),
        "clusters": clusters.loc[by_item.index].nunique(),
    }


def holm(p: pd.Series) -> pd.Series:
    """Return Holm's adjusted p-values; NaN stays NaN and counts as no test."""
    adjusted = p.astype(float).copy()
    tested = adjusted.notna()
    if tested.any():
        adjusted[tested] = multipletests(adjusted[tested], method="holm")[1]
    return adjusted
