"""Tests of differences between methods: a case by hand, coverage, many pairs, few seeds."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from forgetting.analysis.method_differences import (
    RunNoise,
    compare_pair,
    item_clusters,
    pairwise_differences,
)
from support.simulated_scores import simulated_scores


@pytest.fixture(autouse=True)
def frozen() -> Iterator[None]:
    """Spare the garbage collection that statsmodels starts for every correction."""
    gc.freeze()
    yield
    gc.unfreeze()


FIVE = (0.70, 0.62, 0.66, 0.66, 0.66)
DIFFERENCE = 0.08


def _scores(values: dict[tuple[str, int], list[float]]) -> pd.DataFrame:
    rows = [
        {"label": label, "seed": seed, "item": item, "cluster": math.nan, "value": value}
        for (label, seed), by_item in values.items()
        for item, value in enumerate(by_item)
    ]
    return pd.DataFrame(rows)


def _interval(scores: pd.DataFrame) -> tuple[float, float]:
    """Return the interval of the first two methods."""
    table = scores[scores["label"].isin(["m0", "m1"])].pivot(
        index="item", columns=["label", "seed"], values="value"
    )
    values = {label: table[label] for label in ("m0", "m1")}
    row = compare_pair(values, item_clusters(scores), RunNoise(scores), 10, is_fraction=True)
    return float(row["low"]), float(row["high"])  # type: ignore[arg-type]


def test_interval_equals_the_one_worked_out_by_hand() -> None:
    """Two methods, two seeds and four items, by the formulas alone."""
    scores = _scores(
        {
            ("a", 0): [1, 1, 1, 0],
            ("a", 1): [1, 0, 1, 0],
            ("b", 0): [1, 0, 0, 0],
            ("b", 1): [0, 0, 1, 0],
        }
    )
    row = pairwise_differences(scores, is_fraction=False).iloc[0]
    means = np.array([[0.75, 0.5], [0.25, 0.25]])
    rest = means - means.mean(0) - means.mean(1, keepdims=True) + means.mean()
    v_seed = 2 * (rest**2).sum() / 1 / 2
    by_item = np.array([0.5, 0.5, 0.5, 0.0])
    v_item = by_item.var(ddof=1) / 4
    twice = 0.0
    for runs in ([[1, 1, 1, 0], [1, 0, 1, 0]], [[1, 0, 0, 0], [0, 0, 1, 0]]):
        table = np.array(runs).T / 4
        centred = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
        twice += (centred**2).sum() / (1 * 3) * 4 / 2
    total = max(v_seed + v_item - twice, v_seed, v_item)
    df = total**2 / (v_seed**2 / 1 + v_item**2 / 3)
    half = stats.t.ppf(0.975, df) * math.sqrt(total)
    assert row["difference"] == pytest.approx(0.375)
    assert (row["low"], row["high"]) == pytest.approx((0.375 - half, 0.375 + half))
    assert (row["seeds"], row["n"], row["clusters"], row["scope"]) == (2, 4, 4, "methods")
    assert row["p"] == pytest.approx(2 * stats.t.sf(0.375 / math.sqrt(total), df))


@pytest.mark.parametrize(
    ("seeds", "run_sd", "items", "clusters"),
    [(2, 0.045, 96, 12), (3, 0.09, 400, 0), (10, 0.02, 96, 12)],
)
def test_interval_covers_the_true_difference(
    seeds: int, run_sd: float, items: int, clusters: int
) -> None:
    """150 studies hold it in 90 to 99 %: within two standard errors of .95 and .02.

    Items alone cover .36 of the second kind, and seeds alone .61 of the third.
    """
    assert 0.90 <= _coverage(150, seeds, run_sd, items, clusters) <= 0.995


@pytest.mark.slow
@pytest.mark.parametrize("run_sd", [0.02, 0.045, 0.09])
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize(("items", "clusters"), [(100, 0), (96, 12)])
def test_coverage_is_nominal(seeds: int, run_sd: float, items: int, clusters: int) -> None:
    """600 studies hold it within .02 of .95, and two standard errors of the simulation (.018)."""
    assert 0.912 <= _coverage(600, seeds, run_sd, items, clusters) <= 0.988


def _coverage(studies: int, seeds: int, run_sd: float, items: int, clusters: int) -> float:
    random = np.random.default_rng(seeds)
    held = [
        low <= DIFFERENCE <= high
        for low, high in (
            _interval(simulated_scores(random, FIVE, seeds, run_sd, items, clusters))
            for _ in range(studies)
        )
    ]
    return float(np.mean(held))


@pytest.mark.slow
def test_equal_methods_are_rarely_separated() -> None:
    """Some pair of five is, by Holm's p, in at most .05 + 3 standard errors of 100 studies."""
    random = np.random.default_rng(4)
    single, corrected = [], []
    for _ in range(100):
        table = pairwise_differences(simulated_scores(random, [0.66] * 5, 3, 0.045, 96, 12))
        single.append((table["p"] < 0.05).any())
        corrected.append((table["p_holm"] < 0.05).any())
        outside = (table["low_all"] > 0) | (table["high_all"] < 0)
        assert not (outside & (table["p_holm"] >= 0.05)).any(), "Holm rejects what Bonferroni does"
    assert np.mean(single) > 0.1
    assert np.mean(corrected) <= 0.115


@pytest.mark.slow
def test_a_real_difference_is_found_as_often_as_stated() -> None:
    """The power at the smallest detectable difference is .80, within .12 in 100 studies."""
    random = np.random.default_rng(5)
    first = pairwise_differences(simulated_scores(random, [0.6] * 5, 5, 0.045, 200)).iloc[0]
    means = [0.6 + first["smallest_detectable"] / 2, 0.6 - first["smallest_detectable"] / 2]
    found = []
    for _ in range(100):
        table = pairwise_differences(
            simulated_scores(random, [*means, 0.6, 0.6, 0.6], 5, 0.045, 200)
        )
        found.append(table.iloc[0]["p"] < 0.05)
    assert 0.68 <= np.mean(found) <= 0.96


def test_one_seed_says_nothing_about_methods() -> None:
    table = pairwise_differences(simulated_scores(np.random.default_rng(6), FIVE, 1, 0.0))
    assert set(table["scope"]) == {"models"}
    assert table["run_sd"].isna().all()
    assert table["difference"].notna().all()


def test_few_clusters_widen_the_interval() -> None:
    """Items of 12 clusters say less than as many independent ones."""
    scores = simulated_scores(np.random.default_rng(7), FIVE, 3, 0.02, 96, 12)
    clustered = pairwise_differences(scores).iloc[0]
    independent = pairwise_differences(scores.assign(cluster=math.nan)).iloc[0]
    assert clustered["difference"] == independent["difference"]
    assert (clustered["clusters"], independent["clusters"]) == (12, 96)
    assert clustered["df"] < independent["df"]


def test_missing_run_leaves_an_interval() -> None:
    """Least squares uses the runs that there are; a difference without common seeds has none."""
    scores = simulated_scores(np.random.default_rng(8), FIVE, 3, 0.045)
    missing = scores[(scores["label"] != "m0") | (scores["seed"] != 1)]
    row = pairwise_differences(missing).iloc[0]
    whole = pairwise_differences(scores).iloc[0]
    assert (row["scope"], row["seeds"]) == ("methods", 2)
    assert row["high"] - row["low"] > whole["high"] - whole["low"]

    unconnected = scores[(scores["label"] == "m0") == (scores["seed"] == 0)]
    row = pairwise_differences(unconnected).iloc[0]
    assert row["scope"] == "models"


def test_runs_of_unequal_noise_are_not_pooled() -> None:
    """A method of .2 run noise among quiet ones keeps its own, with five seeds."""
    random = np.random.default_rng(9)
    quiet = simulated_scores(random, [0.6] * 4, 6, 0.0, 400)
    loud = simulated_scores(random, [0.6], 6, 0.2, 400).assign(label="loud")
    table = pairwise_differences(pd.concat([quiet, loud], ignore_index=True))
    width = (table["high"] - table["low"]).groupby(table["other"] == "loud").mean()
    assert width[True] > 2 * width[False]


def test_items_that_never_differ_leave_room_for_others() -> None:
    """Equal answers to 20 questions do not show that all answers are equal."""
    same = {(label, 0): [1.0] * 10 + [0.0] * 10 for label in "ab"}
    row = pairwise_differences(_scores(same)).iloc[0]
    assert row["difference"] == 0
    assert row["high"] == pytest.approx(stats.t.ppf(0.975, 19) / 20)
    losses = pairwise_differences(_scores(same), is_fraction=False).iloc[0]
    assert losses["low"] == losses["high"] == 0
    seeds = {(label, seed): [1.0, 0.0, 0.5] for label in "ab" for seed in (0, 1)}
    losses = pairwise_differences(_scores(seeds), is_fraction=False).iloc[0]
    assert (losses["low"], losses["high"]) == pytest.approx((0, 0), abs=1e-9)


def test_duplicates_are_refused() -> None:
    scores = _scores({("a", 0): [1.0], ("b", 0): [0.0]})
    with pytest.raises(ValueError, match="occur twice"):
        pairwise_differences(pd.concat([scores, scores]))
