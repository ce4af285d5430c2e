"""Which method keeps more: differences on the same questions, at the selected checkpoints."""

from __future__ import annotations

from itertools import combinations

import pandas as pd

from forgetting.scores import summands
from forgetting.statistics import mean_interval

METRICS = ("rougeL_recall", "truth_ratio_arithmetic", "truth_ratio_geometric")
COLUMNS = ("probe", "metric", "label", "other", "difference", "low", "high", "n")


def compare_methods(items: pd.DataFrame, selection: pd.DataFrame) -> pd.DataFrame:
    """Every pair of methods on every probe.

    Two models that answer the same questions share what makes a question hard, so that the
    difference is known better than either value: two separate intervals may overlap where the
    interval of the difference is far from 0. A question's score is its mean over the seeds that
    have a checkpoint; the interval is Student's t on the differences per question.

    Args:
        items: the items of all runs (run, step, probe, item and scores).
        selection: label, run and step of each method and seed.

    Returns:
        probe, metric, label, other, difference (label minus other), low, high (95 %), n.
    """
    chosen = selection.dropna(subset=["step"])[["label", "run", "step"]]
    scored = items.merge(chosen, on=["run", "step"], how="inner")
    rows = []
    for metric in METRICS if len(scored) else ():
        values = scored.assign(value=summands(scored, metric)).dropna(subset=["value"])
        for probe, group in values.groupby("probe", sort=False):
            table = group.pivot_table(index="item", columns="label", values="value", sort=False)
            labels = [label for label in chosen["label"].unique() if label in table]
            for label, other in combinations(labels, 2):
                differences = (table[label] - table[other]).dropna().to_numpy()
                low, high = mean_interval(differences)
                row = (probe, metric, label, other, differences.mean(), low, high, len(differences))
                rows.append(dict(zip(COLUMNS, row, strict=True)))
    return pd.DataFrame(rows, columns=list(COLUMNS))
