"""Tests of the laws of forgetting, on data from the constants that the paper prints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from forgetting.analysis import laws
from forgetting.analysis.laws import law_points, law_tables, linear_rows
from forgetting.analysis.power_laws import (
    LAWS,
    PRODUCT,
    SUM_OF_POWERS,
    Grid,
    fit_laws,
    noise_sd,
    profile_rho,
    redrawn_fits,
)
from forgetting.config.evaluation import TEXT_PROBE

PARAMETERS_OF_RANK = 2_498_560
RANKS = (8, 16, 32, 64, 128, 256)
STEPS = range(50, 261, 10)

CONSTANTS: dict[str, dict[str, float]] = {
    "OpenOrca": {
        **{"slope": 1.7334, "intercept": 2.0481, "c": 0.0020, "s": 0.6126, "rho": 7.6885},
        **{"a": 7e3, "b": 72.9186, "alpha": 0.0424, "beta": 0.1219},
        **{"a_f": 3.88e5, "b_f": 23.6418, "alpha_f": 0.0351, "beta_f": 0.1468},
    },
    "News": {
        **{"slope": 1.0615, "intercept": 3.1285, "c": 0.0028, "s": 1.9253, "rho": 7.5996},
        **{"a": 2.2e4, "b": 54.8678, "alpha": 0.0383, "beta": 0.1161},
        **{"a_f": 1.1e4, "b_f": 97.8466, "alpha_f": 0.0458, "beta_f": 0.1044},
    },
}
NOISE = {"OpenOrca": (0.0031, 0.0087), "News": (0.0029, 0.0061)}
CORRELATION = 0.8


def _true_values(name: str, parameters: Any, steps: Any, c_factor: float = 1.0) -> np.ndarray:
    """Return loss and forgetting by the paper's formulas, in two columns.

    The gauge `c_factor` multiplies c and divides what it multiplies by the same.
    """
    k = CONSTANTS[name]
    stretch = c_factor ** (-1 / k["rho"])

    def total(suffix: str) -> Any:
        alpha, beta = k[f"alpha{suffix}"], k[f"beta{suffix}"]
        a, b = k[f"a{suffix}"] * stretch ** (1 / alpha), k[f"b{suffix}"] * stretch ** (1 / beta)
        power: Any = ((a / parameters) ** alpha + (b / steps) ** beta) ** k["rho"]
        return c_factor * k["c"] * power + k["s"]

    return np.stack([total(""), k["intercept"] - k["slope"] * total("_f")], axis=-1)


def _points(
    name: str,
    seeds: int = 1,
    noise: tuple[float, float] = (0.0, 0.0),
    draw: int = 0,
    steps: Iterable[int] = STEPS,
    ranks: Iterable[int] = RANKS,
    **options: float,
) -> pd.DataFrame:
    """Return the points of a study whose noise is correlated along each run."""
    rng = np.random.default_rng(draw)
    at = np.array(steps)
    tables = []
    for rank in ranks:
        for seed in range(seeds):
            values = _true_values(name, PARAMETERS_OF_RANK * rank, at, **options)
            error = rng.normal(size=(len(at), 2))
            for step in range(1, len(at)):
                fresh = np.sqrt(1 - CORRELATION**2) * error[step]
                error[step] = CORRELATION * error[step - 1] + fresh
            table = pd.DataFrame(values + error * noise, columns=["loss", "forgetting"])
            tables.append(
                table.assign(
                    run=f"r{rank}/seed{seed}",
                    rank=rank,
                    seed=seed,
                    trainable_parameters=PARAMETERS_OF_RANK * rank,
                    learning_rate=1e-4,
                    step=at,
                )
            )
    return pd.concat(tables, ignore_index=True)


def _middle(name: str) -> dict[str, dict[str, float]]:
    """Return level, slopes and asymptotes at the geometric middle by numerical derivatives."""
    p, n, h = PARAMETERS_OF_RANK * np.sqrt(8 * 256), np.sqrt(50 * 260), 1e-4

    def at(log_p: float = 0.0, log_n: float = 0.0) -> np.ndarray:
        return _true_values(name, p * np.exp(log_p), n * np.exp(log_n))

    quantities = {
        "level": at(),
        "slope_parameters": (at(log_p=h) - at(log_p=-h)) / (2 * h),
        "slope_steps": (at(log_n=h) - at(log_n=-h)) / (2 * h),
        "asymptote": _true_values(name, np.inf, np.inf),
    }
    return {
        outcome: {quantity: float(value[i]) for quantity, value in quantities.items()}
        for i, outcome in enumerate(("loss", "forgetting"))
    }


def _fit_inputs(points: pd.DataFrame) -> tuple[Grid, np.ndarray]:
    grid = Grid.of(points["trainable_parameters"].to_numpy(float), points["step"].to_numpy(float))
    return grid, points[["loss", "forgetting"]].to_numpy()


@pytest.mark.parametrize("name", CONSTANTS)
def test_fit_without_noise_gives_the_papers_laws_back(name: str) -> None:
    points = _points(name)
    fit = fit_laws(SUM_OF_POWERS, *_fit_inputs(points))
    for law, expected in zip(fit.laws, _middle(name).values(), strict=True):
        assert law.summary() == pytest.approx(expected, rel=1e-4)
        assert law.at_bound() == []
    steps = np.array([260.0, 520.0, 5000.0])
    parameters = np.full(3, 512.0 * PARAMETERS_OF_RANK)
    grid = Grid.of(parameters, steps, _fit_inputs(points)[0].reference)
    assert fit.predict(grid) == pytest.approx(_true_values(name, parameters, steps), rel=1e-4)
    assert fit.laws[0].constants()["rho"] == pytest.approx(CONSTANTS[name]["rho"], rel=1e-3)


def test_another_gauge_of_the_constants_gives_equal_laws() -> None:
    first, second = (
        fit_laws(SUM_OF_POWERS, *_fit_inputs(_points("News", c_factor=factor)))
        for factor in (1.0, 3.0)
    )
    for law, other in zip(first.laws, second.laws, strict=True):
        assert other.summary() == pytest.approx(law.summary(), rel=1e-6)


def test_slopes_of_a_curve_are_its_derivatives() -> None:
    """`least_squares` gets the right direction: a wrong derivative gives other minima."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 20))
    for form in (SUM_OF_POWERS, PRODUCT):
        theta = np.array([0.3, -1.0, -1.5, 1.2][: len(form.names)])
        _, slopes = form.log_value(theta, x, y)
        for number in range(len(theta)):
            step = 1e-6 * np.eye(len(theta))[number]
            above, below = (form.log_value(theta + sign * step, x, y)[0] for sign in (1, -1))
            assert slopes[:, number] == pytest.approx((above - below) / 2e-6, rel=1e-5, abs=1e-8)


def test_rho_of_one_is_excluded_and_large_rho_is_not() -> None:
    points = _points("OpenOrca", noise=NOISE["OpenOrca"], draw=1)
    grid, values = _fit_inputs(points)
    fit = fit_laws(SUM_OF_POWERS, grid, values)
    noise = noise_sd(values, fit.predict(grid), 6)
    one, eight, sixteen = profile_rho(fit, grid, values, noise, np.array([1.0, 8.0, 16.0]))
    assert one > 20
    assert max(eight, sixteen) < one / 4


def _linear(points: pd.DataFrame) -> dict[str, dict[str, Any]]:
    return {str(row["quantity"]): row for row in linear_rows(points)}


@pytest.mark.parametrize("seeds", [1, 3])
def test_noise_in_the_loss_flattens_least_squares_alone(seeds: int) -> None:
    truth = _linear(_points("OpenOrca"))["slope_ols"]["estimate"]
    noise = (4 * NOISE["OpenOrca"][0], NOISE["OpenOrca"][1])
    studies = [
        _linear(_points("OpenOrca", seeds, noise, draw)) for draw in range(40 if seeds == 1 else 15)
    ]
    mean = {
        name: np.mean([study[name]["estimate"] for study in studies])
        for name in ("slope", "slope_ols")
    }
    assert mean["slope"] == pytest.approx(truth, rel=0.05)
    assert mean["slope_ols"] > 0.9 * truth
    held = [study["slope"]["low"] <= truth <= study["slope"]["high"] for study in studies]
    assert np.mean(held) >= 0.88


def test_linear_law_without_noise() -> None:
    points = _points("OpenOrca", noise=(0.0, 0.0))
    points["forgetting"] = 2.0 - 1.5 * points["loss"]
    rows = _linear(points)
    for quantity, expected in {"slope": -1.5, "intercept": 2.0, "slope_ols": -1.5}.items():
        row = rows[quantity]
        assert [row["estimate"], row["low"], row["high"]] == pytest.approx([expected] * 3)
    assert rows["r2"]["estimate"] == pytest.approx(1.0)


def test_linear_law_of_few_runs_has_no_interval_and_says_why() -> None:
    row = _linear(_points("News", ranks=(8, 16, 32)))["slope"]
    assert np.isnan(row["low"])
    assert row["note"] == "interval needs 6 runs, there are 3"


def _coverage(name: str, studies: int, draws: int, steps: Iterable[int]) -> dict[str, float]:
    """Return the share of studies with three seeds whose intervals hold the truth."""
    held: dict[str, list[bool]] = {}
    truth = _middle(name)
    for draw in range(studies):
        points = _points(name, 3, NOISE[name], draw, steps)
        grid, values = _fit_inputs(points)
        fit = fit_laws(SUM_OF_POWERS, grid, values, starts=3)
        runs, at = points["run"].to_numpy(), points["step"].to_numpy(float)
        refits = redrawn_fits(fit, grid, values, runs, at, draws)
        for number, outcome in enumerate(truth):
            drawn = pd.DataFrame([each.laws[number].summary() for each in refits])
            low, high = drawn.quantile(0.025), drawn.quantile(0.975)
            for quantity in ("level", "slope_parameters", "slope_steps"):
                inside = low[quantity] <= truth[outcome][quantity] <= high[quantity]
                held.setdefault(f"{outcome} {quantity}", []).append(bool(inside))
    return {quantity: float(np.mean(each)) for quantity, each in held.items()}


def test_intervals_of_three_seeds_cover_level_and_slopes() -> None:
    """Six quantities of five studies: the mean is about .93; over points it would be about .5."""
    coverage = _coverage("OpenOrca", studies=5, draws=40, steps=range(50, 261, 42))
    assert np.mean(list(coverage.values())) >= 0.78


@pytest.mark.slow
@pytest.mark.parametrize("name", CONSTANTS)
def test_intervals_of_three_seeds_cover_in_many_studies(name: str) -> None:
    """They cover .90 to .97 of 60 studies; a standard error of one quantity is .04."""
    coverage = _coverage(name, studies=60, draws=80, steps=range(50, 261, 30))
    assert {quantity: each for quantity, each in coverage.items() if each < 0.82} == {}
    assert np.mean(list(coverage.values())) >= 0.88


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laws, "DRAWS", 20)


@pytest.mark.usefixtures("few_draws")
def test_tables_of_three_seeds() -> None:
    points = _points("OpenOrca", 3, NOISE["OpenOrca"], steps=range(10, 261, 25), ranks=(8, 32, 256))
    tables, notes = law_tables(points)
    assert notes == []
    assert {name: list(table) for name, table in tables.items()} == laws.LAW_COLUMNS
    power = tables["law_power"].set_index(["outcome", "quantity"])
    for outcome, quantities in _middle("OpenOrca").items():
        row = power.loc[(outcome, "level")]
        assert row["low"] < row["estimate"] < row["high"]
        assert row["estimate"] == pytest.approx(quantities["level"], abs=0.01)
        assert row["note"] == ""
    assert power.loc[("both", "rho"), "note"].startswith("not identifiable")
    # Step 10 and 35 lie before the first 50 of 260.
    assert power.loc[("both", "reference_steps"), "estimate"] == pytest.approx(np.sqrt(60 * 260))
    predictions = tables["law_predictions"]
    assert set(predictions["rank"]) == {8, 32, 256}
    assert predictions["step"].max() == 520
    assert (predictions["extrapolated"] == (predictions["step"] > 260)).all()
    assert (predictions["low"] < predictions["high"]).all()


def test_short_runs_different_rates_and_impossible_values_are_said() -> None:
    points = _points("News", ranks=(8, 32, 128, 256), steps=range(50, 261, 30))
    points["loss"] -= 2.03
    points.loc[points["rank"] == 32, "learning_rate"] = 2e-4
    points = points[(points["rank"] < 256) | (points["step"] < 150)]
    points = points[(points["rank"] != 128) | (points["step"] < 250)]
    tables, notes = law_tables(points)
    assert notes == [
        "Too few evaluations for the laws of forgetting: r256/seed0.",
        "The laws of forgetting are over runs of different learning rates.",
    ]
    power = tables["law_power"].set_index(["outcome", "quantity"])["note"]
    assert "below 0, which no cross-entropy is" in power["loss", "asymptote"]
    assert "below 0" not in power["forgetting", "asymptote"]
    predictions = tables["law_predictions"]
    after = predictions["step"] > np.where(predictions["rank"] == 128, 230, 260)
    assert (predictions["extrapolated"] == after).all()
    negative = predictions["estimate"] < 0
    assert negative.any()
    assert (predictions["note"].str.startswith("below 0") == negative).all()


def test_two_seeds_of_a_rank_give_no_interval_and_say_why() -> None:
    points = _points("News", 3, NOISE["News"], steps=range(50, 261, 42), ranks=(8, 32, 256))
    points = points[points["run"] != "r32/seed1"]
    tables, _ = law_tables(points)
    power = tables["law_power"]
    power = power[~power["quantity"].str.startswith("reference_")]
    for table in (power, tables["law_predictions"]):
        assert table[["low", "high"]].isna().all(axis=None)
        assert table["note"].str.endswith("needs 3 seeds of every rank, rank 32 has 2").all()
    linear = tables["law_linear"].set_index("quantity")
    assert linear.loc["slope", "low"] < linear.loc["slope", "high"]


def test_comparison_prefers_the_true_law_and_a_product_to_logarithms() -> None:
    points = _points("OpenOrca", 1, NOISE["OpenOrca"], draw=2)
    table = law_tables(points)[0]["law_comparison"]
    assert (table["r2"] > 0.9).all()
    errors = table.set_index(["outcome", "law"])[["leave_one_rank_out", "last_steps"]]
    logarithms, product, powers = LAWS
    for column in errors:
        for outcome in laws.OUTCOMES:
            assert (
                errors.loc[(outcome, logarithms), column] > errors.loc[(outcome, product), column]
            )
            assert errors.loc[(outcome, logarithms), column] > errors.loc[(outcome, powers), column]


def test_comparison_of_exact_data_has_no_error_for_the_true_law() -> None:
    points = _points("News", steps=range(50, 261, 30))
    table = law_tables(points)[0]["law_comparison"].set_index(["outcome", "law"])
    powers = list(LAWS)[-1]
    columns = ["leave_one_rank_out", "largest_rank", "last_steps"]
    for outcome in laws.OUTCOMES:
        assert table.loc[(outcome, powers), columns].max() < 1e-4


def test_three_ranks_hold_out_none_and_say_so() -> None:
    tables, _ = law_tables(_points("News", ranks=(8, 32, 128), steps=range(50, 261, 30)))
    table = tables["law_comparison"]
    assert table[["leave_one_rank_out", "largest_rank"]].isna().all(axis=None)
    assert table["last_steps"].notna().all()
    assert table["note"].eq("a rank is held out only of 4 ranks or more").all()


def test_too_few_ranks_or_evaluations_give_empty_tables_and_a_note() -> None:
    for points in (_points("News", ranks=(8, 16)), _points("News", steps=range(50, 261, 60))):
        tables, notes = law_tables(points)
        assert all(table.empty for table in tables.values())
        assert list(tables["law_power"]) == laws.LAW_COLUMNS["law_power"]
        assert len(notes) == 1
        assert "need 3 ranks whose chosen runs have 5 evaluations" in notes[0]


def test_forgetting_that_never_changes_follows_no_law() -> None:
    tables, notes = law_tables(_points("News").assign(forgetting=0.5))
    assert all(table.empty for table in tables.values())
    assert notes == ["No law of forgetting is fitted: forgetting never changes."]


def test_points_that_are_double_or_not_finite_are_refused() -> None:
    points = _points("News")
    with pytest.raises(ValueError, match="occur twice"):
        law_tables(pd.concat([points, points.iloc[:1]]))
    points.loc[3, "loss"] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        law_tables(points)


def test_loss_of_a_probe_is_the_mean_over_tokens_of_the_chosen_runs() -> None:
    def item(run: str, step: int, probe: str, number: int, **scores: float) -> dict[str, Any]:
        return {"run": run, "step": step, "probe": probe, "item": f"{probe}/{number}", **scores}

    items = pd.DataFrame(
        [
            item("base", 0, "new", 0, reference_tokens=3, logprob_answer=-5.0),
            item("base", 0, "new", 1, reference_tokens=1, logprob_answer=-4.0),
            item("base", 0, TEXT_PROBE, 0, forgetting_ce_hard=0.1),
            item("a", 10, "new", 0, logprob_answer=-1.0),
            item("a", 10, "new", 1, logprob_answer=-4.0),
            item("a", 10, "old", 0, logprob_answer=-9.0),
            item("a", 10, TEXT_PROBE, 0, forgetting_ce_hard=0.2),
            item("a", 10, TEXT_PROBE, 1, forgetting_ce_hard=0.4),
            item("a", 20, "new", 0, logprob_answer=np.nan),
            item("a", 20, "new", 1, logprob_answer=-4.0),
            item("a", 20, TEXT_PROBE, 0, forgetting_ce_hard=0.2),
            item("b", 10, "new", 0, logprob_answer=-1.0),
            item("b", 10, TEXT_PROBE, 0, forgetting_ce_hard=0.2),
        ]
    )
    runs = pd.DataFrame(
        {
            "run": ["base", "a", "b"],
            "method": ["base", "lora-r8", "lora-r8"],
            "rank": pd.array([None, 8, 8], dtype="Int64"),
            "seed": pd.array([None, 1, 1], dtype="Int64"),
            "trainable_parameters": pd.array([None, 100, 100], dtype="Int64"),
            "learning_rate": [np.nan, 1e-3, 2e-3],
            "chosen": [False, True, False],
            "status": "ok",
        }
    )
    assert law_tables(law_points(items, runs, ["lora-r2"], "new"))[1][0].endswith("0 have them.")
    points = law_points(items, runs, ["lora-r8"], "new")
    # Answers of 3 + 1 and 1 + 1 tokens.
    assert points.to_dict("records") == [
        {"run": "a", "rank": 8, "seed": 1, "trainable_parameters": 100}
        | {"learning_rate": 1e-3, "step": 10}
        | {"loss": pytest.approx((4 * 1.0 + 2 * 4.0) / 6), "forgetting": pytest.approx(0.3)}
    ]
