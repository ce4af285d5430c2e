"""Laws of forgetting over the ranks of one kind of adapter (Kalajdzievski 2024, arXiv 2401.05605).

The linear law says that forgetting rises by a fixed amount for every nat of fine-tuning loss that
is gained, at any rank and step. The power laws say how both depend on the trained parameters P and
the steps N. The points of one run are not independent, so every interval is computed over runs.

The loss is that of the probe of new knowledge: the mean -log p of the answers' tokens, the end of
the sequence included, in evaluation mode. If the probe asks for what is trained on, as TOFU does,
it is the loss on training rows. Forgetting is the cross-entropy against the base model's top token
on the general text. Both are in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import stats

from forgetting.analysis.power_laws import (
    LAWS,
    MAX_RHO,
    SUM_OF_POWERS,
    Array,
    Fit,
    Grid,
    Predictor,
    fit_laws,
    noise_sd,
    profile_rho,
    redrawn_fits,
)
from forgetting.config.evaluation import TEXT_PROBE
from forgetting.config.expand import MIN_LAW_RANKS

OUTCOMES = ("loss", "forgetting")

FIRST_SHARE = 50 / 260
"""Share of the longest run that is left out, since the laws do not hold at its start.

The paper leaves out 50 of 260 steps.
"""

LAST_SHARE = 200 / 260
"""Share of the longest run after which points are predicted from the earlier ones."""

MIN_EVALUATIONS = 5
MIN_SEEDS = 3
"""Seeds of every rank that intervals of the power laws need: with one they cover .72 to .88."""

MIN_RUNS_LINEAR = 6
MIN_RANKS_HELD_OUT = 4
MIN_EARLY_STEPS = 3

DRAWS = 400
PREDICTED_STEPS = 12
PROFILE = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, MAX_RHO)

IMPOSSIBLE = "below 0, which no cross-entropy is: the law does not hold here"
NOT_IDENTIFIABLE = "not identifiable: other values fit as well"

LAW_COLUMNS = {
    "law_linear": ["quantity", "estimate", "low", "high", "runs", "note"],
    "law_power": ["outcome", "quantity", "estimate", "low", "high", "runs", "seeds", "note"],
    "law_comparison": [
        *("outcome", "law", "constants", "leave_one_rank_out", "largest_rank", "last_steps"),
        *("r2", "aic", "note"),
    ],
    "law_predictions": [
        *("outcome", "rank", "trainable_parameters", "step", "extrapolated"),
        *("estimate", "low", "high", "note"),
    ],
    "law_profile": ["rho", "chi_square"],
}
"""The tables of the laws, with their columns."""


def law_points(
    items: pd.DataFrame, runs: pd.DataFrame, methods: Iterable[str], probe: str
) -> pd.DataFrame:
    """Return loss and forgetting of the chosen runs at every evaluation where both are finite.

    Args:
        items: the items of the base model and of all runs; reference_tokens, the length of each
            answer without the end of the sequence, is that of the base model's.
        runs: the table of runs.
        methods: names of the methods, one for each rank.
        probe: the probe whose answers' loss is taken.

    Returns:
        run, rank, seed, trainable_parameters, learning_rate, step, loss, forgetting.
    """
    chosen = runs[runs["chosen"] & (runs["status"] == "ok") & runs["method"].isin(list(methods))]
    columns = ["run", "rank", "seed", "trainable_parameters", "learning_rate"]
    answers = items[items["probe"] == probe]
    lengths = answers[answers["run"] == "base"].set_index("item")["reference_tokens"] + 1.0
    tokens = answers["item"].map(lengths)
    sums = pd.DataFrame({"loss": -answers["logprob_answer"] * tokens, "tokens": tokens})
    totals = sums.groupby([answers["run"], answers["step"]]).sum(skipna=False)
    text = items[items["probe"] == TEXT_PROBE]
    forgetting = text.groupby(["run", "step"])["forgetting_ce_hard"].mean()
    both = pd.DataFrame({"loss": totals["loss"] / totals["tokens"], "forgetting": forgetting})
    points = (
        both.replace([np.inf, -np.inf], np.nan)
        .dropna()
        .reset_index()
        .merge(chosen[columns], on="run")
    )
    return points[[*columns, "step", *OUTCOMES]].astype(
        dict.fromkeys(["rank", "seed", "trainable_parameters"], "int64")
    )


def usable_points(points: pd.DataFrame) -> pd.DataFrame:
    """Return the points after the start, of runs that have enough of them."""
    late = points[points["step"] >= FIRST_SHARE * points["step"].max()]
    counts = late.groupby("run")["step"].transform("size")
    return late[counts >= MIN_EVALUATIONS].sort_values(["rank", "seed", "run", "step"])


def law_tables(points: pd.DataFrame) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Return the tables of the laws, and notes on what they cannot say.

    Args:
        points: run, rank, seed, trainable_parameters, learning_rate, step (at least 1), loss and
            forgetting.

    Returns:
        The tables of `LAW_COLUMNS`, without rows if there are too few points. `law_linear` is the
        linear law. `law_power` has level, slopes, asymptote and constants of the power laws.
        `law_comparison` has the errors of predictions, and those of simpler laws.
        `law_predictions` has the predictions of the power laws on a grid of ranks and steps, to
        twice the last step. `law_profile` has the growth of chi-square at fixed rho.

    Raises:
        ValueError: a run and step occur twice, or a value is not finite.
    """
    if points.duplicated(["run", "step"]).any():
        raise ValueError("a run and step occur twice")
    if not np.isfinite(points[[*OUTCOMES, "trainable_parameters", "step"]].to_numpy(float)).all():
        raise ValueError("a loss, forgetting, step or number of parameters is not finite")
    used = usable_points(points)
    if note := _why_no_law(used):
        return {name: _table(name, []) for name in LAW_COLUMNS}, [note]
    notes = []
    if left_out := sorted(set(points["run"]) - set(used["run"])):
        notes.append(f"Too few evaluations for the laws of forgetting: {', '.join(left_out)}.")
    if used["learning_rate"].nunique() > 1:
        notes.append("The laws of forgetting are over runs of different learning rates.")
    data = _Data(used)
    power = data.power_fits()
    rows = {
        "law_linear": linear_rows(used),
        "law_power": _power_rows(data, power),
        "law_comparison": _comparison_rows(data),
        "law_predictions": _prediction_rows(data, power),
        "law_profile": _profile_rows(data, power[0]),
    }
    return {name: _table(name, rows[name]) for name in LAW_COLUMNS}, notes


def _why_no_law(points: pd.DataFrame) -> str:
    """Return a note on what points lack for a law, empty if nothing."""
    ranks = points["trainable_parameters"].nunique()
    if ranks < MIN_LAW_RANKS:
        return (
            f"The laws of forgetting need {MIN_LAW_RANKS} ranks whose chosen runs have "
            f"{MIN_EVALUATIONS} evaluations after the first {FIRST_SHARE:.0%} of the steps; "
            f"{ranks} have them."
        )
    constant = [outcome for outcome in OUTCOMES if points[outcome].nunique() == 1]
    return (
        f"No law of forgetting is fitted: {' and '.join(constant)} never changes."
        if constant
        else ""
    )


def _table(name: str, rows: list[dict[str, object]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=LAW_COLUMNS[name])


def linear_rows(points: pd.DataFrame) -> list[dict[str, object]]:
    """Return slope and intercept of forgetting against loss, with intervals by a jackknife of runs.

    Noise in the loss flattens the slope of least squares. `slope` is that of the loss's smooth part
    instead: the loss is regressed on ln P, ln N and their squares, and its fitted values are the
    instrument. `slope_ols` and `r2` are least squares'.
    """
    runs = points["run"].to_numpy()
    columns = points[["trainable_parameters", "step", *OUTCOMES]].to_numpy(float)
    count = len(set(runs))
    estimates = _linear_law(columns)
    low, high, note = {}, {}, f"interval needs {MIN_RUNS_LINEAR} runs, there are {count}"
    if count >= MIN_RUNS_LINEAR:
        note = ""
        left_out = pd.DataFrame([_linear_law(columns[runs != run]) for run in np.unique(runs)])
        variance = (count - 1) / count * ((left_out - left_out.mean()) ** 2).sum()
        half = stats.t.ppf(0.975, count - 1) * np.sqrt(variance)
        low = {name: estimates[name] - half[name] for name in estimates}
        high = {name: estimates[name] + half[name] for name in estimates}
    return [
        {
            "quantity": name,
            "estimate": estimate,
            "low": math.nan if name == "r2" else low.get(name, math.nan),
            "high": math.nan if name == "r2" else high.get(name, math.nan),
            "runs": count,
            "note": "says little: it is high for wrong laws too" if name == "r2" else note,
        }
        for name, estimate in estimates.items()
    ]


def _linear_law(columns: Array) -> dict[str, float]:
    """Return the estimates of the linear law from parameters, steps, loss and forgetting."""
    x, y = np.log(columns[:, 0]), np.log(columns[:, 1])
    x, y = x - x.mean(), y - y.mean()
    loss, forgetting = columns[:, 2], columns[:, 3]
    design = np.column_stack([np.ones_like(x), x, y, x**2, y**2])
    smooth = design @ np.linalg.lstsq(design, loss, rcond=None)[0]
    smooth -= smooth.mean()
    slope = float(smooth @ forgetting / (smooth @ loss))
    ols = stats.linregress(loss, forgetting)
    return {
        "slope": slope,
        "intercept": float(forgetting.mean() - slope * loss.mean()),
        "slope_ols": float(ols.slope),
        "r2": float(ols.rvalue**2),
    }


class _Data:
    """The points as arrays, and what their intervals may be."""

    def __init__(self, points: pd.DataFrame) -> None:
        self.runs = points["run"].to_numpy()
        self.parameters = points["trainable_parameters"].to_numpy(float)
        self.steps = points["step"].to_numpy(float)
        self.values = points[[*OUTCOMES]].to_numpy(float)
        self.grid = Grid.of(self.parameters, self.steps)
        self.ranks = points.drop_duplicates("trainable_parameters").set_index(
            "trainable_parameters"
        )["rank"]
        self.last_steps = points.groupby("trainable_parameters")["step"].max()
        self.run_count = points["run"].nunique()
        seeds = points.groupby("rank")["run"].nunique()
        self.seeds = int(seeds.min())
        self.has_intervals = self.seeds >= MIN_SEEDS
        self.note = (
            ""
            if self.has_intervals
            else f"interval needs {MIN_SEEDS} seeds of every rank, rank {seeds.idxmin()} has "
            f"{self.seeds}"
        )

    def power_fits(self) -> list[Fit]:
        """Return the fit of the power laws, then those to redrawn data, if there are seeds."""
        fit = fit_laws(SUM_OF_POWERS, self.grid, self.values)
        if not self.has_intervals:
            return [fit]
        return [fit, *redrawn_fits(fit, self.grid, self.values, self.runs, self.steps, DRAWS)]

    def interval(self, draws: list[float]) -> dict[str, float]:
        """Return the 95 % interval of a quantity from its values in redrawn data."""
        if not self.has_intervals:
            return {"low": math.nan, "high": math.nan}
        low, high = np.quantile(draws, [0.025, 0.975])
        return {"low": float(low), "high": float(high)}


def _power_rows(data: _Data, fits: list[Fit]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []

    def add(outcome: str, quantity: str, draws: list[float], *notes: str) -> None:
        row = {"outcome": outcome, "quantity": quantity, "estimate": draws[0]}
        row |= data.interval(draws[1:]) | {"runs": data.run_count, "seeds": data.seeds}
        rows.append(row | {"note": "; ".join(note for note in (*notes, data.note) if note)})

    for number, outcome in enumerate(OUTCOMES):
        laws = [fit.laws[number] for fit in fits]
        at_bound = laws[0].at_bound()
        summaries, constants = [law.summary() for law in laws], [law.constants() for law in laws]
        for name in summaries[0]:
            notes = _asymptote_notes(summaries[0][name], at_bound) if name == "asymptote" else []
            add(outcome, name, [each[name] for each in summaries], *notes)
        for name in constants[0]:
            bound = "at its bound" if name in at_bound else ""
            if name != "rho":
                add(outcome, name, [each[name] for each in constants], NOT_IDENTIFIABLE, bound)
            elif number == 0:
                add("both", name, [each[name] for each in constants], NOT_IDENTIFIABLE, bound)
    for name, value in zip(("parameters", "steps"), data.grid.reference, strict=True):
        row = {"outcome": "both", "quantity": f"reference_{name}", "estimate": value}
        row |= {"low": math.nan, "high": math.nan, "runs": data.run_count, "seeds": data.seeds}
        rows.append(row | {"note": "where level and slopes are given"})
    return rows


def _asymptote_notes(value: float, at_bound: list[str]) -> list[str]:
    notes = [f"not determined: {' and '.join(at_bound)} at a bound"] if at_bound else []
    return [*notes, IMPOSSIBLE] if value < 0 else notes


def _prediction_rows(data: _Data, fits: list[Fit]) -> list[dict[str, object]]:
    last = data.steps.max()
    steps = np.unique(np.geomspace(data.steps.min(), 2 * last, PREDICTED_STEPS).round())
    steps = np.unique([*steps, last])
    parameters, at = (each.ravel() for each in np.meshgrid(data.ranks.index, steps))
    grid = Grid.of(parameters.astype(float), at, data.grid.reference)
    drawn = np.stack([fit.predict(grid) for fit in fits])
    return [
        {
            "outcome": outcome,
            "rank": data.ranks[count],
            "trainable_parameters": count,
            "step": int(step),
            "extrapolated": bool(step > data.last_steps[count]),
            "estimate": float(drawn[0, point, number]),
            **data.interval(list(drawn[1:, point, number])),
            "note": "; ".join(
                note
                for note in (IMPOSSIBLE if drawn[0, point, number] < 0 else "", data.note)
                if note
            ),
        }
        for number, outcome in enumerate(OUTCOMES)
        for point, (count, step) in enumerate(zip(parameters, at, strict=True))
    ]


def _profile_rows(data: _Data, fit: Fit) -> list[dict[str, object]]:
    noise = noise_sd(data.values, fit.predict(data.grid), len(SUM_OF_POWERS.names) + 2)
    grown = profile_rho(fit, data.grid, data.values, noise, np.array(PROFILE))
    return [
        {"rho": rho, "chi_square": float(each)} for rho, each in zip(PROFILE, grown, strict=True)
    ]


def _comparison_rows(data: _Data) -> list[dict[str, object]]:
    """Return the errors of each law; each outcome is fitted alone."""
    counts = np.unique(data.parameters)
    each_rank = [data.parameters == count for count in counts]
    last = data.steps > LAST_SHARE * data.steps.max()
    notes = []
    if len(counts) < MIN_RANKS_HELD_OUT:
        notes.append(f"a rank is held out only of {MIN_RANKS_HELD_OUT} ranks or more")
    # Two steps of what is left determine no curve.
    late = [last] if len(np.unique(data.steps[~last])) >= MIN_EARLY_STEPS else []
    if not late:
        notes.append(f"fewer than {MIN_EARLY_STEPS} steps before the last ones")
    rows: list[dict[str, object]] = []
    for number, outcome in enumerate(OUTCOMES):
        values = data.values[:, number]
        for law, (constants, predict) in LAWS.items():
            fitted = predict(data.grid, values, data.grid)
            squares = max(float(((values - fitted) ** 2).sum()), 1e-300)
            by_rank = [] if len(counts) < MIN_RANKS_HELD_OUT else each_rank
            errors = [_held_out(data, values, predict, held) for held in by_rank]
            rows.append(
                {
                    "outcome": outcome,
                    "law": law,
                    "constants": constants,
                    "leave_one_rank_out": _root_mean(errors),
                    "largest_rank": _root_mean(errors[-1:]),
                    "last_steps": _root_mean(
                        [_held_out(data, values, predict, held) for held in late]
                    ),
                    "r2": 1 - squares / float(((values - values.mean()) ** 2).sum()),
                    "aic": len(values) * math.log(squares / len(values)) + 2 * constants,
                    "note": "; ".join(notes),
                }
            )
    return rows


def _held_out(data: _Data, values: Array, predict: Predictor, held: Array) -> Array:
    """Return the errors at some points of the law that is fitted to the others."""
    known, wanted = (
        Grid(data.grid.x[part], data.grid.y[part], data.grid.reference) for part in (~held, held)
    )
    errors: Array = predict(known, values[~held], wanted) - values[held]
    return errors


def _root_mean(errors: list[Array]) -> float:
    return float(np.sqrt(np.mean(np.concatenate(errors) ** 2))) if errors else math.nan
