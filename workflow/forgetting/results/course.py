"""The course of benchmarks over a training: a score for every evaluation, the base at its start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from forgetting.results.statistics import mean_interval, share_interval

PLACE = ("run", "step", "epoch")


def course_items(base: pd.DataFrame, *found: pd.DataFrame) -> pd.DataFrame:
    """Columns run, step, epoch, task, item, metric, value, response, choice; the base is step 0.

    Args:
        base: what the base was asked, in the batches of the trainings.
        found: what the cohorts asked, with run, step and epoch.
    """
    zero = base.assign(run="base", step=0, epoch=0.0)
    return pd.concat([zero[list(found[0].columns)], *found], ignore_index=True)


def course_table(
    items: pd.DataFrame, scores: pd.DataFrame, records: Sequence[Mapping[str, Any]]
) -> pd.DataFrame:
    """One row per run, evaluation and task: value with its 95 % interval, n, chance.

    Args:
        items: what `course_items` returns.
        scores: the scores of the study's benchmarks, which tell what blind guessing has.
        records: of the runs; `tokens` is the step times the mean tokens of a run's steps.
    """
    per_step = {r["run"]: r["tokens"] / max(r["steps"], 1) for r in records} | {"base": 0.0}
    main = scores[(scores["run"] == "base") & scores["main"].astype(bool)]
    chance = dict(zip(main["task"], main["chance"], strict=True))
    rows = []
    for (run, step, epoch, task, metric), group in items.groupby(
        [*PLACE, "task", "metric"], sort=False
    ):
        values = group["value"].to_numpy(dtype=float)
        shares = values.min() >= 0.0 and values.max() <= 1.0
        low, high = share_interval(values) if shares else mean_interval(values)
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
