"""Tasks to which several answers were drawn: pass@k, and how many of the answers differ."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from forgetting.benchmarks.pass_rates import FAILING, PASSING
from forgetting.report.tables import Tables, human, labels


@dataclass(frozen=True)
class Sampled:
    """One task: its pass@k by name, and a line per method with mean and interval of each metric,
    the last two of which count the different answers to an item that pass and that fail."""

    task: str
    drawn: str
    rates: list[str]
    lines: list[tuple[str, list[tuple[float, float, float] | None]]]


def sampled(tables: Tables) -> list[Sampled]:
    """Every task of which answers were drawn; seeds are averaged."""
    scores = tables.benchmarks
    if scores.empty:
        return []
    names = scores["metric"].str.partition(",")[0]
    drawn = scores[names == PASSING]["task"].drop_duplicates()
    return [_task(tables, str(task), scores[scores["task"] == task]) for task in drawn]


def _task(tables: Tables, task: str, scores: pd.DataFrame) -> Sampled:
    scores = scores.assign(name=scores["metric"].str.partition(",")[0])
    rates = [str(name) for name in scores["name"].unique() if name.startswith("pass@")]
    settings = tables.config.get("benchmarks", {}).get("tasks", {}).get(task) or {}
    count = settings.get("samples")
    means = scores.groupby(["label", "name"])[["value", "low", "high"]].mean()
    lines = []
    for label in ["base", *labels(tables)]:
        cells: list[tuple[float, float, float] | None] = []
        for name in [*rates, PASSING, FAILING]:
            found = means.loc[label, name].tolist() if (label, name) in means.index else None
            cells.append(tuple(found) if found else None)
        if any(cells):
            lines.append((label, cells))
    return Sampled(human(task), f"{count} answers" if count else "answers", rates, lines)
