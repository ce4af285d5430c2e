"""Confidence intervals for means over items and for differences of such means.

Scores and differences have no unit. The measured items are a sample of all items of their kind, and
the bounds are for the mean over all of them. Each interval is for one mean. Intervals of level
1 - 0.05/k for k means hold simultaneously (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

PSEUDO_ITEMS = 2.0
"""Weight, in items, of the assumption that values vary as much as right-or-wrong ones would."""

ROUNDING = 1e-12
"""A largest possible variance below this counts as 0."""

HALVINGS = 50
"""Bisection steps. From a distance of at most 2 they leave 2e-15."""


def wilson_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return a confidence interval of the mean of independent values in [0, 1].

    Wilson's score interval (1927) with n' = n / v items. v is the variance of the values relative
    to m(1-m), the largest variance of values in [0, 1] with mean m. Right-or-wrong values have
    v = 1 and Wilson's own interval. Values that vary less have a narrower interval. v is shrunk
    towards 1 by `PSEUDO_ITEMS`, so that few or equal values do not give an interval without width.
    tests/unit/analysis/test_intervals.py simulates the coverage.

    Args:
        values: scores of the items; without any, both bounds are NaN.
        level: confidence level.
    """
    x = np.asarray(values, dtype=float)
    n = len(x)
    if n == 0:
        return math.nan, math.nan
    z = float(stats.norm.ppf(0.5 + level / 2))
    mean = float(x.mean())
    widest = mean * (1 - mean)
    effective = _effective_items(x, widest)
    centre = (mean + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z * math.sqrt(widest / effective + z * z / (4 * effective**2))
    half /= 1 + z * z / effective
    # A mean of 0 or 1 is its own bound. The formula would miss it by rounding.
    low = 0.0 if mean == 0 else max(0.0, centre - half)
    high = 1.0 if mean == 1 else min(1.0, centre + half)
    return low, high


def tango_interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return a confidence interval of the mean difference of two scores of the same items.

    Tango's score interval (1998, Statistics in Medicine 17:891, equations 24 to 26) for paired
    proportions. Let g and l be the means of max(0, d) and max(0, -d). The interval holds every
    delta with |g - l - delta| <= z sqrt((2q + delta(1 - delta)) / n). q is the maximum-likelihood
    share of losses under the true difference delta. It is the root of 2q^2 + Bq + C with
    B = (2 - g + l) delta - g - l and C = -l delta (1 - delta). For scores between right and wrong,
    n is replaced by n / v. v is the variance of the differences relative to g + l - (g-l)^2, the
    largest for this g and l, shrunk towards 1 as in `wilson_interval`.

    Where few items differ, Student's interval covers far less than its level, and where none
    differs it has no width. This interval then reaches z^2 / (n + z^2) either way, which 0 of n
    items leave possible. It stays within [-1, 1] and excludes 0 where McNemar's test rejects.
    For right-or-wrong scores the gain is at most 1 - low, with low from `wilson_interval` of the
    second score. The gain may exceed 1 minus the second score's mean over these items, since other
    items would change that mean too. An interval cut there covers as little as half of the time.
    tests/unit/analysis/test_intervals.py has simulations and published examples.

    Limitation: rare large differences are missed. If 1 % of items differ by nearly 1, a sample of
    80 without such an item gives too narrow an interval (Student's t does too).

    Args:
        differences: of scores in [0, 1], one per item; without any, both bounds are NaN.
        level: confidence level.
    """
    d = np.asarray(differences, dtype=float)
    if len(d) == 0:
        return math.nan, math.nan
    z = float(stats.norm.ppf(0.5 + level / 2))
    gain, loss = float(d.clip(min=0.0).mean()), float((-d).clip(min=0.0).mean())
    mean = gain - loss
    effective = _effective_items(d, gain + loss - mean**2)

    def is_outside(delta: float) -> bool:
        b = (2 - gain + loss) * delta - gain - loss
        c = -loss * delta * (1 - delta)
        share = (math.sqrt(max(0.0, b * b - 8 * c)) - b) / 4
        variance = (2 * share + delta * (1 - delta)) / effective
        return (mean - delta) ** 2 >= z * z * variance

    return _interval_edge(-1.0, mean, is_outside), _interval_edge(1.0, mean, is_outside)


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return Student's t interval of the mean of unbounded values; NaN for fewer than two."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return math.nan, math.nan
    half = float(stats.t.ppf(0.5 + level / 2, len(x) - 1) * stats.sem(x))
    return float(x.mean()) - half, float(x.mean()) + half


def _effective_items(values: np.ndarray, widest: float) -> float:
    """Return the number of items of variance `widest` that would fix the mean as precisely."""
    n = len(values)
    relative = float(values.var()) / widest if widest > ROUNDING else 1.0
    return n * (n + PSEUDO_ITEMS) / (n * relative + PSEUDO_ITEMS)


def _interval_edge(outside: float, inside: float, is_outside: Callable[[float], bool]) -> float:
    """Return the edge of an interval between a point outside and a point inside, by bisection."""
    for _ in range(HALVINGS):
        middle = (outside + inside) / 2
        if is_outside(middle):
            outside = middle
        else:
            inside = middle
    return outside
