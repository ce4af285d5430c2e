"""The metrics of a probe: scores of one question as TOFU defines them, and their means over items.

An entry of `PROBE_METRICS` is all that a metric needs.

Sources: Maini et al. 2024 (TOFU, arXiv 2401.06121, section 2.2) and its code. Let l(a) be the sum
of -log p over the label tokens of answer a, end of sequence included, and |a| their number. The
length-normalised probability is p(a) = exp(-l(a)/|a|). All log-probabilities here are means per
token, -l(a)/|a|, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd


def normalised_probability(answer: float, wrong: Sequence[float]) -> float:
    """Return p(a) / (p(a) + sum_w p(w)), TOFU's probability on real-world sets.

    Args:
        answer: mean log-probability per token of the right answer, in nats.
        wrong: the same for each wrong answer, at least one.
    """
    return 1.0 / (1.0 + sum(_exp(other - answer) for other in wrong))


def truth_ratio_arithmetic(right: float, wrong: Sequence[float]) -> float:
    """Return R = mean_w p(w) / p(right); lower means better knowledge.

    This is the definition of the TOFU paper (section 2.2.2).
    """
    return sum(_exp(other - right) for other in wrong) / len(wrong)


def truth_ratio_geometric(right: float, wrong: Sequence[float]) -> float:
    """Return R = exp(mean_w log p(w) - log p(right)), as in TOFU's code.

    The geometric mean is never above the arithmetic one.
    """
    return _exp(sum(wrong) / len(wrong) - right)


def _exp(nats: float) -> float:
    """Return e to the power of `nats`, infinity above the range of a float (diverged models)."""
    return math.inf if nats > 700.0 else math.exp(nats)


@dataclass(frozen=True)
class AnsweredQuestion:
    """What the metrics of one question are computed from.

    Attributes:
        reference: the true answer.
        generated: the generated answer, as text.
        generated_tokens: its number of tokens.
        rouge: its ROUGE scores, see `forgetting.evaluation.rouge.rouge_l`.
        answer: mean log-probability per token of the true answer, in nats.
        right: the same for its paraphrase, or for the true answer if there is no paraphrase.
        wrong: the same for each wrong answer; may be empty.
    """

    reference: str
    generated: str
    generated_tokens: int
    rouge: Mapping[str, float]
    answer: float
    right: float
    wrong: Sequence[float]


@dataclass(frozen=True)
class ProbeMetric:
    """A column of the items table that is averaged over the questions of a probe.

    Attributes:
        score: computes it for one question.
        needs_wrong_answers: whether it is NaN for a question without wrong answers.
        is_fraction: whether it is between 0 and 1; the intervals of other metrics are Student's.
        is_ratio: whether it is a truth ratio R, of which a question adds max(0, 1 - R) to the mean.
        compares_methods: whether the report compares every pair of methods by it.
    """

    score: Callable[[AnsweredQuestion], float]
    needs_wrong_answers: bool = False
    is_fraction: bool = True
    is_ratio: bool = False
    compares_methods: bool = False


PROBE_METRICS = {
    "rougeL_recall": ProbeMetric(lambda q: q.rouge["rougeL_recall"], compares_methods=True),
    "rougeL_f1": ProbeMetric(lambda q: q.rouge["rougeL_f1"]),
    "rouge1_recall": ProbeMetric(lambda q: q.rouge["rouge1_recall"]),
    "generated_tokens": ProbeMetric(lambda q: float(q.generated_tokens), is_fraction=False),
    "probability": ProbeMetric(lambda q: math.exp(q.answer)),
    "normalised_probability": ProbeMetric(
        lambda q: normalised_probability(q.answer, q.wrong), needs_wrong_answers=True
    ),
    "truth_ratio_arithmetic": ProbeMetric(
        lambda q: truth_ratio_arithmetic(q.right, q.wrong),
        needs_wrong_answers=True,
        is_ratio=True,
        compares_methods=True,
    ),
    "truth_ratio_geometric": ProbeMetric(
        lambda q: truth_ratio_geometric(q.right, q.wrong),
        needs_wrong_answers=True,
        is_ratio=True,
        compares_methods=True,
    ),
}
"""The metrics of every probe by name, in the order of the columns."""

TEXT_SCORES = (
    "forgetting_ce_hard",
    "forgetting_ce_soft",
    "forgetting_kl",
    "base_agreement",
    "text_loss",
)
"""Columns of the items table that are averaged over the blocks of the general text."""

UNBOUNDED_METRICS = {
    *(name for name, metric in PROBE_METRICS.items() if not metric.is_fraction),
    *(name for name in TEXT_SCORES if name != "base_agreement"),
}
"""Metrics that are not fractions; their intervals are Student's."""


def question_scores(question: AnsweredQuestion) -> dict[str, float]:
    """Return every metric of a question by name; a truth ratio is R itself."""
    return {
        name: metric.score(question)
        if question.wrong or not metric.needs_wrong_answers
        else math.nan
        for name, metric in PROBE_METRICS.items()
    }


def item_scores(items: pd.DataFrame, metric: str) -> pd.Series:
    """Return what each question adds to the mean: max(0, 1 - R) for a truth ratio R.

    Other metrics add their value. TOFU aggregates the truth ratio of retained knowledge in this way
    (section 2.2.2); higher is better. New knowledge uses the same form, so that both sides of the
    trade-off compare.
    """
    values = items[metric]
    if metric in PROBE_METRICS and PROBE_METRICS[metric].is_ratio:
        return (1.0 - values).clip(lower=0.0)
    return values


def mean_score(items: pd.DataFrame, probe: str, metric: str) -> float:
    """Return the mean score of a probe, which the selection rule compares."""
    return float(item_scores(items[items["probe"] == probe], metric).mean())
