"""The figure of the benchmarks that are asked at every evaluation of a training."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np
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
        *_levels(rows),
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


def _levels(rows: pd.DataFrame) -> list[alt.Chart]:
    """The level lines of base and of blind guessing with their names; near each other, one text
    above the upper line names both."""
    found = {
        "base": rows[rows["step"] == 0]["value"].dropna().head(1),
        "chance": rows["chance"].dropna().head(1),
    }
    levels = {name: float(value.iloc[0]) for name, value in found.items() if len(value)}
    drawn = [_rule(value, _STYLES[name]) for name, value in levels.items()]
    if len(levels) == 2 and abs(levels["base"] - levels["chance"]) < NEAR * _height(rows):
        lower, upper = sorted(levels, key=lambda name: levels[name])
        equal = levels[lower] == levels[upper]
        words = "base and chance" if equal else f"{upper}, above {lower}"
        return [*drawn, _words(levels[upper], words)]
    return drawn + [_words(value, name) for name, value in levels.items()]


_STYLES = {"base": "reference", "chance": "chance"}
NEAR = 0.08
"""Lines nearer than this share of a panel's height have no room for a name between them."""


def _height(rows: pd.DataFrame) -> float:
    """What a panel shows at least, from its lowest value to its highest."""
    shown = rows[["value", "low", "high", "chance"]].to_numpy(dtype=float)
    return float(np.nanmax(shown) - np.nanmin(shown))


def _rule(value: float, style: str) -> alt.Chart:
    level = alt.Chart(pd.DataFrame({"level": [value]}))
    return level.mark_rule(style=style).encode(y="level:Q")


def _words(value: float, text: str) -> alt.Chart:
    words = alt.Chart(pd.DataFrame({"level": [value]})).mark_text(
        style="reference-label", align="right", dx=-2, dy=-7
    )
    return words.encode(x=alt.value("width"), y="level:Q", text=alt.value(text))
