"""Which method keeps more: differences on the same questions, at the selected checkpoints.

Who looks for the largest of the k differences of a probe and metric finds one whose own interval
of 95 % leaves out 0 far more often than once in 20: of five equal methods, in a quarter of all
studies. `low_all` and `high_all` are for that: of level 1 - 0.05/k each (Bonferroni), so that all k
hold at once in at least 95 % of studies, and with them whatever is said of the largest. (Of that
one, Holm's steps would say the same: the first of them is this.)
"""

from __future__ import annotations

from itertools import combinations

import pandas as pd

from forgetting.analysis.intervals import tango_interval
from forgetting.evaluation.metrics import item_scores

METRICS = ("rougeL_recall", "truth_ratio_arithmetic", "truth_ratio_geometric")
COLUMNS = (
    *("probe", "metric", "label", "other", "difference"),
    *("low", "high", "low_all", "high_all", "n"),
)
MISS_PROBABILITY = 0.05
"""Share of studies in which a 95 % interval, or one of those for all pairs, may miss."""


def compare_methods(items: pd.DataFrame, selection: pd.DataFrame) -> pd.DataFrame:
    """Every pair of methods on every probe.

    Two models that answer the same questions share what makes a question hard, so that the
    difference is known better than either value: two separate intervals may overlap where the
    interval of the difference is far from 0. A question's score is its mean over the seeds that
    have a checkpoint; the intervals are Tango's (`statistics.difference_interval`).

    Args:
        items: the items of all runs (run, step, probe, item and scores).
        selection: label, run and step of each method and seed.

    Returns:
        probe, metric, label, other, difference (label minus other), low, high (95 %, of the
        pair alone), low_all, high_all (95 % for all pairs of the probe and metric at once), n.
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
                alone = tango_interval(differences, 1 - MISS_PROBABILITY)
                at_once = tango_interval(differences, 1 - MISS_PROBABILITY / len(pairs))
                found = (differences.mean(), *alone, *at_once, len(differences))
                rows.append(dict(zip(COLUMNS, (probe, metric, label, other, *found), strict=True)))
    return pd.DataFrame(rows, columns=list(COLUMNS))
