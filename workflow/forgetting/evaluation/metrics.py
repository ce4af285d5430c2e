"""Probability and truth ratio of one question: pure functions, as TOFU defines them.

Sources: Maini et al. 2024 (TOFU, arXiv 2401.06121, section 2.2) and its code. With l(a) the sum of
-log p over the label tokens of answer a, end-of-sequence included, and |a| their number, the
length-normalised probability is p(a) = exp(-l(a)/|a|). All log-probabilities here are means per
token, -l(a)/|a|, in nats.

The scores of the items table, and what a question adds to the mean of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd


def answer_scores(answer: float, right: float, wrong: Sequence[float]) -> dict[str, float]:
    """All that the log-probabilities of one question's answers say of it.

    Args:
        answer: mean log-probability per token of the true answer, in nats.
        right: the same of its paraphrase where there is one, else of the answer.
        wrong: the same of each wrong answer; without any, what compares with them is NaN.

    Returns:
        probability, p(answer), and the three scores below by their names; of a truth ratio, R
        itself.
    """
    compared = {
        "normalised_probability": (normalised_probability, answer),
        "truth_ratio_arithmetic": (truth_ratio_arithmetic, right),
        "truth_ratio_geometric": (truth_ratio_geometric, right),
    }
    return {"probability": math.exp(answer)} | {
        name: score(against, wrong) if wrong else math.nan
        for name, (score, against) in compared.items()
    }


def normalised_probability(answer: float, wrong: Sequence[float]) -> float:
    """p(a) / (p(a) + sum over wrong answers of p(w)), TOFU's probability on real-world sets.

    Args:
        answer: mean log-probability per token of the right answer, in nats.
        wrong: the same of each wrong answer, at least one.
    """
    return 1.0 / (1.0 + sum(_exp(other - answer) for other in wrong))


def truth_ratio_arithmetic(right: float, wrong: Sequence[float]) -> float:
    """R = mean over wrong answers of p(w), divided by p(right); lower means better knowledge.

    The definition of the TOFU paper (section 2.2.2). `right` is the paraphrased answer where there
    is one, else the answer. Arguments as in `normalised_probability`.
    """
    return sum(_exp(other - right) for other in wrong) / len(wrong)


def truth_ratio_geometric(right: float, wrong: Sequence[float]) -> float:
    """R = geometric mean over wrong answers of p(w), divided by p(right): as in TOFU's code.

    R = exp(mean_j log p(w_j) - log p(right)); never above the arithmetic R.
    """
    return _exp(sum(wrong) / len(wrong) - right)


def _exp(nats: float) -> float:
    """e to the power of nats; infinite where a diverged model's losses exceed a float's range."""
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
"""Those that are averaged over the blocks of the general text."""

UNBOUNDED_METRICS = {
    "generated_tokens",
    "forgetting_ce_hard",
    "forgetting_ce_soft",
    "forgetting_kl",
    "text_loss",
}
"""Those that are no shares: their intervals are Student's."""


def item_scores(items: pd.DataFrame, metric: str) -> pd.Series:
    """What a question adds to the mean: max(0, 1 - R) for a truth ratio R, else the value.

    TOFU aggregates the truth ratio on knowledge that is to be kept in this way (its section 2.2.2);
    higher is better. Used on new knowledge too, so that both sides of the trade-off are alike.
    """
    values = items[metric]
    if metric.startswith("truth_ratio"):
        return (1.0 - values).clip(lower=0.0)
    return values


def mean_score(items: pd.DataFrame, probe: str, metric: str) -> float:
    """The value that the selection rule looks at."""
    return float(item_scores(items[items["probe"] == probe], metric).mean())
