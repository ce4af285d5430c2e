"""Differences between methods on the same questions, at the selected checkpoints.

The largest of k pairwise differences excludes 0 far more often than 5 % of the time under the null
(in 25 % of studies with five equal methods). `low_all` and `high_all` are Bonferroni-corrected,
with level 1 - 0.05/k: they hold for all k pairs simultaneously in at least 95 % of studies, and so
for the largest difference. Holm's procedure gives the largest difference the same bounds.
"""

from __future__ import annotations

from itertools import combinations

import pandas as pd

from forgetting.analysis.intervals import tango_interval
from forgetting.evaluation.metrics import PROBE_METRICS, item_scores

METRICS = [name for name, metric in PROBE_METRICS.items() if metric.compares_methods]
COMPARISON_COLUMNS = (
    *("probe", "metric", "label", "other", "difference"),
    *("low", "high", "low_all", "high_all", "n"),
)
MISS_PROBABILITY = 0.05
"""Share of studies in which a 95 % interval, or one of those for all pairs, may miss."""


def compare_methods(items: pd.DataFrame, selection: pd.DataFrame) -> pd.DataFrame:
    """Return the difference of every pair of methods on every probe.

    Two models that answer the same questions share what makes a question hard. Their difference is
    therefore known better than either value: two separate intervals may overlap where the interval
    of the difference is far from 0. A question's score is its mean over the seeds that have a
    checkpoint. The intervals are Tango's (`forgetting.analysis.intervals.tango_interval`).

    Args:
        items: the items of all runs (run, step, probe, item and scores).
        selection: label, run and step of each method and seed.

    Returns:
        probe, metric, label, other, difference (label minus other), low, high (95 % for this pair),
        low_all, high_all (95 % for all pairs of the probe and metric simultaneously), n.
    """
    chosen = selection.dropna(subset=["step"])[["label", "run", "step"]]
    scored = items.merge(chosen, on=["run", "step"], how="inner")
    rows = []
    for metric in METRICS if len(scored) else ():
        values = scored.assign(value=item_scores(scored, metric)).dropna(subset=["value"])
        for probe, group in values.groupby("probe", sort=False):
            table = group.pivot_table(index="item", columns="label", values="value", sort=False)
            labels = [label for label in chosen["label"].unique() if label in table]
            pairs = list(combinations(labels, 2))
            for label, other in pairs:
                differences = (table[label] - table[other]).dropna().to_numpy()
                single = tango_interval(differences, 1 - MISS_PROBABILITY)
                simultaneous = tango_interval(differences, 1 - MISS_PROBABILITY / len(pairs))
                numbers = (differences.mean(), *single, *simultaneous, len(differences))
                row = (probe, metric, label, other, *numbers)
                rows.append(dict(zip(COMPARISON_COLUMNS, row, strict=True)))
    return pd.DataFrame(rows, columns=list(COMPARISON_COLUMNS))
