"""Tests of Pareto fronts: hypervolumes, ranks, resamples, dominance, and the tables."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from forgetting.analysis.comparisons import compare_methods
from forgetting.analysis.fronts import (
    corrected_interval,
    front_ranks,
    front_tables,
    hypervolume,
    pair_tests,
    point_draws,
    seed_weights,
)
from forgetting.analysis.method_differences import pairwise_differences
from support.simulated_scores import simulated_scores


def _area_by_cells(points: np.ndarray) -> float:
    """Return the area that points dominate, as the sum of the cells of their grid."""
    xs, ys = (np.unique(np.append(points[:, axis], 0.0)) for axis in (0, 1))
    return math.fsum(
        (right - left) * (top - bottom)
        for left, right in pairwise(xs)
        for bottom, top in pairwise(ys)
        if ((points[:, 0] >= right) & (points[:, 1] >= top)).any()
    )


def test_hypervolume_is_the_area_of_the_dominated_cells() -> None:
    """On random sets with ties, duplicates and dominated points."""
    random = np.random.default_rng(0)
    for _ in range(200):
        points = random.random((random.integers(1, 9), 2)).round(random.integers(1, 4))
        assert hypervolume(points) == pytest.approx(_area_by_cells(points), abs=1e-14)


def test_hypervolume_of_cases_by_hand() -> None:
    assert hypervolume(np.array([[0.5, 0.5]])) == 0.25
    assert hypervolume(np.array([[0.5, 0.8], [0.8, 0.5]])) == pytest.approx(0.4 + 0.15)
    assert hypervolume(np.array([[0.5, 0.8], [0.4, 0.7], [0.5, 0.8]])) == pytest.approx(0.4)
    assert hypervolume(np.array([[-0.5, 0.8], [0.4, 0.0]])) == 0
    assert hypervolume(np.empty((0, 2))) == 0


@pytest.mark.parametrize("function", [hypervolume, front_ranks])
def test_nan_is_refused(function: object) -> None:
    with pytest.raises(ValueError, match="is NaN"):
        function(np.array([[math.nan, 0.5], [0.5, 0.5]]))  # type: ignore[operator]


def test_ranks_peel_one_front_after_the_other() -> None:
    points = np.array([[0.9, 0.1], [0.5, 0.5], [0.5, 0.5], [0.5, 0.4], [0.4, 0.4], [0.1, 0.9]])
    assert front_ranks(points).tolist() == [1, 1, 1, 2, 3, 1]


def _scores(values: Sequence[Sequence[float]], **columns: object) -> pd.DataFrame:
    """Return the scores of the seeds of one point, one list of items per seed."""
    rows = [
        {"setting": 0, "point": 1, "seed": seed, "item": item, "value": value, "cluster": math.nan}
        for seed, of_seed in enumerate(values)
        for item, value in enumerate(of_seed)
    ]
    return pd.DataFrame(rows).assign(**columns)


def _draws(scores: pd.DataFrame, seeds: int) -> pd.DataFrame:
    random = np.random.default_rng(1)
    return point_draws(
        scores, seed_weights(pd.DataFrame({"setting": 0, "seed": range(seeds)}), random), random
    )


def test_draws_vary_as_seeds_and_items_do() -> None:
    """Without noise of items, their variance is that of a mean of 4 independent seeds."""
    seeds = [0.1, 0.5, 0.4, 0.8]
    drawn = _draws(_scores([[seed] * 5 for seed in seeds]), 4).loc[(0, 1)]
    assert drawn[0] == pytest.approx(np.mean(seeds))
    assert drawn[1:].var() == pytest.approx(np.var(seeds, ddof=1) / 4, rel=0.2)
    items = [0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    drawn = _draws(_scores([items]), 1).loc[(0, 1)]
    assert drawn[1:].var() == pytest.approx(np.var(items) / 8, rel=0.2)


def test_items_of_a_cluster_are_drawn_together() -> None:
    items = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    scores = _scores([items])
    clustered = scores.assign(cluster=scores["item"] // 3)
    free, bound = (_draws(each, 1).loc[(0, 1)][1:].var() for each in (scores, clustered))
    assert bound == pytest.approx(3 * free, rel=0.3)


def test_point_without_a_finite_seed_is_left_out() -> None:
    whole = _scores([[0.5, 0.5], [0.7, 0.7]])
    assert len(_draws(whole, 2)) == 1
    assert len(_draws(_scores([[0.5, 0.5], [0.7, math.nan]]), 2)) == 0
    assert len(_draws(whole[whole["seed"] == 0], 2)) == 0
    with pytest.raises(ValueError, match="different items"):
        _draws(whole.drop(index=1), 2)


def test_corrected_interval_takes_the_bias_out() -> None:
    """Five neighbouring points: noise moves their front outwards, so that it is too large."""
    random = np.random.default_rng(2)
    x = np.linspace(0.5, 0.7, 5)
    true = np.stack([x, 1.2 - x], axis=1)
    truth = hypervolume(true)
    plain, corrected, held = [], [], []
    for _ in range(300):
        seen = true + 0.05 * random.standard_normal((5, 2))
        drawn = [hypervolume(seen + 0.05 * random.standard_normal((5, 2))) for _ in range(100)]
        value, low, high = corrected_interval(np.array([hypervolume(seen), *drawn]), 10)
        plain.append(hypervolume(seen))
        corrected.append(value)
        held.append(low <= truth <= high)
    assert np.mean(plain) - truth > 0.01
    assert abs(np.mean(corrected) - truth) < 0.5 * (np.mean(plain) - truth)
    assert np.mean(held) > 0.92


def test_dominance_needs_both_axes() -> None:
    """p is the larger of the two one-sided p-values; the other direction is tested alike."""

    def rows(*differences: tuple[float, float]) -> pd.DataFrame:
        table = pd.DataFrame(differences, columns=["difference", "p"])
        return table.assign(label="a", other=["b", "c", "d"], scope="methods")

    new = rows((0.2, 0.001), (-0.2, 0.001), (0.2, 0.001))
    old = rows((0.1, 0.02), (-0.1, 0.02), (-0.1, 0.02))
    tests = pair_tests(new, old)
    assert tests["p"].tolist() == pytest.approx([0.01, 0.01, 0.99])
    assert tests["dominant"].tolist()[:2] == ["a", "c"]
    assert tests["dominant"].isna().tolist() == [False, False, True]
    one_seed = pair_tests(new, old.assign(scope="models"))
    assert one_seed["dominant"].isna().all()


@pytest.mark.parametrize("studies", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_equal_methods_rarely_dominate(studies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In at most 2 % of the pairs of studies of three equal methods and three seeds."""
    monkeypatch.setattr(gc, "collect", int)  # statsmodels calls it for every correction: 0.2 s
    random = np.random.default_rng(3)
    called = []
    for _ in range(studies):
        new, old = (
            pairwise_differences(simulated_scores(random, [0.7] * 3, 3, 0.045, 60))
            for _ in range(2)
        )
        called += pair_tests(new, old)["dominant"].notna().tolist()
    assert np.mean(called) <= 0.02


METHODS = {"good": (0.9, 0.9), "bad": (0.5, 0.5), "other": (0.95, 0.3)}


def _study(divergence: float = 0.1) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return items, runs and selection of three methods, two rates and three seeds."""
    random = np.random.default_rng(4)
    items, runs, selection = [], [{"run": "base", "label": "base"}], []
    for label, levels in METHODS.items():
        for rate, step, seed in [(r, s, n) for r in (0.1, 0.2) for s in (1, 2) for n in range(3)]:
            run = f"{label}/seed{seed}/lr{rate}"
            if step == 1:
                runs.append({"run": run, "label": label, "seed": seed, "learning_rate": rate})
            factor = 1.0 if (rate, step) == (0.1, 2) else 0.6
            for probe, level in zip(("new", "old"), levels, strict=True):
                right = random.random(40) < factor * level
                rows = {"run": run, "step": step, "probe": probe, "item": range(40)}
                items.append(pd.DataFrame(rows | {"rougeL_recall": right.astype(float)}))
            text = {"run": run, "step": step, "probe": "general_text", "item": range(5)}
            items.append(pd.DataFrame(text).assign(forgetting_kl=divergence * (2 - levels[1])))
    for run in runs[1:]:
        if run["learning_rate"] == 0.1:
            selection.append({key: run[key] for key in ("label", "seed", "run")} | {"step": 2})
    table = pd.DataFrame(runs).assign(weight_decay=0.0, duration=math.nan)
    return pd.concat(items, ignore_index=True), table, pd.DataFrame(selection)


KNOWLEDGE = {"new": "new", "old": "old", "general_text": "text"}


def _tables(
    items: pd.DataFrame, runs: pd.DataFrame, selection: pd.DataFrame
) -> dict[str, pd.DataFrame]:
    compared = compare_methods(items, pd.DataFrame(), selection)
    return front_tables(items, runs, selection, compared, KNOWLEDGE)


def test_tables_find_the_method_that_dominates() -> None:
    """`good` beats `bad` in both; neither of `good` and `other` beats the other."""
    tables = _tables(*_study())
    fronts, dominance = tables["fronts"], tables["dominance"]
    assert len(fronts) == 2 * 3 * 2 * 2, "planes, methods, rates and steps"
    assert set(fronts["seeds"]) == {3}
    on_front = fronts[(fronts["old"] == "old") & fronts["on_front"]]
    assert (on_front["learning_rate"] == 0.1).any()
    assert "bad" not in set(on_front["label"])
    pairs = dominance[dominance["old"] == "old"].set_index(["label", "other"])
    assert pairs.loc[("good", "bad"), "dominant"] == "good"
    assert pd.isna(pairs.loc[("good", "other"), "dominant"])
    assert pairs.loc[("good", "bad"), "share_dominates"] > 0.95
    assert pairs.loc[("good", "other"), "share_neither"] > 0.5
    shares = dominance[["share_dominates", "share_dominated", "share_neither"]].sum(axis=1)
    assert shares.tolist() == pytest.approx([1.0] * len(shares))
    volumes = tables["hypervolumes"].query("old == 'old'").set_index("label")
    assert (volumes["low"] < volumes["value"]).all()
    assert (volumes["value"] < volumes["uncorrected"]).all()
    assert volumes.loc["good", "low"] > volumes.loc["bad", "value"]
    assert set(volumes["scope"]) == {"methods"}
    assert pairs.loc[("good", "bad"), "hypervolume_low"] > 0


def test_less_divergence_is_better() -> None:
    tables = _tables(*_study())
    pairs = tables["dominance"].query("old == 'general_text'").set_index(["label", "other"])
    assert pairs.loc[("good", "bad"), "share_dominates"] > 0.95
    rows = tables["fronts"].query("old == 'general_text' and label == 'good'")
    assert rows["old_value"].tolist() == pytest.approx([0.11] * 4), "nats, lower is better"
    assert rows["on_front"].any()


def test_diverged_seed_takes_its_setting_out_of_the_front() -> None:
    items, runs, selection = _study()
    gone = (items["run"] == "other/seed2/lr0.2") & (items["step"] == 2)
    fronts = _tables(items[~gone], runs, selection)["fronts"]
    left = fronts[(fronts["label"] == "other") & (fronts["learning_rate"] == 0.2)]
    assert set(left["step"]) == {1}


def test_one_seed_shows_no_dominance() -> None:
    items, runs, selection = _study()
    items = items[items["run"].str.contains("seed0")]
    runs = runs[(runs["run"] == "base") | (runs["seed"] == 0)]
    tables = _tables(items, runs, selection[selection["seed"] == 0])
    assert tables["dominance"]["dominant"].isna().all()
    assert set(tables["dominance"]["scope"]) == {"models"}
    assert set(tables["hypervolumes"]["scope"]) == {"models"}
    assert (tables["hypervolumes"]["high"] >= tables["hypervolumes"]["low"]).all()


def test_study_without_selected_checkpoints_has_fronts() -> None:
    items, runs, selection = _study()
    tables = _tables(items, runs, selection.assign(step=math.nan))
    assert len(tables["fronts"]) == 24
    assert tables["dominance"].empty
