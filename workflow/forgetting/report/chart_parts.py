"""What the figures have in common: colour, emphasis, tooltips, titles, layout."""

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
"""Runs that were not chosen and are drawn all the same: each adds 30 to 80 KB to the page."""

IS_FOCUSED = "!length(focus) || indexof(focus, datum.label) >= 0"
_CROSS = "M-1,-1L1,1M-1,1L1,-1"
FOCUS_SELECTION = "\ufffc"
"""Begins an axis title that begins with the score of the menu; see `switching_titles`."""
ANY_FOCUSED = "length(focus) > 0 && indexof(focus, datum.label) >= 0"


def focus() -> alt.Parameter:
    """The labels of the methods that the reader singled out; empty means all of them."""
    return alt.param("focus", value=[])


def score_menu() -> alt.Parameter:
    """The menu of ROUGE scores; a layer shows the rows of the chosen one by `score_filter`."""
    scores = list(frames.SCORES)
    return alt.param(
        "score", value=scores[0], bind=alt.binding_select(options=scores, name="Score")
    )


def split_selected(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of chosen runs, and of others so many as a page can draw, spread over the sweep."""
    chosen = rows["chosen"].astype(bool)
    others = rows[~chosen]
    drawn = evenly_spaced(list(others["run"].unique()), MAX_OTHER_RUNS)
    return rows[chosen], others[others["run"].isin(drawn)]


def score_switch(made: Callable[[str], pd.DataFrame]) -> pd.DataFrame:
    """The rows that a function makes of each metric of the menu, told apart by `score`."""
    return pd.concat(
        [made(metric).assign(score=score) for score, metric in frames.SCORES.items()],
        ignore_index=True,
    )


def score_filter(layers: Sequence[alt.Chart]) -> list[alt.Chart]:
    """Layers that show only rows of the score of the menu."""
    return [layer.transform_filter("datum.score === score") for layer in layers]


def switching_titles(part: Any) -> Any:
    """A specification in which titles begun with `FOCUS_SELECTION` follow the menu (Altair knows no
    " "such)."""
    if isinstance(part, list):
        return [switching_titles(one) for one in part]
    if not isinstance(part, dict):
        return part
    found = {key: switching_titles(value) for key, value in part.items()}
    title = found.get("title")
    if isinstance(title, str) and title.startswith(FOCUS_SELECTION):
        found["title"] = {"expr": f"score + {json.dumps(title.removeprefix(FOCUS_SELECTION))}"}
    return found


def opacity(shown: float, faded: float = 0.06, test: str = IS_FOCUSED) -> Any:
    """Opacity of a mark that fades unless its method is singled out (or `test` holds)."""
    return alt.condition(test, alt.value(shown), alt.value(faded))


def colour(labels: list[str], legend: bool = True) -> alt.Color:
    """A method's colour: its place in the theme's category range.

    Where rows are labelled (no legend), the base is one of them; its colour is the range's last.
    """
    if legend:
        return alt.Color("label:N").scale(domain=labels)
    return alt.Color("label:N").scale(domain=[*labels, "base"]).legend(None)


def number_format(field: str, title: str, pattern: str = ".3f") -> alt.Tooltip:
    """A number of the tooltip."""
    return alt.Tooltip(f"{field}:Q", title=title, format=pattern)


def run_tooltip() -> list[alt.Tooltip]:
    """Which run it is: method, hyper-parameters, seed, status."""
    return [
        alt.Tooltip("label:N", title="method"),
        alt.Tooltip("run:N", title="run"),
        number_format("learning_rate", "learning rate", "~g"),
        number_format("weight_decay", "weight decay", "~g"),
        alt.Tooltip("seed:N", title="seed"),
        alt.Tooltip("status:N", title="status"),
    ]


def value_tooltip(name: str, suffix: str = "", pattern: str = ".3f") -> list[alt.Tooltip]:
    """A value with its 95 % interval over the items, and their number."""
    return [
        number_format(f"value{suffix}", name, pattern),
        number_format(f"low{suffix}", "95\u00a0% from", pattern),
        number_format(f"high{suffix}", "to", pattern),
        number_format(f"n{suffix}", "items", ","),
    ]


def grid(values: Iterable[pd.Series], *extra: float | None) -> list[float]:
    """Round ticks in [0, 1] that enclose every value; the first and last bound the axis.

    Every panel ends on a tick, so that neighbours line up.
    """
    finite = [float(value) for series in values for value in series.dropna()]
    finite += [value for value in extra if value is not None]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    step = 1 if high - low <= 0.45 else 2
    # 1e-9 forgives what floating point adds to a value that is itself a tick.
    first = min(max(math.floor((low * 10 + 1e-9) / step) * step, 0), 10 - step)
    last = max(math.ceil((high * 10 - 1e-9) / step) * step, first + step)
    return [tick / 10 for tick in range(first, last + 1, step)]


def rouge_axis(field: str, title: str, ticks: list[float]) -> alt.Y:
    """A vertical axis with these ticks, from the first to the last."""
    y = alt.Y(f"{field}:Q").scale(domain=(ticks[0], ticks[-1]), zero=False)
    return y.axis(title=title, values=ticks, format=".1f")


def panel_title(name: str, subtitle: str, width: int = 30) -> alt.TitleParams:
    """A panel's heading; long names are wrapped."""
    return alt.TitleParams(text=textwrap.wrap(name, width) or [name], subtitle=[subtitle])


def trajectory_lines(
    chosen: pd.DataFrame, others: pd.DataFrame, coded: dict[str, Any], tip: list[alt.Tooltip]
) -> list[alt.Chart]:
    """Runs as lines in the order of time: the chosen ones with a dot for every evaluation."""
    faint = alt.Chart(others).mark_line(strokeWidth=1, aria=False)
    return [
        faint.encode(
            **coded,
            detail="run:N",
            order="step:Q",
            opacity=opacity(0.28, 0, f"({IS_FOCUSED})"),
        ),
        alt.Chart(chosen)
        .mark_line(strokeJoin="round", strokeWidth=2)
        .encode(**coded, detail="run:N", order="step:Q", opacity=opacity(0.9)),
        alt.Chart(chosen)
        .mark_point(filled=True, size=14)
        .encode(**coded, opacity=opacity(0.8), tooltip=tip),
    ]


def selected_marker(rows: pd.DataFrame, x: str, y: str, tip: list[alt.Tooltip]) -> alt.Chart:
    """The mark of a selected checkpoint: an empty circle in the colour of the text."""
    mark = alt.Chart(rows).mark_point(style="ring", size=120, filled=False)
    placed: alt.Chart = mark.encode(x=f"{x}:Q", y=f"{y}:Q", opacity=opacity(1), tooltip=tip)
    return placed


def diverged_marker(rows: pd.DataFrame, x: str, y: str) -> alt.Chart:
    """A cross where a run diverged or failed."""
    mark = alt.Chart(rows).mark_point(style="broken", shape=_CROSS, size=30)
    tip = run_tooltip()
    placed: alt.Chart = mark.encode(x=f"{x}:Q", y=f"{y}:Q", opacity=opacity(0.8), tooltip=tip)
    return placed


def stack_panels(layers: Sequence[alt.Chart]) -> alt.LayerChart:
    """One panel of these layers, but those without data, which would only confuse the scales."""
    return alt.LayerChart(layer=[layer for layer in layers if len(layer.data)])


def combine_panels(
    panels: Sequence[alt.Chart | alt.LayerChart],
    params: Sequence[alt.Parameter],
    description: str,
    narrowest: int,
    columns: int = 3,
) -> alt.ConcatChart:
    """Panels side by side, and what the page needs to lay them out anew."""
    layout = {"narrowest": narrowest, "columns": len(panels)}
    figure = alt.concat(*panels, columns=min(columns, len(panels)))
    figure = figure.properties(usermeta={"layout": layout}, description=description)
    return figure.add_params(*params)


def empty_chart(text: str) -> alt.ConcatChart:
    """A figure that says in one sentence why there is nothing to draw."""
    rows = pd.DataFrame({"text": [text]})
    words = alt.Chart(rows).mark_text(style="absent", lineBreak="\n").encode(text="text:N")
    return combine_panels([words.properties(width=280, height=60)], [focus()], text, narrowest=280)
