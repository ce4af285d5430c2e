"""Benchmarks by duration of the training: how much is learnt and lost with more tokens.

Biderman et al. 2024 (arXiv 2405.09673) measure forgetting by the mean of HellaSwag,
ARC-Challenge and WinoGrande.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

FORGETTING_TASKS = ("hellaswag", "arc_challenge", "winogrande")
FORGETTING_MEAN = "forgetting_mean"
DURATION_COLUMNS = (
    *("run", "step", "method", "label", "duration", "seed", "tokens"),
    *("task", "metric", "value", "low", "high", "n", "chance"),
)


def duration_table(benchmarks: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the main metric of every benchmark of every scored model, with the tokens trained on.

    Each model that was scored on all of `FORGETTING_TASKS` also has the row `forgetting_mean`.

    Args:
        benchmarks: the scores of all models with their intervals (`benchmark_tables`).
        runs: run, duration (epochs) and tokens. The base has 0 of both.
    """
    main = benchmarks[benchmarks["main"].astype(bool)]
    lengths = runs[["run", "duration", "tokens"]]
    is_base = lengths["run"] == "base"
    lengths = lengths.assign(
        duration=lengths["duration"].mask(is_base, 0.0), tokens=lengths["tokens"].mask(is_base, 0)
    )
    rows = main.merge(lengths, on="run", how="left", validate="many_to_one")
    means = [
        _forgetting_mean(of_model) for _, of_model in rows.groupby(["run", "step"], sort=False)
    ]
    found = pd.DataFrame([mean for mean in means if mean is not None], columns=rows.columns)
    table = pd.concat([rows, found.astype(rows.dtypes)], ignore_index=True)
    return table[list(DURATION_COLUMNS)]


def _forgetting_mean(rows: pd.DataFrame) -> pd.Series | None:
    """Return the row of a model's mean over the three tasks; None if one was not run.

    The tasks have different items, so the distances from the mean to its bounds are the root of the
    summed squares of theirs, divided by their number (Zou and Donner 2008, Statistics in Medicine
    27:1693).
    """
    tasks = rows[rows["task"].isin(FORGETTING_TASKS)]
    if len(tasks) < len(FORGETTING_TASKS):
        return None
    value = float(tasks["value"].mean())
    below, above = (
        math.sqrt(float(np.square(tasks["value"] - tasks[bound]).sum())) / len(tasks)
        for bound in ("low", "high")
    )
    mean = tasks.iloc[0].copy()
    mean[["task", "metric"]] = FORGETTING_MEAN, "mean"
    mean[["value", "low", "high"]] = value, value - below, value + above
    mean[["n", "chance"]] = tasks["n"].sum(), tasks["chance"].mean()
    return mean
