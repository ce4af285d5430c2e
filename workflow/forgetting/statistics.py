"""Intervals for means over the items of a probe or benchmark."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

PSEUDO_ITEMS = 2.0
"""Weight, in items, of the assumption that values vary as much as right-or-wrong ones would."""


def share_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
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
    relative = float(x.var()) / widest if widest > 0 else 1.0
    effective = n * (n + PSEUDO_ITEMS) / (n * relative + PSEUDO_ITEMS)
    centre = (mean + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z * math.sqrt(widest / effective + z * z / (4 * effective**2))
    half /= 1 + z * z / effective
    # At the ends the bound is the end itself, which rounding would miss by a hair.
    low = 0.0 if mean == 0 else max(0.0, centre - half)
    high = 1.0 if mean == 1 else min(1.0, centre + half)
    return low, high


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of unbounded values; NaN below two values."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return math.nan, math.nan
    half = float(stats.t.ppf(0.5 + level / 2, len(x) - 1) * stats.sem(x))
    return float(x.mean()) - half, float(x.mean()) + half
