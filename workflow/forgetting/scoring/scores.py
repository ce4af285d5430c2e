"""The scores of the items table, and what a question adds to the mean of each."""

from __future__ import annotations

import pandas as pd

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

UNBOUNDED = {
    "generated_tokens",
    "forgetting_ce_hard",
    "forgetting_ce_soft",
    "forgetting_kl",
    "text_loss",
}
"""Those that are no shares: their intervals are Student's."""


def summands(items: pd.DataFrame, metric: str) -> pd.Series:
    """What a question adds to the mean: max(0, 1 - R) for a truth ratio R, else the value.

    TOFU aggregates the truth ratio on knowledge that is to be kept in this way (its section 2.2.2);
    higher is better. Used on new knowledge too, so that both sides of the trade-off are alike.
    """
    values = items[metric]
    if metric.startswith("truth_ratio"):
        return (1.0 - values).clip(lower=0.0)
    return values


def metric_value(items: pd.DataFrame, probe: str, metric: str) -> float:
    """The value that the selection rule looks at."""
    return float(summands(items[items["probe"] == probe], metric).mean())
