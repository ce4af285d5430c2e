"""Tests of the comparison at matched learning: interpolation, range, counts, intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from forgetting.analysis.matched_learning import compare_at_matched_learning, value_at_level
from forgetting.config.evaluation import SelectionConfig

RULE = SelectionConfig(probe="new", threshold=0.9)


def _curve(x: np.ndarray) -> np.ndarray:
    """Return old knowledge that falls fast at first."""
    values: np.ndarray = 0.9 - 0.5 * (1 - np.exp(-4 * x))
    return values


def test_interpolation_of_a_known_curve_is_nearly_unbiased() -> None:
    """The last evaluation before the level is up to .05 too high: an earlier, less damaged model.

    Between ten evaluations up to .25 apart, a chord lies at most .014 above this curve.
    """
    for shift in (0.0, 0.3, 0.7):
        steps = np.arange(12) + shift
        x = np.concatenate([[0.0], 1 / (1 + np.exp(-(steps - 5)))])
        for level in (0.3, 0.5, 0.7, 0.85):
            assert 0 <= value_at_level(x, _curve(x), level) - _curve(level) < 0.015
        before = x[np.argmax(x >= 0.5) - 1]
        assert _curve(before) > value_at_level(x, _curve(x), 0.5)


def test_value_at_level_uses_the_first_crossing_of_the_isotonic_curve() -> None:
    x = np.array([0.0, 0.3, 0.6, 0.4, 0.9])
    y = np.array([1.0, 0.8, 0.6, 0.5, 0.1])
    assert value_at_level(x, y, 0.0) == 1.0
    assert value_at_level(x, y, 0.15) == pytest.approx(0.9)
    assert value_at_level(x, y, 0.4) == pytest.approx(0.7)  # 0.6 and 0.4 are pooled at 0.5
    assert value_at_level(x, y, 0.7) == pytest.approx(0.3)
    assert math.isnan(value_at_level(x, y, 0.95)), "never reached: not the last value"


def test_a_wide_first_bracket_is_not_interpolated() -> None:
    y = np.array([1.0, 0.5, 0.4])
    assert math.isnan(value_at_level(np.array([0.0, 0.5, 0.9]), y, 0.3))
    assert value_at_level(np.array([0.0, 0.5, 0.9]), y, 0.7) == pytest.approx(0.45)
    assert value_at_level(np.array([0.0, 0.4, 0.9]), y, 0.3) == pytest.approx(0.625)


def _study(
    curves: dict[tuple[str, int], tuple[Sequence[float], Sequence[float]]],
    base: tuple[float, float] = (0.0, 0.9),
    items: int = 20,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return items and chosen runs whose every item has the value of its run's curve.

    Args:
        curves: new and old knowledge of a label and seed at steps 1, 2, ...
        base: both values of the base.
        items: of each probe.
    """
    points = [("base", 0, *base)]
    points += [
        (f"{label}/{seed}", step, x, y)
        for (label, seed), curve in curves.items()
        for step, (x, y) in enumerate(zip(*curve, strict=True), start=1)
    ]
    rows = [
        {"run": run, "step": step, "probe": probe, "item": f"{probe}{n}", "rougeL_recall": value}
        for run, step, *values in points
        for probe, value in zip(("new", "old"), values, strict=True)
        for n in range(items)
    ]
    chosen = [
        {"label": label, "seed": seed, "run": f"{label}/{seed}", "status": "ok", "end": math.nan}
        for label, seed in curves
    ]
    return pd.DataFrame(rows), pd.DataFrame(chosen)


X = (0.3, 0.6, 0.8, 0.95)
HIGH, LOW = (0.8, 0.7, 0.6, 0.5), (0.7, 0.5, 0.4, 0.2)


def _mean(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["level"].isna()].reset_index(drop=True)


def test_differences_and_values_of_known_curves() -> None:
    """Old knowledge is .9 - x / 2 with one method and .9 - x with the other, without noise."""
    curves = {
        (label, seed): (X, [0.9 - slope * x for x in X])
        for label, slope in (("a", 0.5), ("b", 1.0))
        for seed in range(2)
    }
    differences, values = compare_at_matched_learning(*_study(curves), RULE, ["old"])
    assert (differences["range_low"].iloc[0], differences["range_high"].iloc[0]) == (0.27, 0.9)
    levels = differences.dropna(subset=["level"])
    assert len(levels) == 12
    assert np.allclose(levels["difference"], levels["level"] / 2)
    row = _mean(differences).iloc[0]
    assert row["difference"] == pytest.approx((0.27 + 0.9) / 4)
    assert (row["scope"], row["seeds"], row["n"], row["clusters"]) == ("methods", 2, 20, 20)
    assert row["low"] < row["difference"] < row["high"]
    assert row["p"] == row["p_holm"] < 0.001
    assert levels["p"].notna().all()
    assert levels["p_holm"].isna().all()
    at_top = values[values["level"] == 0.9].set_index("label")
    assert at_top["value"].to_dict() == pytest.approx({"a": 0.45, "b": 0.0})
    assert (
        at_top[["seeds", "reached", "diverged", "missing"]].to_numpy().tolist()
        == [[2, 2, 0, 0]] * 2
    )


def test_a_run_that_never_reaches_a_level_is_counted_and_changes_nothing_above_the_range() -> None:
    """The range of all ends at its maximum; no method has a mean over its other seeds above it."""
    curves = {(label, seed): (X, y) for label, y in (("a", HIGH), ("b", LOW)) for seed in (0, 1)}
    curves["b", 2] = ((0.2, 0.5, 0.6, 0.6), (0.1, 0.05, 0.0, 0.0))
    curves["a", 2] = (X, HIGH)
    differences, values = compare_at_matched_learning(*_study(curves), RULE, ["old"])
    assert set(differences["range_high"]) == {0.6}
    above = differences["level"] > 0.6
    assert differences[above]["difference"].isna().all()
    assert differences[~above]["difference"].notna().all()
    assert (differences[above][["reached", "reached_other"]] == [3, 2]).all(axis=None)
    assert (differences[~above][["reached", "reached_other"]] == [3, 3]).all(axis=None)
    above = values["level"] > 0.6
    assert values[above][["value", "low", "high"]].isna().all(axis=None), "not np.nanmean"
    assert set(values[above & (values["label"] == "b")]["reached"]) == {2}
    at_top = values[(values["level"] == 0.6) & (values["label"] == "b")]
    assert at_top["value"].iloc[0] == pytest.approx((0.5 + 0.5 + 0.0) / 3)


def test_a_method_below_the_range_is_counted_and_not_compared() -> None:
    """Its fast seed alone does not represent it, and the others keep their range."""
    curves = {(label, 0): (X, y) for label, y in (("a", HIGH), ("b", LOW), ("c", LOW))}
    expected, _ = compare_at_matched_learning(*_study(curves), RULE, ["old"])
    curves |= {("slow", 0): (X, HIGH), ("slow", 1): ((0.0, 0.1, 0.1, 0.2), HIGH)}
    differences, values = compare_at_matched_learning(*_study(curves), RULE, ["old"])
    is_slow = differences["other"] == "slow"
    assert differences[is_slow]["difference"].isna().all()
    columns = ["label", "other", "difference", "low", "p_holm", "range_high"]
    rest = differences[~is_slow][columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(rest, expected[columns])
    of_slow = values[values["label"] == "slow"]
    assert of_slow["value"].isna().all()
    assert set(of_slow["reached"]) == {1}


def test_diverged_and_missing_runs_are_listed_apart() -> None:
    """They end no range. A run that diverges after the threshold is compared until there."""
    curves = {(label, seed): (X, y) for label, y in (("a", HIGH), ("b", LOW)) for seed in (0, 1)}
    curves |= {("a", 2): ((0.2, 0.3), (0.8, 0.7)), ("b", 2): (X, LOW)}
    items, chosen = _study(curves)
    chosen.loc[chosen["run"].isin(["a/2", "b/2"]), "status"] = "diverged"
    gone = {"label": "b", "seed": 3, "run": None, "status": None, "end": math.nan}
    chosen = pd.concat([chosen, pd.DataFrame([gone])], ignore_index=True)
    lost = items["run"].isin(["a/2"]) & (items["step"] == 2)
    items.loc[lost, "rougeL_recall"] = math.nan
    differences, values = compare_at_matched_learning(items, chosen, RULE, ["old"])
    assert set(differences["range_high"]) == {0.9}
    counts = _mean(values).set_index("label")[["seeds", "reached", "diverged", "missing"]]
    assert counts.loc["a"].tolist() == [2, 2, 1, 0]
    assert counts.loc["b"].tolist() == [3, 3, 0, 1]


def test_one_seed_compares_models_and_equal_methods_do_not_differ() -> None:
    curves = {(label, 0): (X, HIGH) for label in "ab"}
    row = _mean(compare_at_matched_learning(*_study(curves), RULE, ["old"])[0]).iloc[0]
    assert (row["difference"], row["scope"], row["p_holm"]) == (0, "models", 1)
    assert row["high"] == pytest.approx(stats.t.ppf(0.975, 19) / 20), "one item may change by 1"


def test_a_single_method_has_values_and_no_pairs() -> None:
    differences, values = compare_at_matched_learning(*_study({("a", 0): (X, HIGH)}), RULE, ["old"])
    assert differences.empty
    assert values["value"].notna().all()


def test_losses_are_lower_where_more_is_kept() -> None:
    items, chosen = _study({("a", 0): (X, LOW), ("b", 0): (X, HIGH)})
    text = items[items["probe"] == "old"].rename(columns={"rougeL_recall": "forgetting_kl"})
    items = pd.concat([items, text.assign(probe="general_text")])
    differences, _ = compare_at_matched_learning(items, chosen, RULE, ["old", "general_text"])
    better = differences.groupby(["probe", "metric"])["better"].first().to_dict()
    assert better == {
        ("old", "rougeL_recall"): "higher",
        ("general_text", "forgetting_kl"): "lower",
    }


@pytest.mark.parametrize(("base", "old"), [(0.95, ["old"]), (0.0, [])])
def test_nothing_is_compared_where_nothing_can_be_learnt_or_forgotten(
    base: float, old: list[str]
) -> None:
    curves = {(label, 0): (X, HIGH) for label in "ab"}
    differences, values = compare_at_matched_learning(*_study(curves, (base, 0.9)), RULE, old)
    assert differences.empty
    assert values.empty
    assert "range_high" in differences
    assert "reached" in values


def test_the_ends_of_cooldown_branches_are_one_trajectory() -> None:
    """An evaluation before the end of a branch is not of a finished model."""
    whole, chosen = _study({("a", 0): (X, HIGH), ("b", 0): (X, LOW)})
    expected, _ = compare_at_matched_learning(whole, chosen, RULE, ["old"])
    parts = [whole[~whole["run"].isin(["a/0"])]]
    of_a = whole[whole["run"] == "a/0"]
    branches = []
    for step in range(1, 5):
        parts.append(of_a[of_a["step"] == step].assign(run=f"a/0/{step}"))
        unfinished = of_a[of_a["step"] < step].assign(run=f"a/0/{step}", rougeL_recall=0.5)
        parts.append(unfinished)
        branches.append(chosen.iloc[0].to_dict() | {"run": f"a/0/{step}", "end": step})
    branched = pd.concat([pd.DataFrame(branches), chosen.iloc[1:]], ignore_index=True)
    differences, _ = compare_at_matched_learning(pd.concat(parts), branched, RULE, ["old"])
    pd.testing.assert_frame_equal(differences, expected)


def _simulated(
    random: np.random.Generator, drops: Sequence[float], seeds: int, run_sd: float, clusters: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a study of right-or-wrong items: 80 new ones, and 96 old ones in clusters.

    An item is right when a normal latent value is below a threshold. Of its variance .6 is the
    item's and its cluster's, .15 the method's, .25 the evaluation's. The old knowledge of a method
    is .9 - drop * sqrt(new knowledge), shifted by `run_sd` for a run.
    """
    cluster = np.arange(96) % clusters
    own = {
        "new": math.sqrt(0.6) * random.standard_normal(80),
        "old": math.sqrt(0.45) * random.standard_normal(96)
        + math.sqrt(0.15) * random.standard_normal(clusters)[cluster],
    }

    def rows(
        run: str, step: int, means: tuple[float, float], shared: dict[str, np.ndarray]
    ) -> list[tuple[object, ...]]:
        parts: list[tuple[object, ...]] = []
        for probe, mean in zip(("new", "old"), means, strict=True):
            noise = 0.5 * random.standard_normal(len(own[probe]))
            limit = stats.norm.ppf(min(max(mean, 0.01), 0.99))
            right = (own[probe] + shared[probe] + noise < limit).astype(float).tolist()
            groups = cluster.tolist() if probe == "old" else [math.nan] * len(right)
            parts += [
                (run, step, probe, item, value, group)
                for item, (value, group) in enumerate(zip(right, groups, strict=True))
            ]
        return parts

    def drawn() -> dict[str, np.ndarray]:
        return {probe: math.sqrt(0.15) * random.standard_normal(len(own[probe])) for probe in own}

    table = rows("base", 0, (0.02, 0.9), drawn())
    chosen = []
    for number, drop in enumerate(drops):
        method = drawn()
        for seed in range(seeds):
            run = f"m{number}/{seed}"
            shift, speed = run_sd * random.standard_normal(), random.uniform(0.8, 1.2)
            for step in range(1, 10):
                x = 0.02 + 0.96 / (1 + math.exp(-speed * (step - 4.5)))
                table += rows(run, step, (x, 0.9 - drop * math.sqrt(x) + shift), method)
            chosen.append({"label": f"m{number}", "seed": seed, "run": run, "status": "ok"})
    columns = ["run", "step", "probe", "item", "rougeL_recall", "cluster"]
    return pd.DataFrame(table, columns=columns), pd.DataFrame(chosen).assign(end=math.nan)


def _coverage(studies: int, seeds: int, run_sd: float) -> tuple[float, float]:
    """Return the share of intervals of the mean that hold the true difference, and their bias."""
    random = np.random.default_rng(seeds)
    held, errors = [], []
    for _ in range(studies):
        study = _simulated(random, (0.2, 0.3, 0.25), seeds, run_sd, 24)
        differences, _ = compare_at_matched_learning(*study, RULE, ["old"])
        row = _mean(differences).iloc[0]
        x = np.linspace(row["range_low"], row["range_high"], 101)
        true = 0.1 * np.trapezoid(np.sqrt(x), x) / (row["range_high"] - row["range_low"])
        held.append(row["low"] <= true <= row["high"])
        errors.append(row["difference"] - true)
    return float(np.mean(held)), float(np.mean(errors))


def test_interval_covers_the_true_difference() -> None:
    """12 studies of three seeds hold it in 10 or more: .95 less two standard errors."""
    coverage, bias = _coverage(12, 3, 0.045)
    assert coverage >= 0.8
    assert abs(bias) < 0.04


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "run_sd"), [(2, 0.045), (3, 0.09), (5, 0.02)])
def test_coverage_is_nominal(seeds: int, run_sd: float) -> None:
    """100 studies hold it within .06 of .95: .02, and two standard errors of the simulation."""
    coverage, bias = _coverage(100, seeds, run_sd)
    assert 0.89 <= coverage <= 1.0
    assert abs(bias) < 0.02
