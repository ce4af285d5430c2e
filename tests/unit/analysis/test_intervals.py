"""Tests of the intervals: coverage on simulated scores, and published examples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.random import Generator
from scipy import stats

from forgetting.analysis.intervals import t_interval, tango_interval, wilson_interval

REPEATS = 1500


def _bernoulli(share: float) -> tuple[float, object]:
    return share, lambda draw, size: (draw.random(size) < share).astype(float)


def _beta(a: float, b: float) -> tuple[float, object]:
    return a / (a + b), lambda draw, size: draw.beta(a, b, size)


def _mixture(zeros: float, ones: float, a: float, b: float) -> tuple[float, object]:
    """Return scores like ROUGE recall: none, all, or between."""

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
def test_wilson_interval_covers(case: str, n: int) -> None:
    """Between 92 % and 99 % of 1500 samples are covered at level 95 %.

    The coverage of a score interval is known to vary by two points around its level for few values
    near 0 or 1. 1500 samples add a standard error of 0.6 points.
    """
    mean, sample = CASES[case]
    draw = np.random.default_rng(7)
    samples = sample(draw, (REPEATS, n))  # type: ignore[operator]
    bounds = np.array([wilson_interval(values) for values in samples])
    covered = np.mean((bounds[:, 0] <= mean) & (mean <= bounds[:, 1]))
    assert 0.92 <= covered <= 0.99


@pytest.mark.parametrize("n", [60, 117, 300])
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("right")])
def test_wilson_interval_is_near_students(case: str, n: int) -> None:
    """Values vary less than right-or-wrong ones."""
    _, sample = CASES[case]
    draw = np.random.default_rng(8)
    ratios = []
    for values in sample(draw, (50, n)):  # type: ignore[operator]
        (low, high), (lower, upper) = wilson_interval(values), t_interval(values)
        ratios.append((high - low) / (upper - lower))
    assert 0.9 <= float(np.mean(ratios)) <= 1.25


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("right", "n"), [(0, 1), (0, 20), (1, 20), (50, 100), (117, 117)])
def test_wilson_interval_of_right_or_wrong_is_wilsons(right: int, n: int, level: float) -> None:
    z = stats.norm.ppf(0.5 + level / 2)
    share = right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    expected = (max(0.0, centre - half), min(1.0, centre + half))
    values = [1.0] * right + [0.0] * (n - right)
    assert wilson_interval(values, level) == pytest.approx(expected, abs=1e-12)


def test_wilson_interval_of_few_or_equal_values_has_a_width() -> None:
    for value in (0.0, 0.5, 1.0):
        low, high = wilson_interval([value] * 5)
        assert high - low > 0.1
        assert 0.0 <= low <= value <= high <= 1.0


def test_wilson_interval_is_exact_at_none_and_all_right() -> None:
    """The bound is exactly 0 or 1, not 7e-18."""
    for n in range(1, 200):
        assert wilson_interval([0.0] * n)[0] == 0.0
        assert wilson_interval([1.0] * n)[1] == 1.0


def test_intervals_of_no_values_are_nan() -> None:
    assert all(math.isnan(bound) for bound in wilson_interval([]))
    assert all(math.isnan(bound) for bound in tango_interval([]))
    assert all(math.isnan(bound) for bound in t_interval([]))
    assert all(math.isnan(bound) for bound in t_interval([3.0]))


def test_t_interval_is_students() -> None:
    """1 to 5 have mean 3 and standard error sqrt(2.5/5); t is 2.776 at 4 degrees of freedom."""
    half = 2.7764451 * math.sqrt(0.5)
    assert t_interval([1, 2, 3, 4, 5]) == pytest.approx((3 - half, 3 + half), abs=1e-6)
    draw = np.random.default_rng(9)
    samples = draw.normal(10, 3, (REPEATS, 12))
    bounds = np.array([t_interval(values) for values in samples])
    covered = np.mean((bounds[:, 0] <= 10) & (bounds[:, 1] >= 10))
    assert 0.935 <= covered <= 0.965


def _changed(lost: float, gained: float) -> tuple[float, object]:
    """Return differences of right-or-wrong scores, most of them 0."""

    def sample(draw: Generator, size: tuple[int, int]) -> np.ndarray:
        kind = draw.random(size)
        return np.where(kind < lost, -1.0, np.where(kind < lost + gained, 1.0, 0.0))

    return gained - lost, sample


def _recall(changed: float) -> tuple[float, object]:
    """Return differences of recall of six words, which is redrawn where an answer changes."""

    def sample(draw: Generator, size: tuple[int, int]) -> np.ndarray:
        before = np.where(draw.random(size) < 0.6, 1.0, draw.integers(0, 7, size) / 6)
        after = np.where(draw.random(size) < changed, draw.integers(0, 7, size) / 6, before)
        return after - before

    return changed * (0.5 - (0.6 + 0.4 * 0.5)), sample


def _probabilities(noise: float) -> tuple[float, object]:
    """Return differences of two models that find the same questions hard, with mean 0."""

    def sample(draw: Generator, size: tuple[int, int]) -> np.ndarray:
        ease = draw.normal(0, 1.5, size)
        one, two = (1 / (1 + np.exp(-ease - draw.normal(0, noise, size))) for _ in range(2))
        return one - two

    return 0.0, sample


DIFFERENCES = {
    **{f"{100 * share:g} % lost": _changed(share, 0.0) for share in (0.01, 0.02, 0.05, 0.1, 0.3)},
    "5 % gained": _changed(0.0, 0.05),
    "1 % lost, 1 % gained": _changed(0.01, 0.01),
    "5 % lost, 1 % gained": _changed(0.05, 0.01),
    "30 % lost, 30 % gained": _changed(0.3, 0.3),
    "60 % lost, 2 % gained": _changed(0.6, 0.02),
    "recall, 2 % changed": _recall(0.02),
    "recall, 20 % changed": _recall(0.2),
    "recall, all changed": _recall(1.0),
    "probabilities, small difference": _probabilities(0.3),
    "probabilities, large difference": _probabilities(3.0),
}


@pytest.mark.parametrize("n", [20, 80, 400, 1319])
@pytest.mark.parametrize("case", DIFFERENCES)
def test_tango_interval_covers_if_few_items_differ(case: str, n: int) -> None:
    """At least 92.5 % of 600 samples are covered at level 95 %.

    The standard error is 0.9 points. Student's interval covers 56 % where 1 % of 80 items are lost.
    """
    mean, sample = DIFFERENCES[case]
    samples = sample(np.random.default_rng(7), (600, n))  # type: ignore[operator]
    bounds = np.array([tango_interval(values) for values in samples])
    assert np.mean((bounds[:, 0] <= mean) & (mean <= bounds[:, 1])) >= 0.925
    assert (bounds[:, 1] > bounds[:, 0]).all()
    if case == "1 % lost" and n == 80:
        students = np.array([t_interval(values) for values in samples])
        assert np.mean((students[:, 0] <= mean) & (mean <= students[:, 1])) < 0.65


@pytest.mark.parametrize("n", [80, 400])
@pytest.mark.parametrize(
    "case",
    [
        "30 % lost",
        "30 % lost, 30 % gained",
        "recall, all changed",
        "probabilities, large difference",
    ],
)
def test_tango_interval_is_near_students(case: str, n: int) -> None:
    """Where many items differ, Student's interval covers."""
    _, sample = DIFFERENCES[case]
    ratios = []
    for values in sample(np.random.default_rng(8), (50, n)):  # type: ignore[operator]
        (low, high), (lower, upper) = tango_interval(values), t_interval(values)
        ratios.append((high - low) / (upper - lower))
    assert 0.9 <= float(np.mean(ratios)) <= 1.1


def _pairs(gained: int, lost: int, n: int) -> list[float]:
    return [1.0] * gained + [-1.0] * lost + [0.0] * (n - gained - lost)


@pytest.mark.parametrize(
    ("gained", "lost", "n", "level", "low", "high"),
    [
        # Tango 1998, section 6.1: soft contact lenses; the paper prints the lower bound.
        (0, 1, 44, 0.9, -0.096, None),
        # Fagerland, Lydersen and Laake 2014 (Statistics in Medicine 33:2850): airways, 21 children.
        (1, 7, 21, 0.95, -0.517, -0.026),
        # McNemar's setting, by scoreci.mp of R's PropCIs 0.3.
        (48, 41, 549, 0.9, -0.0157, 0.0414),
    ],
)
def test_tango_interval_equals_published_examples(
    gained: int, lost: int, n: int, level: float, low: float, high: float | None
) -> None:
    interval = tango_interval(_pairs(gained, lost, n), level)
    digits = 4 if n == 549 else 3
    assert round(interval[0], digits) == low
    assert high is None or round(interval[1], digits) == high


def test_tango_interval_solves_the_score_equation() -> None:
    """The maximum-likelihood shares come from a grid search, not from the formula."""
    for gained, lost, n in ((9, 2, 30), (3, 13, 400), (0, 5, 25)):
        for end in tango_interval(_pairs(gained, lost, n)):
            shares = np.linspace(max(0.0, -end), (1 - end) / 2, 200_001)[1:-1]
            likelihood = (
                gained * np.log(shares + end)
                + (lost * np.log(shares) if lost else 0.0)
                + (n - gained - lost) * np.log(1 - 2 * shares - end)
            )
            share = shares[np.argmax(likelihood)]
            error = math.sqrt((2 * share + end - end**2) / n)
            assert abs((gained - lost) / n - end) / error == pytest.approx(1.959964, rel=1e-3)


@pytest.mark.parametrize("n", [1, 20, 80])
def test_tango_interval_of_no_change_is_wilsons(n: int) -> None:
    """It reaches as far as Wilson's interval of 0 of n, either way."""
    reach = wilson_interval([0.0] * n)[1]
    assert tango_interval([0.0] * n) == pytest.approx((-reach, reach), abs=1e-12)


def test_tango_interval_is_symmetric() -> None:
    draw = np.random.default_rng(3)
    for n in (2, 20, 80):
        values = draw.integers(-1, 2, n) * draw.choice([0.5, 1.0], n)
        low, high = tango_interval(values)
        assert tango_interval(-values) == pytest.approx((-high, -low), abs=1e-12)


def test_tango_interval_widens_with_level_and_fewer_items() -> None:
    values = [1.0, 0.5, 0.0, 0.0, -0.25]
    widths = [high - low for low, high in (tango_interval(values * k) for k in (1, 2, 8, 64))]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < widths[0] / 4
    (low, high), (lower, upper) = (tango_interval(values * 8, level) for level in (0.9, 0.99))
    assert lower < low < high < upper


def test_tango_interval_excludes_0_where_mcnemar_rejects() -> None:
    """McNemar's test rejects if (b - c)^2 / (b + c) > z^2, with b gained and c lost."""
    for gained in range(13):
        for lost in range(13 - gained):
            low, high = tango_interval(_pairs(gained, lost, 40))
            rejects = (gained - lost) ** 2 > 1.959964**2 * (gained + lost)
            assert (low > 0 or high < 0) is rejects


@pytest.mark.parametrize("n", [1, 5, 40])
def test_tango_interval_is_within_what_the_base_allows(n: int) -> None:
    """Nothing is gained where the base is right, or lost where it is wrong.

    For every table of right and wrong answers the interval is within [-1, 1] and within what the
    interval of the base's score allows.
    """
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            low, high = tango_interval(_pairs(gained, lost, n))
            assert -1.0 <= low <= (gained - lost) / n <= high <= 1.0
            # The base is wrong at least where there is a gain, and right where there is a loss.
            may_gain = 1 - wilson_interval([0.0] * gained + [1.0] * (n - gained))[0]
            may_lose = wilson_interval([1.0] * lost + [0.0] * (n - lost))[1]
            assert high <= may_gain + 1e-12
            assert low >= -may_lose - 1e-12
    assert tango_interval([1.0] * n)[1] == 1.0
    assert tango_interval([-1.0] * n)[0] == -1.0


def test_tango_interval_cut_at_the_base_mean_undercovers() -> None:
    """A gain may exceed 1 - base of the sample.

    The base knows 90 % of all questions, and a model that knows 98 % gains 0.08. In every third
    sample of 80 questions, less than that is left to gain.
    """
    draw = np.random.default_rng(4)
    covered, cut = [], []
    for _ in range(600):
        wrong = draw.random(80) < 0.1
        gained = wrong & (draw.random(80) < 0.8)
        low, high = tango_interval(gained.astype(float))
        covered.append(low <= 0.08 <= high)
        cut.append(low <= 0.08 <= min(high, wrong.mean()))
    assert np.mean(covered) >= 0.925
    assert np.mean(cut) < 0.75
