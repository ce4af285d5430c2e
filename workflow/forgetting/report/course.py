"""The figure of the benchmarks that are asked at every evaluation of a training."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from forgetting.report import parts
from forgetting.report import tables as data
from forgetting.report.dot_plots import harness_metric
from forgetting.report.tables import Tables


def course(tables: Tables, width: int = 250) -> alt.ConcatChart:
    """Accuracy by epoch, a panel per benchmark, with the base's and that of blind guessing."""
    found = tables.course
    metrics = dict(zip(found["task"], found["metric"], strict=True)) if len(found) else {}
    panels = [
        _panel(tables, task, metric, rows)
        for task, metric in metrics.items()
        if len(rows := data.asked_along(tables, task))
    ]
    if not panels:
        return parts.message("The study asks no benchmarks while it trains.")
    told = "Benchmark scores by epoch, with the base's score and that of blind guessing."
    sized = [panel.properties(width=width, height=230) for panel in panels]
    return parts.combine(sized, [parts.focus()], told, narrowest=230)


def _panel(tables: Tables, task: str, metric: str, rows: pd.DataFrame) -> alt.LayerChart:
    chosen, others = parts.chosen_and_others(rows)
    picked = rows.merge(data.selected(tables), on=["run", "step"], how="inner")
    x = alt.X("epoch:Q").title("epoch").axis(grid=False, tickCount=6, labelFlush=False)
    y = alt.Y("value:Q").title(harness_metric(metric)).scale(zero=False).axis(tickCount=6)
    coded: dict[str, Any] = {"x": x, "y": y, "color": parts.colour(data.labels(tables))}
    tip = [
        *parts.run_tooltip(),
        parts.number("epoch", "epoch", ".2~f"),
        *parts.value_tooltip("score"),
    ]
    layers = [
        *_level(rows[rows["step"] == 0], "value", "reference", "base"),
        *_level(rows, "chance", "chance", "chance"),
        alt.Chart(chosen)
        .mark_area(clip=True)
        .encode(
            x=x,
            y=alt.Y("low:Q").title(harness_metric(metric)),
            y2="high:Q",
            color=coded["color"],
            detail="run:N",
            opacity=parts.opacity(0.16, 0, parts.ANY_SINGLED),
        ),
        *parts.paths(chosen, others, coded, tip),
        parts.broken(data.last_points(rows), "epoch", "value"),
        parts.ring(picked, "epoch", "value", tip),
    ]
    count = f"{int(rows['n'].max())} items"
    return parts.stack(layers).properties(title=parts.panel_title(data.human(task), count))


def _level(rows: pd.DataFrame, field: str, style: str, word: str) -> list[alt.Chart]:
    """A level line and what it is called."""
    level = rows[[field]].dropna().head(1)
    rule = alt.Chart(level).mark_rule(style=style).encode(y=f"{field}:Q")
    words = alt.Chart(level).mark_text(style="reference-label", align="right", dx=-2, dy=-7)
    place = alt.value("width")
    return [rule, words.encode(x=place, y=f"{field}:Q", text=alt.value(word))]
