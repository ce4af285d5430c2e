"""Differences between methods at the selected checkpoints, on the same items.

Every pair of methods is compared on every probe, on the general text and on every benchmark. The
largest of k differences excludes 0 far more often than 5 % of the time where all methods are equal
(in 25 % of studies with five). So the tests of one probe and metric are corrected for all of its
pairs.
"""

from __future__ import annotations

import math

import pandas as pd

from forgetting.analysis.method_differences import COLUMNS, pairwise_differences
from forgetting.evaluation.metrics import (
    PROBE_METRICS,
    TEXT_SCORES,
    UNBOUNDED_METRICS,
    item_scores,
)

COMPARED_METRICS = (
    *(name for name, metric in PROBE_METRICS.items() if metric.compares_methods),
    *TEXT_SCORES,
)


def compare_methods(
    items: pd.DataFrame, benchmark_items: pd.DataFrame, selection: pd.DataFrame
) -> pd.DataFrame:
    """Return the difference of every pair of methods, on every probe and benchmark.

    Args:
        items: the items of all runs (run, step, probe, item and scores).
        benchmark_items: run, step, task, item, metric and value of the main metric of each task.
        selection: label, seed, run and step of each method and seed.

    Returns:
        probe (or task) and metric, then the columns of
        `forgetting.analysis.method_differences.pairwise_differences`.
    """
    chosen = selection.dropna(subset=["step"])[["label", "seed", "run", "step"]]
    parts = [*_probe_scores(items), *_benchmark_scores(benchmark_items)]
    scores = pd.concat(parts).merge(chosen, on=["run", "step"]).assign(cluster=math.nan)
    # A column in which no probe has a score may hold objects.
    scores = scores.astype({"value": float, "is_fraction": bool})
    tables = [
        pairwise_differences(group, is_fraction=bool(group["is_fraction"].iloc[0])).assign(
            probe=probe, metric=metric
        )
        for (probe, metric), group in scores.groupby(["probe", "metric"], sort=False)
    ]
    columns = ["probe", "metric", *COLUMNS]
    return pd.concat(tables)[columns] if tables else pd.DataFrame(columns=columns)


def _probe_scores(items: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the scores of probes and general text by metric, one row per item."""
    return [
        items[["probe", "run", "step", "item"]]
        .assign(
            metric=metric,
            value=item_scores(items, metric),
            is_fraction=metric not in UNBOUNDED_METRICS,
        )
        .dropna(subset=["value"])
        for metric in COMPARED_METRICS
        if metric in items
    ]


def _benchmark_scores(items: pd.DataFrame) -> list[pd.DataFrame]:
    if items.empty:
        return []
    scores = items.rename(columns={"task": "probe"}).assign(is_fraction=True)
    return [scores[["probe", "run", "step", "item", "metric", "value", "is_fraction"]]]
