"""Parts that figures share: theme, colour, emphasis, tooltips, titles, layout.

Colours are configuration of Vega-Lite, for light and dark paper, and not part of a chart.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import altair as alt
import pandas as pd

from forgetting.data.tables import evenly_spaced
from forgetting.report import frames

MAX_OTHER_RUNS = 200
"""Maximum number of drawn runs that were not chosen; each adds 30 to 80 KB to the page."""

IS_FOCUSED = "!length(focus) || indexof(focus, datum.label) >= 0"
_CROSS = "M-1,-1L1,1M-1,1L1,-1"
MENU_SCORE = "\ufffc"
"""First character of an axis title that starts with the score of the menu (`switching_titles`)."""
ANY_FOCUSED = "length(focus) > 0 && indexof(focus, datum.label) >= 0"


FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

# Ranks follow one ramp, which is ordered by lightness. A rank has the same hue on light and dark
# paper. Full fine-tuning has the opposite hue: blue and orange remain distinct under every common
# colour-vision deficiency.
_RAMPS = {
    "light": ["#35a07c", "#2a8fb8", "#3d63bd", "#4a2f9e", "#24124f"],
    "dark": ["#2f9e7c", "#3aa0c8", "#6f9df0", "#a99cff", "#e3dcff"],
}
_FULL = {"light": "#c8500a", "dark": "#ff9a57"}
_BASE = {"light": "#6b7280", "dark": "#9aa4b2"}
_INK = {"light": "#1f2530", "dark": "#e6e9ef"}
_MUTED = {"light": "#5b6472", "dark": "#a3acba"}
_GRID = {"light": "#e7eaee", "dark": "#2b313c"}
MODES = ("light", "dark")


def focus() -> alt.Parameter:
    """Return the parameter with the labels of the highlighted methods; empty means all of them."""
    return alt.param("focus", value=[])


def score_menu() -> alt.Parameter:
    """Return the menu of ROUGE scores; `score_filter` makes a layer show the chosen one."""
    scores = list(frames.SCORES)
    return alt.param(
        "score", value=scores[0], bind=alt.binding_select(options=scores, name="Score")
    )


def split_selected(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of chosen runs, and of up to `MAX_OTHER_RUNS` others across the sweep."""
    is_chosen = rows["chosen"].astype(bool)
    others = rows[~is_chosen]
    drawn = evenly_spaced(list(others["run"].unique()), MAX_OTHER_RUNS)
    return rows[is_chosen], others[others["run"].isin(drawn)]


def score_switch(rows_of: Callable[[str], pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of each metric of the menu, with column `score` for its name."""
    return pd.concat(
        [rows_of(metric).assign(score=score) for score, metric in frames.SCORES.items()],
        ignore_index=True,
    )


def score_filter(layers: Sequence[alt.Chart]) -> list[alt.Chart]:
    """Return the layers restricted to rows of the menu's score."""
    return [layer.transform_filter("datum.score === score") for layer in layers]


def switching_titles(part: Any) -> Any:
    """Return a Vega-Lite specification whose `MENU_SCORE` titles follow the menu.

    Altair has no titles that are expressions.
    """
    if isinstance(part, list):
        return [switching_titles(element) for element in part]
    if not isinstance(part, dict):
        return part
    switched = {key: switching_titles(value) for key, value in part.items()}
    title = switched.get("title")
    if isinstance(title, str) and title.startswith(MENU_SCORE):
        switched["title"] = {"expr": f"score + {json.dumps(title.removeprefix(MENU_SCORE))}"}
    return switched


def opacity(shown: float, faded: float = 0.06, test: str = IS_FOCUSED) -> Any:
    """Return the opacity of a mark that fades unless `test` holds: its method is highlighted."""
    return alt.condition(test, alt.value(shown), alt.value(faded))


def colour(labels: list[str], legend: bool = True) -> alt.Color:
    """Return the colour of a method: its position in the theme's category range.

    Where rows are labelled (no legend), the base is one of them and has the last colour.
    """
    if legend:
        return alt.Color("label:N").scale(domain=labels)
    return alt.Color("label:N").scale(domain=[*labels, "base"]).legend(None)


def number_tooltip(field: str, title: str, pattern: str = ".3f") -> alt.Tooltip:
    """Return a number of a tooltip."""
    return alt.Tooltip(f"{field}:Q", title=title, format=pattern)


def run_tooltip() -> list[alt.Tooltip]:
    """Return the tooltip of a run: method, hyperparameters, seed, status."""
    return [
        alt.Tooltip("label:N", title="method"),
        alt.Tooltip("run:N", title="run"),
        number_tooltip("learning_rate", "learning rate", "~g"),
        number_tooltip("weight_decay", "weight decay", "~g"),
        alt.Tooltip("seed:N", title="seed"),
        alt.Tooltip("status:N", title="status"),
    ]


def value_tooltip(name: str, suffix: str = "", pattern: str = ".3f") -> list[alt.Tooltip]:
    """Return the tooltip of a value: its 95 % interval over the items, and their number."""
    return [
        number_tooltip(f"value{suffix}", name, pattern),
        number_tooltip(f"low{suffix}", "95\u00a0% from", pattern),
        number_tooltip(f"high{suffix}", "to", pattern),
        number_tooltip(f"n{suffix}", "items", ","),
    ]


def grid(values: Iterable[pd.Series], *extra: float | None) -> list[float]:
    """Return round ticks in [0, 1] that enclose every value; the first and last bound the axis.

    Every panel ends on a tick, so that neighbouring panels are aligned.
    """
    finite = [float(value) for series in values for value in series.dropna()]
    finite += [value for value in extra if value is not None]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    step = 1 if high - low <= 0.45 else 2
    # 1e-9 absorbs the rounding error of a value that is itself a tick.
    first = min(max(math.floor((low * 10 + 1e-9) / step) * step, 0), 10 - step)
    last = max(math.ceil((high * 10 - 1e-9) / step) * step, first + step)
    return [tick / 10 for tick in range(first, last + 1, step)]


def rouge_axis(field: str, title: str, ticks: list[float]) -> alt.Y:
    """Return a vertical axis with these ticks, from the first to the last."""
    y = alt.Y(f"{field}:Q").scale(domain=(ticks[0], ticks[-1]), zero=False)
    return y.axis(title=title, values=ticks, format=".1f")


def panel_title(name: str, subtitle: str, width: int = 30) -> alt.TitleParams:
    """Return the heading of a panel; long names are wrapped."""
    return alt.TitleParams(text=textwrap.wrap(name, width) or [name], subtitle=[subtitle])


def trajectory_lines(
    chosen: pd.DataFrame,
    others: pd.DataFrame,
    encoding: dict[str, Any],
    tooltip: list[alt.Tooltip],
) -> list[alt.Chart]:
    """Return runs as lines over time; chosen runs have a dot at every evaluation."""
    faint = alt.Chart(others).mark_line(strokeWidth=1, aria=False)
    return [
        faint.encode(
            **encoding,
            detail="run:N",
            order="step:Q",
            opacity=opacity(0.28, 0, f"({IS_FOCUSED})"),
        ),
        alt.Chart(chosen)
        .mark_line(strokeJoin="round", strokeWidth=2)
        .encode(**encoding, detail="run:N", order="step:Q", opacity=opacity(0.9)),
        alt.Chart(chosen)
        .mark_point(filled=True, size=14)
        .encode(**encoding, opacity=opacity(0.8), tooltip=tooltip),
    ]


def selected_marker(rows: pd.DataFrame, x: str, y: str, tooltip: list[alt.Tooltip]) -> alt.Chart:
    """Return the mark of selected checkpoints: a circle in the colour of the text."""
    mark = alt.Chart(rows).mark_point(style="ring", size=120, filled=False)
    encoded: alt.Chart = mark.encode(x=f"{x}:Q", y=f"{y}:Q", opacity=opacity(1), tooltip=tooltip)
    return encoded


def diverged_marker(rows: pd.DataFrame, x: str, y: str) -> alt.Chart:
    """Return a cross where a run diverged or failed."""
    mark = alt.Chart(rows).mark_point(style="broken", shape=_CROSS, size=30)
    encoded: alt.Chart = mark.encode(
        x=f"{x}:Q", y=f"{y}:Q", opacity=opacity(0.8), tooltip=run_tooltip()
    )
    return encoded


def stack_panels(layers: Sequence[alt.Chart]) -> alt.LayerChart:
    """Return one panel of the layers that have data; empty layers would disturb the scales."""
    return alt.LayerChart(layer=[layer for layer in layers if len(layer.data)])


def combine_panels(
    panels: Sequence[alt.Chart | alt.LayerChart],
    params: Sequence[alt.Parameter],
    description: str,
    narrowest: int,
    columns: int = 3,
) -> alt.ConcatChart:
    """Return a figure of several panels, with the layout that the page adapts to its width."""
    layout = {"narrowest": narrowest, "columns": len(panels)}
    figure = alt.concat(*panels, columns=min(columns, len(panels)))
    figure = figure.properties(usermeta={"layout": layout}, description=description)
    return figure.add_params(*params)


def empty_chart(text: str) -> alt.ConcatChart:
    """Return a figure that says in one sentence why there is nothing to draw."""
    rows = pd.DataFrame({"text": [text]})
    words = alt.Chart(rows).mark_text(style="absent", lineBreak="\n").encode(text="text:N")
    return combine_panels([words.properties(width=280, height=60)], [focus()], text, narrowest=280)


def palette(kinds: list[str], mode: str) -> list[str]:
    """Return one colour per method, in their order, and the base's colour at the end.

    Args:
        kinds: `lora`, `hybrid` or `full` for each method.
        mode: `light` or `dark`.
    """
    adapters = [index for index, kind in enumerate(kinds) if kind != "full"]
    ramp = dict(zip(adapters, _ramp_colours(_RAMPS[mode], len(adapters)), strict=True))
    return [ramp.get(index, _FULL[mode]) for index in range(len(kinds))] + [_BASE[mode]]


def _ramp_colours(stops: list[str], count: int) -> list[str]:
    """Return `count` colours, evenly spaced along a ramp of stops."""
    if count == 1:
        return [stops[1]]
    positions = [index * (len(stops) - 1) / (count - 1) for index in range(count)]
    return [_mix(stops, position) for position in positions]


def _mix(stops: list[str], position: float) -> str:
    """Return the colour at a position on the ramp, in units of stops."""
    first = min(int(position), len(stops) - 2)
    weight = position - first
    channels = (
        round((1 - weight) * int(stops[first][at : at + 2], 16) + weight * int(second, 16))
        for at in (1, 3, 5)
        for second in [stops[first + 1][at : at + 2]]
    )
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def theme(kinds: list[str], mode: str) -> dict[str, Any]:
    """Return the Vega-Lite configuration, with the methods' colours as its category range."""
    ink, quiet, grid = _INK[mode], _MUTED[mode], _GRID[mode]
    return {
        "background": "transparent" if mode == "dark" else "white",
        "font": FONT,
        "padding": 4,
        "range": {"category": palette(kinds, mode)},
        "view": {"stroke": None},
        "axis": {
            "labelColor": quiet,
            "titleColor": quiet,
            "labelFontSize": 11,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "titlePadding": 8,
            "gridColor": grid,
            "domainColor": grid,
            "tickColor": grid,
            "tickSize": 4,
            "labelPadding": 4,
        },
        "legend": {
            "labelColor": ink,
            "titleColor": quiet,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "symbolStrokeWidth": 2.5,
            "labelLimit": 200,
            "title": None,
            "orient": "top",
            "columns": 6,
            "symbolType": "stroke",
            "symbolOpacity": 1,
        },
        "title": {
            "color": ink,
            "subtitleColor": quiet,
            "fontSize": 13,
            "subtitleFontSize": 11,
            "fontWeight": 600,
            "anchor": "start",
            "frame": "group",
            "offset": 8,
        },
        "concat": {"spacing": 28},
        "style": {
            "reference": {"color": quiet, "strokeDash": [4, 3], "strokeWidth": 1.2},
            "reference-label": {"color": quiet, "fontSize": 11},
            "base": {"color": _BASE[mode]},
            "ring": {"color": ink, "strokeWidth": 1.5},
            "absent": {"color": quiet, "fontSize": 11, "fontStyle": "italic"},
            "broken": {"color": ink, "strokeWidth": 1.6},
            "chance": {"color": quiet, "strokeDash": [1, 3], "strokeWidth": 1.6},
        },
    }
