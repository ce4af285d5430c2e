"""Intervals cover what they claim: simulated on the kinds of values that the scores have."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.random import Generator
from scipy import stats

from forgetting.statistics import mean_interval, share_interval

REPEATS = 1500


def _bernoulli(share: float) -> tuple[float, object]:
    return share, lambda draw, size: (draw.random(size) < share).astype(float)


def _beta(a: float, b: float) -> tuple[float, object]:
    return a / (a + b), lambda draw, size: draw.beta(a, b, size)


def _mixture(zeros: float, ones: float, a: float, b: float) -> tuple[float, object]:
    """Like ROUGE recall: none, all, or something between."""

    def sample(draw: Generator, size: tuple[int, int]) -> np.ndarray:
        kind = draw.random(size)
        between = draw.beta(a, b, size)
        return np.where(kind < zeros, 0.0, np.where(kind < zeros + ones, 1.0, between))

    return ones + (1 - zeros - ones) * a / (a + b), sample


CASES = {
    "right or wrong, half": _bernoulli(0.5),
    "right or wrong, mostly right": _bernoulli(0.9),
    "right or wrong, nearly all right": _bernoulli(0.97),
    "spread evenly": _beta(1, 1),
    "skewed, like probabilities of a tuned model": _beta(8, 1),
    "skewed, like probabilities of facts": _beta(0.5, 6),
    "like recall before training": _mixture(0.3, 0.1, 2, 4),
    "like recall after training": _mixture(0.02, 0.6, 6, 2),
}


@pytest.mark.parametrize("n", [20, 60, 117, 300])
@pytest.mark.parametrize("case", CASES)
def test_share_interval_covers_the_mean_as_often_as_it_says(case: str, n: int) -> None:
    """Between 92 % and 99 % of 1500 samples, where 95 % are claimed.

    The score interval of few, nearly certain values is known to swing by two points around what it
    claims; 1500 samples add a standard error of 0.6.
    """
    mean, sample = CASES[case]
    draw = np.random.default_rng(7)
    samples = sample(draw, (REPEATS, n))  # type: ignore[operator]
    bounds = np.array([share_interval(values) for values in samples])
    covered = np.mean((bounds[:, 0] <= mean) & (mean <= bounds[:, 1]))
    assert 0.92 <= covered <= 0.99


@pytest.mark.parametrize("n", [60, 117, 300])
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("right")])
def test_share_interval_is_no_wider_than_it_must_be(case: str, n: int) -> None:
    """On values that vary less than right-or-wrong ones it is near Student's interval."""
    _, sample = CASES[case]
    draw = np.random.default_rng(8)
    ratios = []
    for values in sample(draw, (50, n)):  # type: ignore[operator]
        (low, high), (lower, upper) = share_interval(values), mean_interval(values)
        ratios.append((high - low) / (upper - lower))
    assert 0.9 <= float(np.mean(ratios)) <= 1.25


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("right", "n"), [(0, 1), (0, 20), (1, 20), (50, 100), (117, 117)])
def test_share_interval_of_right_or_wrong_is_wilsons(right: int, n: int, level: float) -> None:
    z = stats.norm.ppf(0.5 + level / 2)
    share = right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    expected = (max(0.0, centre - half), min(1.0, centre + half))
    values = [1.0] * right + [0.0] * (n - right)
    assert share_interval(values, level) == pytest.approx(expected, abs=1e-12)


def test_few_or_equal_values_do_not_pretend_to_certainty() -> None:
    for value in (0.0, 0.5, 1.0):
        low, high = share_interval([value] * 5)
        assert high - low > 0.1
        assert 0.0 <= low <= value <= high <= 1.0


def test_none_right_may_be_none_and_all_right_may_be_all() -> None:
    """The bound is 0 or 1 itself, not 7e-18."""
    for n in range(1, 200):
        assert share_interval([0.0] * n)[0] == 0.0
        assert share_interval([1.0] * n)[1] == 1.0


def test_no_values_have_no_interval() -> None:
    assert all(math.isnan(bound) for bound in share_interval([]))
    assert all(math.isnan(bound) for bound in mean_interval([]))
    assert all(math.isnan(bound) for bound in mean_interval([3.0]))


def test_mean_interval_is_students() -> None:
    """For 1..5: mean 3, standard error sqrt(2.5/5), and 2.776 from the table at 4 degrees."""
    half = 2.7764451 * math.sqrt(0.5)
    assert mean_interval([1, 2, 3, 4, 5]) == pytest.approx((3 - half, 3 + half), abs=1e-6)
    draw = np.random.default_rng(9)
    samples = draw.normal(10, 3, (REPEATS, 12))
    bounds = np.array([mean_interval(values) for values in samples])
    covered = np.mean((bounds[:, 0] <= 10) & (bounds[:, 1] >= 10))
    assert 0.935 <= covered <= 0.965
