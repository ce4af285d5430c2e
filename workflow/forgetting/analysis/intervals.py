"""Intervals for means over the items of a probe or benchmark, and for differences of such means.

Scores and differences have no unit; their bounds speak of the mean over all items of the kind, of
which those measured are a sample. Each interval is for one mean alone: of several at once, level
1 - 0.05/k for each of k holds for all together (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

PSEUDO_ITEMS = 2.0
"""Weight, in items, of the assumption that values vary as much as right-or-wrong ones would."""

ROUNDING = 1e-12
"""A variance below which values are as good as equal, and none or all of what they may be."""

HALVINGS = 50
"""Of a distance of at most 2: leaves 2e-15."""


def wilson_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the mean of values in [0, 1], items taken as independent.

    Wilson's score interval (1927) with n' = n / v items, where v is the variance of the values
    relative to m(1-m), the largest that values in [0, 1] with mean m can have. For right-or-wrong
    values v = 1 and it is Wilson's own interval; for values that vary less it is narrower. v is
    shrunk towards 1 by `PSEUDO_ITEMS`, so that few or equal values do not pretend to certainty.
    Its coverage is simulated in tests/test_statistics.py.
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
    # At the ends the bound is the end itself, which rounding would miss by a hair.
    low = 0.0 if mean == 0 else max(0.0, centre - half)
    high = 1.0 if mean == 1 else min(1.0, centre + half)
    return low, high


def tango_interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the mean difference of two scores in [0, 1] of the same items.

    Tango's score interval (1998, Statistics in Medicine 17:891, equations 24 to 26) for paired
    proportions. With g and l the means of max(0, d) and max(0, -d), it holds every delta for which
    |g - l - delta| <= z sqrt((2q + delta(1 - delta)) / n), where q is the likeliest share of losses
    were the true difference delta: the root of 2q^2 + Bq + C with B = (2 - g + l) delta - g - l and
    C = -l delta (1 - delta). For values between right and wrong n is n / v, v being their variance
    relative to g + l - (g-l)^2, the largest that differences with this g and l can have, and shrunk
    towards 1, as in `wilson_interval`.

    Where few items differ, Student's interval covers far less than it claims, and has no width
    where none does; this one then reaches to what 0 of n leaves possible, z^2 / (n + z^2) either
    way. It stays within [-1, 1], and 0 lies outside it where McNemar's test rejects. Of scores that
    are right or wrong it promises no gain beyond 1 - low of the second, with low of
    `wilson_interval`. It may pass 1 less the second's mean over these items, which other items
    would change too: cut there, it covers as little as half of the time. Simulations and published
    examples are in tests/test_statistics.py.

    What no few items can show it does not know: where all differ a little and one in a hundred by
    nearly 1, samples of 80 without such a one give narrow intervals, as Student's do.
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
    """Student's t interval of the mean of unbounded values; NaN below two values."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return math.nan, math.nan
    half = float(stats.t.ppf(0.5 + level / 2, len(x) - 1) * stats.sem(x))
    return float(x.mean()) - half, float(x.mean()) + half


def _effective_items(values: np.ndarray, widest: float) -> float:
    """How many items of variance `widest` would fix the mean as well as these do."""
    n = len(values)
    relative = float(values.var()) / widest if widest > ROUNDING else 1.0
    return n * (n + PSEUDO_ITEMS) / (n * relative + PSEUDO_ITEMS)


def _interval_edge(outside: float, inside: float, is_outside: Callable[[float], bool]) -> float:
    """Where an interval ends, between a point beyond it (or its end) and one within, by halving."""
    for _ in range(HALVINGS):
        middle = (outside + inside) / 2
        if is_outside(middle):
            outside = middle
        else:
            inside = middle
    return outside
