"""Scores of one question as TOFU defines them, and their means over the items of a probe.

Sources: Maini et al. 2024 (TOFU, arXiv 2401.06121, section 2.2) and its code. Let l(a) be the sum
of -log p over the label tokens of answer a, end of sequence included, and |a| their number. The
length-normalised probability is p(a) = exp(-l(a)/|a|). All log-probabilities here are means per
token, -l(a)/|a|, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd


def answer_scores(answer: float, right: float, wrong: Sequence[float]) -> dict[str, float]:
    """Return the scores of one question from the log-probabilities of its answers.

    Args:
        answer: mean log-probability per token of the true answer, in nats.
        right: the same for its paraphrase, or for the answer if there is no paraphrase.
        wrong: the same for each wrong answer.

    Returns:
        `probability`, which is p(answer), and the three scores below by name. The latter are NaN
        without wrong answers. A truth ratio is R itself.
    """
    contrastive = {
        "normalised_probability": (normalised_probability, answer),
        "truth_ratio_arithmetic": (truth_ratio_arithmetic, right),
        "truth_ratio_geometric": (truth_ratio_geometric, right),
    }
    return {"probability": math.exp(answer)} | {
        name: score(logprob, wrong) if wrong else math.nan
        for name, (score, logprob) in contrastive.items()
    }


def normalised_probability(answer: float, wrong: Sequence[float]) -> float:
    """Return p(a) / (p(a) + sum_w p(w)), TOFU's probability on real-world sets.

    Args:
        answer: mean log-probability per token of the right answer, in nats.
        wrong: the same for each wrong answer, at least one.
    """
    return 1.0 / (1.0 + sum(_exp(other - answer) for other in wrong))


def truth_ratio_arithmetic(right: float, wrong: Sequence[float]) -> float:
    """Return R = mean_w p(w) / p(right); lower means better knowledge.

    This is the definition of the TOFU paper (section 2.2.2). For the arguments see `answer_scores`.
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


PROBE_SCORES = (
    "rougeL_recall",
    "rougeL_f1",
    "rouge1_recall",
    "generated_tokens",
    "probability",
    "normalised_probability",
    "truth_ratio_arithmetic",
    "truth_ratio_geometric",
)
"""Columns of the items table that are averaged over the questions of a probe."""

TEXT_SCORES = (
    "forgetting_ce_hard",
    "forgetting_ce_soft",
    "forgetting_kl",
    "base_agreement",
    "text_loss",
)
"""Columns of the items table that are averaged over the blocks of the general text."""

UNBOUNDED_METRICS = {
    "generated_tokens",
    "forgetting_ce_hard",
    "forgetting_ce_soft",
    "forgetting_kl",
    "text_loss",
}
"""Metrics that are not fractions; their intervals are Student's."""


def item_scores(items: pd.DataFrame, metric: str) -> pd.Series:
    """Return what each question adds to the mean: max(0, 1 - R) for a truth ratio R.

    Other metrics add their value. TOFU aggregates the truth ratio of retained knowledge in this way
    (section 2.2.2); higher is better. New knowledge uses the same form, so that both sides of the
    trade-off compare.
    """
    values = items[metric]
    if metric.startswith("truth_ratio"):
        return (1.0 - values).clip(lower=0.0)
    return values


def mean_score(items: pd.DataFrame, probe: str, metric: str) -> float:
    """Return the mean score of a probe, which the selection rule compares."""
    return float(item_scores(items[items["probe"] == probe], metric).mean())
