"""The figure of how far the predictions of each method have moved from the base's."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from forgetting.report import parts
from forgetting.report import tables as data
from forgetting.report.tables import Tables
from forgetting.sections.measurement import TEXT_PROBE

KL = "forgetting_kl"
_TITLE = "KL divergence from the base (nats)"


def distance(tables: Tables, width: int = 400) -> alt.ConcatChart:
    """KL divergence from the base on the general text: by epoch, and by what was learnt."""
    rows = data.measured(tables, KL, TEXT_PROBE)
    if not len(rows):
        return parts.message("The study names no general text to compare predictions on.")
    panels = [_panel(tables, rows, "epoch", "epoch", "by epoch")]
    new = data.watched(tables)
    if new is not None:
        learnt = data.measured(tables, data.ROUGE, new)[["run", "step", "value"]]
        rows = rows.merge(learnt.rename(columns={"value": "learnt"}), on=["run", "step"])
        across = f"ROUGE-L recall, {data.human(new)}"
        panels.append(_panel(tables, rows, "learnt", across, "by what was learnt"))
    told = "KL divergence between the base's and the tuned model's predictions on a general text."
    sized = [panel.properties(width=width, height=260) for panel in panels]
    return parts.combine(sized, [parts.focus()], told, narrowest=230, columns=2)


def _panel(
    tables: Tables, rows: pd.DataFrame, across: str, title: str, subtitle: str
) -> alt.LayerChart:
    x = alt.X(f"{across}:Q").title(title).axis(grid=False, tickCount=6, labelFlush=False)
    # The square root shows the small distances of careful methods beside the large ones of others.
    y = alt.Y("value:Q").title(_TITLE).scale(type="sqrt").axis(tickCount=6)
    coded: dict[str, Any] = {"x": x, "y": y, "color": parts.colour(data.labels(tables))}
    chosen, others = parts.chosen_and_others(rows)
    picked = rows.merge(data.selected(tables), on=["run", "step"], how="inner")
    tip = [
        *parts.run_tooltip(),
        parts.number("epoch", "epoch", ".2~f"),
        *parts.value_tooltip("KL", pattern=".4f"),
    ]
    layers = [
        *parts.paths(chosen, others, coded, tip),
        parts.broken(data.last_points(rows), across, "value"),
        parts.ring(picked, across, "value", tip),
    ]
    return parts.stack(layers).properties(title=parts.panel_title("general text", subtitle))
