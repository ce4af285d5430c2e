"""ROUGE, probability and truth ratio of one question: pure functions, as TOFU defines them.

Sources: Maini et al. 2024 (TOFU, arXiv 2401.06121, section 2.2) and its code. With l(a) the sum of
-log p over the label tokens of answer a, end-of-sequence included, and |a| their number, the
length-normalised probability is p(a) = exp(-l(a)/|a|). All log-probabilities here are means per
token, -l(a)/|a|, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

from rouge_score.rouge_scorer import RougeScorer


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


def rouge(reference: str, generated: str) -> dict[str, float]:
    """ROUGE of a generated answer against the true one, each in [0, 1].

    ROUGE-L recall = LCS(reference, generated) / |reference| on lower-cased, Porter-stemmed
    alphanumeric tokens (Lin 2004); the score of the papers. Recall forgives any length, so F1
    stands beside it.
    """
    scores = _scorer().score(target=reference, prediction=generated)
    return {
        "rougeL_recall": scores["rougeL"].recall,
        "rougeL_f1": scores["rougeL"].fmeasure,
        "rouge1_recall": scores["rouge1"].recall,
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
