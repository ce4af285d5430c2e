"""Trajectories of runs: means with intervals over items, at every evaluation.

Probes and general text are aggregated by metric, in-training benchmarks by task. The base model is
step 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from forgetting.analysis.intervals import t_interval, tango_interval, wilson_interval
from forgetting.config.evaluation import ALL_PROBES
from forgetting.evaluation.metrics import (
    PROBE_METRICS,
    TEXT_SCORES,
    UNBOUNDED_METRICS,
    item_scores,
)
from forgetting.results.model_utility import UTILITIES, utility_row

RUN_COLUMNS = ("run", "step", "epoch")


def tokens_per_step(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean number of tokens of each run's steps; only a run's total is recorded."""
    return {record["run"]: record["tokens"] / max(record["steps"], 1) for record in records}


def trajectory_table(
    base_items: pd.DataFrame,
    run_group_items: Sequence[pd.DataFrame],
    records: Sequence[Mapping[str, Any]],
    knowledge: Mapping[str, str],
) -> pd.DataFrame:
    """Return the metrics of every run on every probe, at every evaluation.

    Returns:
        run, step, epoch, tokens (the step times the mean number of tokens of the run's steps), then
        the columns of `aggregate_items`.
    """
    parts = [aggregate_items(base_items, knowledge).assign(run="base", step=0, epoch=0.0, tokens=0)]
    per_step = tokens_per_step(records)
    for items in run_group_items:
        if items.empty:
            continue
        for (run, step, epoch), group in items.groupby(list(RUN_COLUMNS), sort=False):
            tokens = round(per_step[str(run)] * int(step))
            parts.append(
                aggregate_items(group, knowledge, base_items).assign(
                    run=run, step=step, epoch=epoch, tokens=tokens
                )
            )
    table = pd.concat(parts, ignore_index=True)
    first = [*RUN_COLUMNS, "tokens"]
    return table[[*first, *(name for name in table.columns if name not in first)]]


def aggregate_items(
    items: pd.DataFrame, knowledge: Mapping[str, str], base: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Return one row per probe and metric of one evaluation.

    Args:
        items: the items that `evaluate_probes` returns.
        knowledge: `new` or `old` for each probe, `text` for the general text.
        base: the items of the base model; without them the changes are NaN.

    Returns:
        probe, knowledge, metric, value (mean over items), low and high (95 % interval), n, and the
        change against the base with its interval, change_low and change_high. The change is paired
        by question, so its interval is narrower than two separate intervals suggest. It is Tango's,
        or Student's for an unbounded metric. A metric that was not measured on a probe has no row.
        With knowledge `all` there is TOFU's model utility with either truth ratio, if every probe
        has wrong answers.
    """
    rows = []
    for probe, group in items.groupby("probe", sort=False):
        base_group = None if base is None else base[base["probe"] == probe].set_index("item")
        for metric in (name for name in (*PROBE_METRICS, *TEXT_SCORES) if name in group):
            values = item_scores(group, metric).dropna()
            if values.empty:
                continue
            interval = t_interval if metric in UNBOUNDED_METRICS else wilson_interval
            low, high = interval(values.to_numpy())
            by_item = values.set_axis(group.loc[values.index, "item"])
            rows.append(
                {
                    "probe": probe,
                    "knowledge": knowledge[str(probe)],
                    "metric": metric,
                    "value": float(values.mean()),
                    "low": low,
                    "high": high,
                    "n": len(values),
                    **_paired_change(by_item, metric, base_group),
                }
            )
    for metric in UTILITIES:
        utility = utility_row(items, knowledge, metric, base)
        if utility is not None:
            rows.append({"probe": ALL_PROBES, "knowledge": "all", "metric": metric} | utility)
    return pd.DataFrame(rows)


def _paired_change(values: pd.Series, metric: str, base: pd.DataFrame | None) -> dict[str, float]:
    """Return the mean difference to the base over the same questions, with its interval."""
    if base is None:
        return {"change": math.nan, "change_low": math.nan, "change_high": math.nan}
    differences = (values - item_scores(base, metric)).dropna().to_numpy()
    interval = t_interval if metric in UNBOUNDED_METRICS else tango_interval
    low, high = interval(differences)
    return {"change": float(differences.mean()), "change_low": low, "change_high": high}


def benchmark_trajectory_items(base: pd.DataFrame, *run_groups: pd.DataFrame) -> pd.DataFrame:
    """Return the items of in-training benchmarks, with the base as run `base` at step 0.

    Args:
        base: the base's items of the same tasks, evaluated in the batches of the trainings.
        run_groups: the items of the run groups, with run, step and epoch.

    Returns:
        run, step, epoch, task, item, metric, value, response, choice.
    """
    zero = base.assign(run="base", step=0, epoch=0.0)
    return pd.concat([zero[list(run_groups[0].columns)], *run_groups], ignore_index=True)


def benchmark_trajectory_table(
    items: pd.DataFrame, scores: pd.DataFrame, records: Sequence[Mapping[str, Any]]
) -> pd.DataFrame:
    """Return one row per run, evaluation and task: value with its 95 % interval, n, chance.

    Args:
        items: the items that `benchmark_trajectory_items` returns.
        scores: the scores of the study's benchmarks, which have the chance levels of the tasks.
        records: the records of the runs. `tokens` is the step times a run's mean tokens per step.
    """
    per_step = tokens_per_step(records) | {"base": 0.0}
    main = scores[(scores["run"] == "base") & scores["main"].astype(bool)]
    chance = dict(zip(main["task"], main["chance"], strict=True))
    rows = []
    for (run, step, epoch, task, metric), group in items.groupby(
        [*RUN_COLUMNS, "task", "metric"], sort=False
    ):
        values = group["value"].to_numpy(dtype=float)
        is_bounded = values.min() >= 0.0 and values.max() <= 1.0
        low, high = wilson_interval(values) if is_bounded else t_interval(values)
        rows.append(
            {
                "run": run,
                "step": step,
                "epoch": epoch,
                "tokens": round(per_step[str(run)] * int(step)),
                "task": task,
                "metric": metric,
                "value": float(values.mean()),
                "low": low,
                "high": high,
                "n": len(values),
                "chance": chance[task],
            }
        )
    return pd.DataFrame(rows)
