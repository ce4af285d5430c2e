"""From items to the trajectory: the mean of every metric on every probe, with its interval.

The course of benchmarks over a training: a score for every evaluation, the base at its start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from forgetting.analysis.intervals import t_interval, tango_interval, wilson_interval
from forgetting.config.evaluation import ALL_PROBES
from forgetting.evaluation.metrics import PROBE_SCORES, TEXT_SCORES, UNBOUNDED_METRICS, item_scores
from forgetting.results.model_utility import UTILITIES, utility_row

RUN_COLUMNS = ("run", "step", "epoch")


def benchmark_trajectory_items(base: pd.DataFrame, *found: pd.DataFrame) -> pd.DataFrame:
    """Columns run, step, epoch, task, item, metric, value, response, choice; the base is step 0.

    Args:
        base: what the base was asked, in the batches of the trainings.
        found: what the run groups asked, with run, step and epoch.
    """
    zero = base.assign(run="base", step=0, epoch=0.0)
    return pd.concat([zero[list(found[0].columns)], *found], ignore_index=True)


def benchmark_trajectory_table(
    items: pd.DataFrame, scores: pd.DataFrame, records: Sequence[Mapping[str, Any]]
) -> pd.DataFrame:
    """One row per run, evaluation and task: value with its 95 % interval, n, chance.

    Args:
        items: what `benchmark_trajectory_items` returns.
        scores: the scores of the study's benchmarks, which tell what blind guessing has.
        records: of the runs; `tokens` is the step times the mean tokens of a run's steps.
    """
    per_step = {r["run"]: r["tokens"] / max(r["steps"], 1) for r in records} | {"base": 0.0}
    main = scores[(scores["run"] == "base") & scores["main"].astype(bool)]
    chance = dict(zip(main["task"], main["chance"], strict=True))
    rows = []
    for (run, step, epoch, task, metric), group in items.groupby(
        [*RUN_COLUMNS, "task", "metric"], sort=False
    ):
        values = group["value"].to_numpy(dtype=float)
        shares = values.min() >= 0.0 and values.max() <= 1.0
        low, high = wilson_interval(values) if shares else t_interval(values)
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


def aggregate_items(
    items: pd.DataFrame, knowledge: Mapping[str, str], base: pd.DataFrame | None = None
) -> pd.DataFrame:
    """One row per probe and metric of one evaluation.

    Args:
        items: what `probes.measure` returned.
        knowledge: `new` or `old` for each probe, `text` for the general text.
        base: the same of the base model; without it the changes are NaN.

    Returns:
        probe, knowledge, metric, value (mean over items), low and high (95 % interval), n, and the
        change against the base with its interval, change_low and change_high: of the
        differences of the two models on the same question, which is narrower than what two separate
        intervals suggest (Tango's, or Student's of what is no share). A metric that was
        not measured on a probe has no row. Over all probes, knowledge `all`, TOFU's model utility
        with either truth ratio, if every probe has one.
    """
    rows = []
    for probe, group in items.groupby("probe", sort=False):
        before = None if base is None else base[base["probe"] == probe].set_index("item")
        for metric in (name for name in (*PROBE_SCORES, *TEXT_SCORES) if name in group):
            values = item_scores(group, metric).dropna()
            if values.empty:
                continue
            interval = t_interval if metric in UNBOUNDED_METRICS else wilson_interval
            low, high = interval(values.to_numpy())
            rows.append(
                {
                    "probe": probe,
                    "knowledge": knowledge[str(probe)],
                    "metric": metric,
                    "value": float(values.mean()),
                    "low": low,
                    "high": high,
                    "n": len(values),
                    **_paired_change(
                        values.set_axis(group.loc[values.index, "item"]), metric, before
                    ),
                }
            )
    for metric in UTILITIES:
        utility = utility_row(items, knowledge, metric, base)
        if utility is not None:
            about = {"probe": ALL_PROBES, "knowledge": "all", "metric": metric}
            rows.append(about | utility)
    return pd.DataFrame(rows)


def _paired_change(values: pd.Series, metric: str, base: pd.DataFrame | None) -> dict[str, float]:
    """Mean difference to the base over the same questions, with its interval."""
    if base is None:
        return {"change": math.nan, "change_low": math.nan, "change_high": math.nan}
    differences = (values - item_scores(base, metric)).dropna().to_numpy()
    interval = t_interval if metric in UNBOUNDED_METRICS else tango_interval
    low, high = interval(differences)
    return {"change": float(differences.mean()), "change_low": low, "change_high": high}
