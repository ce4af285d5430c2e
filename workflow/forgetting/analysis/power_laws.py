"""Shifted power laws in trained parameters and steps, and their fit (Kalajdzievski 2024).

The paper's law of a loss is c ((a/P)^alpha + (b/N)^beta)^rho + s, with P trained parameters and N
steps. Its constants a, b and c are not identifiable: with c k^-rho, a k^(1/alpha) and b k^(1/beta)
every prediction is the same. So the law is fitted in the form

    s + K (w (P/P0)^-alpha + (1 - w) (N/N0)^-beta)^rho

where P0 and N0 are the geometric middle of the data. Even in this form alpha, beta, w and rho are
hardly identifiable. The level s + K, the slopes at the reference and the predictions are.

K and s are linear, so they are solved exactly for given other constants, and the rest is scipy's
`least_squares` on logarithms within bounds (variable projection, with the Jacobian of Kaufman 1975,
BIT 15:49). `scipy.optimize.curve_fit` would give a covariance that is singular here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

Array = np.ndarray

MAX_RHO = 60.0
AT_BOUND = 1e-3
"""A logarithm this near to its bound counts as on it."""

STARTS = 8
HELD_OUT_STARTS = 4

BETWEEN_RUNS = 3
"""Constants that are fitted to the differences between runs."""

REFIT_EVALUATIONS = 60

MIN_NOISE = 1e-7
"""Least standard deviation of the noise, as a share of that of the values."""


@dataclass(frozen=True)
class Form:
    """A family of curves s + K f(P, N), which are fitted by K, s and the constants of f.

    Attributes:
        names: the constants of f.
        low, high: bounds of the transformed constants (logarithms; the weight is a logit).
        start_low, start_high: the range from which starts are drawn.
        log_value: returns ln f, 0 at the reference, and its derivatives by the transformed
            constants, from these and the logarithms of P/P0 and N/N0.
    """

    names: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    start_low: tuple[float, ...]
    start_high: tuple[float, ...]
    log_value: Callable[[Array, Array, Array], tuple[Array, Array]]


def _log_sum(theta: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Return the logarithm of (w exp(-alpha x) + (1 - w) exp(-beta y))^rho and its derivatives."""
    weight = 1.0 / (1.0 + math.exp(-theta[0]))
    alpha, beta, rho = np.exp(theta[1:])
    first, second = weight * np.exp(-alpha * x), (1.0 - weight) * np.exp(-beta * y)
    total = first + second
    log_total = np.log(total)
    slopes = [
        rho * (first * (1.0 - weight) - second * weight) / total,
        rho * first * (-alpha * x) / total,
        rho * second * (-beta * y) / total,
        rho * log_total,
    ]
    return rho * log_total, np.stack(slopes, axis=1)


def _log_product(theta: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Return the logarithm of exp(-a x - b y) and its derivatives."""
    a, b = np.exp(theta)
    return -a * x - b * y, np.stack([-a * x, -b * y], axis=1)


SUM_OF_POWERS = Form(
    names=("weight", "alpha", "beta", "rho"),
    low=(-6.0, math.log(1e-3), math.log(1e-3), math.log(0.3)),
    high=(6.0, math.log(3.0), math.log(3.0), math.log(MAX_RHO)),
    start_low=(-2.0, math.log(0.02), math.log(0.02), 0.0),
    start_high=(2.0, math.log(0.6), math.log(0.9), math.log(15.0)),
    log_value=_log_sum,
)
PRODUCT = Form(
    names=("a", "b"),
    low=(math.log(1e-4),) * 2,
    high=(math.log(10.0),) * 2,
    start_low=(math.log(0.02),) * 2,
    start_high=(math.log(2.0),) * 2,
    log_value=_log_product,
)


@dataclass(frozen=True)
class Grid:
    """The logarithms of P/P0 and N/N0 of all points, and the reference P0, N0."""

    x: Array
    y: Array
    reference: tuple[float, float]

    @classmethod
    def of(
        cls, parameters: Array, steps: Array, reference: tuple[float, float] | None = None
    ) -> Grid:
        """Return the grid of some points; the default reference is their geometric middle."""
        if reference is None:
            reference = (
                math.sqrt(float(parameters.min()) * float(parameters.max())),
                math.sqrt(float(steps.min()) * float(steps.max())),
            )
        x, y = np.log(parameters / reference[0]), np.log(steps / reference[1])
        return cls(x, y, reference)


@dataclass(frozen=True)
class Law:
    """One fitted law.

    Attributes:
        form: of the law.
        theta: its transformed constants.
        scale: K.
        offset: s, the value at infinite P and N.
    """

    form: Form
    theta: Array
    scale: float
    offset: float

    def predict(self, grid: Grid) -> Array:
        """Return the value at each point of a grid with the reference of the fit."""
        log_value, _ = self.form.log_value(self.theta, grid.x, grid.y)
        values: Array = self.offset + self.scale * np.exp(log_value)
        return values

    def constants(self) -> dict[str, float]:
        """Return the constants of f by name."""
        values = np.exp(self.theta)
        if "weight" in self.form.names:
            values[0] = 1.0 / (1.0 + math.exp(-self.theta[0]))
        return dict(zip(self.form.names, map(float, values), strict=True))

    def at_bound(self) -> list[str]:
        """Return the names of the constants that are on a bound, so that the data give none."""
        gap = np.minimum(self.theta - self.form.low, np.array(self.form.high) - self.theta)
        return [name for name, each in zip(self.form.names, gap, strict=True) if each < AT_BOUND]

    def summary(self) -> dict[str, float]:
        """Return level, slopes and asymptote of a sum of powers.

        `slope_parameters` and `slope_steps` are the derivatives by ln P and ln N at the reference.
        """
        each = self.constants()
        return {
            "level": self.offset + self.scale,
            "slope_parameters": -self.scale * each["rho"] * each["alpha"] * each["weight"],
            "slope_steps": -self.scale * each["rho"] * each["beta"] * (1.0 - each["weight"]),
            "asymptote": self.offset,
        }


@dataclass(frozen=True)
class Fit:
    """Laws of one form that were fitted jointly, one for each column of the values.

    Attributes:
        laws: one for each column.
        cost: half the sum of squared residuals, divided by their noise.
    """

    laws: tuple[Law, ...]
    cost: float

    @property
    def theta(self) -> Array:
        """Return all free constants, that of all laws last."""
        own = [law.theta[:-1] for law in self.laws]
        return np.concatenate([*own, self.laws[0].theta[-1:]])

    def predict(self, grid: Grid) -> Array:
        """Return the values at each point of a grid, a column for each law."""
        return np.stack([law.predict(grid) for law in self.laws], axis=1)


def _solve(form: Form, theta: Array, grid: Grid, values: Array) -> tuple[Law, Array, Array]:
    """Return the law with the best K and s, its residuals, and their Jacobian by theta."""
    log_value, slopes = form.log_value(theta, grid.x, grid.y)
    top = float(log_value.max())  # Divided out, since f overflows for steep laws.
    f = np.exp(log_value - top)
    centred: Array = f - f.mean()
    square = max(float(centred @ centred), 1e-300)
    scale = float(centred @ values) / square
    offset = float(values.mean()) - scale * float(f.mean())
    jacobian = scale * slopes * f[:, None]
    jacobian -= jacobian.mean(axis=0)
    jacobian -= np.outer(centred, centred @ jacobian) / square
    law = Law(form, theta, scale * math.exp(-top), offset)
    return law, scale * f + offset - values, jacobian


class _Problem:
    """Residuals of the laws of all columns, whose last constant is common or fixed."""

    def __init__(
        self, form: Form, grid: Grid, values: Array, noise: Array, fixed: float | None = None
    ) -> None:
        self.form, self.grid, self.values, self.noise, self.fixed = form, grid, values, noise, fixed
        self.own = len(form.names) - 1
        self.count = values.shape[1]

    def expand(self, bounds: tuple[float, ...]) -> Array:
        """Return bounds or starts of the free constants from those of one law."""
        common = bounds[-1:] if self.fixed is None else ()
        return np.array([*(bounds[:-1] * self.count), *common])

    def solve(self, theta: Array) -> tuple[list[Law], Array, Array]:
        """Return the laws, the residuals and their Jacobian by the free constants."""
        own, common = self.own, theta[-1] if self.fixed is None else self.fixed
        points = len(self.values)
        residuals = np.empty((self.count, points))
        jacobian = np.zeros((self.count, points, len(theta)))
        laws = []
        for column in range(self.count):
            part = slice(column * own, (column + 1) * own)
            each = np.append(theta[part], common)
            law, error, slope = _solve(self.form, each, self.grid, self.values[:, column])
            residuals[column] = error / self.noise[column]
            jacobian[column, :, part] = slope[:, :-1] / self.noise[column]
            if self.fixed is None:
                jacobian[column, :, -1] = slope[:, -1] / self.noise[column]
            laws.append(law)
        return laws, residuals.ravel(), jacobian.reshape(-1, len(theta))

    def minimize(self, start: Array, tolerance: float, evaluations: int | None = None) -> Fit:
        """Return the fit that a start leads to."""
        low, high = self.expand(self.form.low), self.expand(self.form.high)
        found = least_squares(
            lambda theta: self.solve(theta)[1],
            np.clip(start, low + 1e-6, high - 1e-6),
            jac=lambda theta: self.solve(theta)[2],
            bounds=(low, high),
            x_scale="jac",
            ftol=tolerance,
            xtol=tolerance,
            gtol=tolerance,
            max_nfev=evaluations,
        )
        return Fit(tuple(self.solve(found.x)[0]), float(found.cost))


def fit_laws(form: Form, grid: Grid, values: Array, starts: int = STARTS, seed: int = 0) -> Fit:
    """Return the best fit of the laws of all columns, with their last constant (rho) in common.

    Each column is first fitted alone, which gives its noise; the joint fit weights by it.

    Args:
        form: of the laws.
        grid: the points.
        values: shape (points, laws).
        starts: number of starts of each fit.
        seed: of the starts.
    """
    rng = np.random.default_rng(seed)
    spread = values.std(axis=0)
    alone = [
        _best(_Problem(form, grid, values[:, [i]], spread[[i]]), rng, starts)
        for i in range(values.shape[1])
    ]
    if len(alone) == 1:
        return alone[0]
    noise = noise_sd(values, np.hstack([fit.predict(grid) for fit in alone]), len(form.names) + 2)
    problem = _Problem(form, grid, values, noise)
    own = np.concatenate([fit.theta[:-1] for fit in alone])
    joint = [np.append(own, fit.theta[-1]) for fit in alone]
    return _best(problem, rng, starts, joint)


def noise_sd(values: Array, fitted: Array, constants: int) -> Array:
    """Return the standard deviation of each column around a fit with that many constants."""
    freedom = max(len(values) - constants, 1)
    sd: Array = np.sqrt(((values - fitted) ** 2).sum(axis=0) / freedom)
    floor: Array = MIN_NOISE * values.std(axis=0)
    return np.where(sd > floor, sd, floor)


def _best(
    problem: _Problem, rng: np.random.Generator, starts: int, more: list[Array] | None = None
) -> Fit:
    low, high = (problem.expand(b) for b in (problem.form.start_low, problem.form.start_high))
    drawn = [*rng.uniform(low, high, (starts, len(low))), *(more or [])]
    rough = [problem.minimize(start, 1e-6, REFIT_EVALUATIONS) for start in drawn]
    best = min(rough, key=lambda fit: fit.cost)
    theta = best.theta if problem.fixed is None else best.theta[:-1]
    return min(best, problem.minimize(theta, 1e-12), key=lambda fit: fit.cost)


def refit(fit: Fit, grid: Grid, values: Array, noise: Array) -> Fit:
    """Return the fit to other values that an earlier fit leads to."""
    problem = _Problem(fit.laws[0].form, grid, values, noise)
    return problem.minimize(fit.theta, 1e-6, REFIT_EVALUATIONS)


def profile_rho(fit: Fit, grid: Grid, values: Array, noise: Array, rhos: Array) -> Array:
    """Return by how much chi-square grows, against the best fit, if rho is fixed at each value.

    Points count as independent although those of a run are not, so the profile is too narrow.
    """
    best = refit(fit, grid, values, noise).cost
    form, own = fit.laws[0].form, fit.theta[:-1]
    costs = []
    for rho in rhos:
        problem = _Problem(form, grid, values, noise, fixed=math.log(rho))
        costs.append(_best(problem, np.random.default_rng(0), 2, [own]).cost)
    return 2.0 * (np.array(costs) - min(best, *costs))


def redrawn_fits(
    fit: Fit, grid: Grid, values: Array, runs: Array, steps: Array, draws: int, seed: int = 0
) -> list[Fit]:
    """Return refits to the fitted values plus whole residual trajectories, redrawn over runs.

    Evaluations of one run are correlated, so points are not redrawn: their intervals cover half as
    often as they should. Residuals are stretched by sqrt(G / (G - 3)) for G runs, since level,
    slope and curvature over P are fitted to the differences between runs. With three seeds of six
    ranks, 95 % intervals then cover .90 to .97; stretched by the number of points, .82 to .97. A
    run with other steps than the one whose residuals it gets has them interpolated.

    Args:
        fit: the fit to the data.
        grid: the points.
        values: shape (points, laws).
        runs: the run of each point.
        steps: the step of each point.
        draws: number of refits.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    fitted = fit.predict(grid)
    noise = noise_sd(values, fitted, len(fit.laws[0].form.names) + 2)
    members = [np.flatnonzero(runs == run) for run in np.unique(runs)]
    members = [each[np.argsort(steps[each])] for each in members]
    stretch = math.sqrt(len(members) / (len(members) - BETWEEN_RUNS))
    residuals = stretch * (values - fitted)
    refits = []
    for _ in range(draws):
        drawn = fitted.copy()
        for own, other in zip(members, rng.integers(len(members), size=len(members)), strict=True):
            source = members[other]
            for column in range(values.shape[1]):
                drawn[own, column] += np.interp(
                    steps[own], steps[source], residuals[source, column]
                )
        refits.append(refit(fit, grid, drawn, noise))
    return refits


Predictor = Callable[[Grid, Array, Grid], Array]
"""Fits a law to the values at some points, and returns its predictions at others."""


def _predict_logs(known: Grid, values: Array, wanted: Grid) -> Array:
    """Predict by a + b ln P + c ln N."""

    def design(grid: Grid) -> Array:
        return np.column_stack([np.ones_like(grid.x), grid.x, grid.y])

    predicted: Array = design(wanted) @ np.linalg.lstsq(design(known), values, rcond=None)[0]
    return predicted


def _predictor(form: Form) -> Predictor:
    def predict(known: Grid, values: Array, wanted: Grid) -> Array:
        fit = fit_laws(form, known, values[:, None], starts=HELD_OUT_STARTS)
        return fit.laws[0].predict(wanted)

    return predict


LAWS: dict[str, tuple[int, Predictor]] = {
    "a + b ln P + c ln N": (3, _predict_logs),
    "s + K P^-a N^-b": (4, _predictor(PRODUCT)),
    "s + K (w P^-alpha + (1 - w) N^-beta)^rho": (6, _predictor(SUM_OF_POWERS)),
}
"""The number of constants of each law, and its predictions."""
