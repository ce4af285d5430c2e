"""The figures of the report, as Altair charts.

Panels are concatenated, one per probe or benchmark, so that the page can lay them out in as many
columns as fit. Colours are the category range of the theme (report.theme), never part of a chart.
"""

from __future__ import annotations

from typing import Any, Literal

import altair as alt
import pandas as pd

from forgetting.report import parts
from forgetting.report import tables as data
from forgetting.report.course import course
from forgetting.report.distance import distance
from forgetting.report.dot_plots import benchmarks, truth_ratio
from forgetting.report.tables import Tables


def trajectories(tables: Tables, width: int = 250) -> alt.ConcatChart:
    """ROUGE by epoch, a panel per probe; the chosen runs bold, the rest of the sweep faint."""
    # The old probes share a scale, so that their losses can be compared by eye.
    values = {name: _rouge_values(tables, name) for name in _all_probes(tables)}
    old = parts.grid([values[name] for name in data.probes(tables, "old")])
    panels = [
        _course(tables, name, "new", parts.grid([values[name]], _goal(tables, name)))
        for name in data.probes(tables, "new")
    ]
    panels += [_course(tables, name, "old", old) for name in data.probes(tables, "old")]
    if not panels:
        return parts.message("No probe was measured.")
    told = "ROUGE-L by epoch on the new knowledge and on each probe of old knowledge."
    sized = [panel.properties(width=width, height=230) for panel in panels]
    return parts.combine(
        sized, [parts.focus(), parts.score_menu(), _sweep(tables, True)], told, narrowest=230
    )


def _course(tables: Tables, probe: str, knowledge: str, ticks: list[float]) -> alt.LayerChart:
    rows = parts.by_score(lambda metric: data.measured(tables, metric, probe))
    base = parts.by_score(lambda metric: data.base_row(tables, metric, probe))
    picked = parts.by_score(lambda metric: data.at_selected(tables, metric, probe))
    x = alt.X("epoch:Q").title("epoch")
    x = x.axis(tickMinStep=1, grid=False, tickCount=6, labelFlush=False)
    layers = [
        *_threshold_rule(_goal(tables, probe), "y"),
        *(_base_rule(base, "right") if knowledge == "old" else []),
        *_sweep_and_choice(tables, rows, x, ticks),
        parts.broken(data.last_points(rows), "epoch", "value"),
        parts.ring(picked, "epoch", "value", _tip()),
    ]
    title = parts.panel_title(data.human(probe), f"{knowledge} knowledge")
    return parts.stack(parts.of_score(layers)).properties(title=title)


def _sweep_and_choice(
    tables: Tables, rows: pd.DataFrame, x: alt.X, ticks: list[float]
) -> list[alt.Chart]:
    y = parts.rouge_axis("value", parts.LIVE, ticks)
    shade = parts.colour(data.labels(tables))
    chosen, others = parts.chosen_and_others(rows)
    means = data.mean_over_seeds(rows)
    # Where means are drawn, they are the thick lines and every seed is a thin one.
    several = len(means) > 0
    coded: dict[str, Any] = {"x": x, "y": y, "color": shade}
    tip = _tip()
    lines = alt.Chart(chosen).mark_line(strokeJoin="round", strokeWidth=1 if several else 2.2)
    return [
        _faint(others).encode(**coded, order="step:Q"),
        alt.Chart(chosen)
        .mark_area(clip=True)
        .encode(
            x=x,
            y=parts.rouge_axis("low", parts.LIVE, ticks),
            y2="high:Q",
            color=shade,
            detail="run:N",
            opacity=parts.opacity(0.16, 0, parts.ANY_SINGLED),
        ),
        lines.encode(**coded, detail="run:N", opacity=parts.opacity(0.5 if several else 1)),
        alt.Chart(means)
        .mark_line(strokeJoin="round", strokeWidth=2.6)
        .encode(**coded, opacity=parts.opacity(1)),
        alt.Chart(chosen)
        .mark_point(filled=True, size=14)
        .encode(**coded, opacity=parts.opacity(0.6 if several else 1), tooltip=tip),
    ]


def _faint(rows: pd.DataFrame) -> alt.Chart:
    """The runs that were not chosen, as lines that the checkbox `sweep` hides."""
    shown = f"sweep && ({parts.IS_SINGLED})"
    mark = alt.Chart(rows).mark_line(strokeJoin="round", strokeWidth=1, aria=False)
    shade = parts.opacity(0.28, 0, shown)
    lines: alt.Chart = mark.encode(detail="run:N", opacity=shade, tooltip=parts.run_tooltip())
    return lines


def old_versus_new(tables: Tables, width: int = 400) -> alt.ConcatChart:
    """ROUGE on old knowledge against ROUGE on the new, a panel per probe of old knowledge."""
    new, old = data.watched(tables), data.probes(tables, "old")
    if new is None or not old:
        return parts.message("No probe of old knowledge was measured.")
    ticks = parts.grid([_rouge_values(tables, name, bounds=True) for name in old])
    panels = [_plane(tables, new, name, ticks).properties(width=width, height=300) for name in old]
    told = "ROUGE-L on old knowledge against ROUGE-L on the new knowledge."
    params = [parts.focus(), parts.score_menu(), _sweep(tables, False)]
    return parts.combine(panels, params, told, narrowest=230, columns=2)


def _plane(tables: Tables, new: str, old: str, ticks: list[float]) -> alt.LayerChart:
    rows = parts.by_score(lambda metric: data.old_versus_new(tables, metric, new, old))
    chosen, others = parts.chosen_and_others(rows)
    picked = rows.merge(data.selected(tables), on=["run", "step"], how="inner")
    base = parts.by_score(lambda metric: data.base_row(tables, metric, old))
    across = f"{parts.LIVE}, {data.human(new)}"
    x = alt.X("value_new:Q").scale(domain=(0, 1))
    x = x.axis(title=across, grid=False, tickCount=6, labelFlush=False)
    y = parts.rouge_axis("value_old", parts.LIVE, ticks)
    coded: dict[str, Any] = {"x": x, "y": y, "color": parts.colour(data.labels(tables))}
    start = rows[rows["step"] == 0].groupby("score", sort=False).head(1)
    layers = [
        *_base_rule(base, "left"),
        *_threshold_rule(_goal(tables, new), "x"),
        _faint(others).encode(**coded, order="step:Q"),
        alt.Chart(chosen)
        .mark_line(strokeJoin="round", strokeWidth=1.8)
        .encode(**coded, detail="run:N", order="step:Q", opacity=parts.opacity(0.85)),
        alt.Chart(chosen)
        .mark_point(filled=True, size=16)
        .encode(**coded, opacity=parts.opacity(0.9), tooltip=_plane_tip()),
        *_crosses(picked, coded, across, ticks),
        parts.broken(data.last_points(rows), "value_new", "value_old"),
        parts.ring(picked, "value_new", "value_old", _plane_tip()),
        alt.Chart(start)
        .mark_point(style="base", shape="diamond", size=110, filled=True)
        .encode(x="value_new:Q", y="value_old:Q", tooltip=_plane_tip()[-9:]),
    ]
    title = parts.panel_title(data.human(old), "old knowledge")
    return parts.stack(parts.of_score(layers)).properties(title=title)


def _crosses(
    picked: pd.DataFrame, coded: dict[str, Any], across: str, ticks: list[float]
) -> list[alt.Chart]:
    """The 95 % intervals of both coordinates at the selected checkpoints."""
    bounded = picked.dropna(subset=["low_new", "high_new", "low_old", "high_old"])
    mark = alt.Chart(bounded).mark_rule(strokeWidth=1.2)
    shade = {"color": coded["color"], "opacity": parts.opacity(0.65)}
    low_new = alt.X("low_new:Q").axis(title=across)
    low_old = parts.rouge_axis("low_old", parts.LIVE, ticks)
    return [
        mark.encode(x=low_new, x2="high_new:Q", y=coded["y"], **shade),
        mark.encode(x=coded["x"], y=low_old, y2="high_old:Q", **shade),
    ]


def _threshold_rule(goal: float | None, channel: str) -> list[alt.Chart]:
    """A dashed line at the selection rule's threshold, with its value."""
    if goal is None:
        return []
    score = next(iter(data.SCORES))  # the rule is about recall
    rows = pd.DataFrame({"goal": [goal], "text": [f"threshold {goal:g}"], "score": [score]})
    chart = alt.Chart(rows)
    rule = chart.mark_rule(style="reference").encode(**{channel: "goal:Q"})
    if channel == "y":
        # On the left, where nothing is learnt yet, no selected checkpoint lies under the words.
        words = chart.mark_text(style="reference-label", align="left", dx=2, dy=-7)
        return [rule, words.encode(x=alt.value(0), y="goal:Q", text="text:N")]
    words = chart.mark_text(style="reference-label", align="right", dx=-4, dy=-8)
    return [rule, words.encode(x="goal:Q", y=alt.value("height"), text="text:N")]


def _base_rule(base: pd.DataFrame, side: Literal["left", "right"]) -> list[alt.Chart]:
    """A dashed line at the base's value, named on one side: above it nothing is forgotten."""
    tip = [alt.Tooltip("score:N"), *parts.value_tooltip("base")]
    rule = alt.Chart(base).mark_rule(style="reference").encode(y="value:Q", tooltip=tip)
    inset, place = (2, alt.value(0)) if side == "left" else (-2, alt.value("width"))
    words = alt.Chart(base).mark_text(style="reference-label", align=side, dx=inset, dy=-7)
    return [rule, words.encode(x=place, y="value:Q", text=alt.value("base"))]


def _tip() -> list[alt.Tooltip]:
    moment = [parts.number("epoch", "epoch", ".2~f"), parts.number("step", "step", ",")]
    score = alt.Tooltip("score:N")
    return [*parts.run_tooltip(), *moment, score, *parts.value_tooltip("value")]


def _plane_tip() -> list[alt.Tooltip]:
    moment = [parts.number("epoch", "epoch", ".2~f"), parts.number("step", "step", ",")]
    values = [*parts.value_tooltip("new", "_new"), *parts.value_tooltip("old", "_old")]
    return [*parts.run_tooltip(), *moment, alt.Tooltip("score:N"), *values]


def _sweep(tables: Tables, shown: bool) -> alt.Parameter:
    others = int((~tables.tuned["chosen"].astype(bool)).sum())
    told = "Every run of the sweep"
    if others > parts.MOST_OTHERS:
        told = f"{parts.MOST_OTHERS} of {others:,} other runs of the sweep"
    box = alt.binding_checkbox(name=told)
    return alt.param("sweep", value=shown, bind=box)


def _goal(tables: Tables, probe: str) -> float | None:
    """The threshold, on the probe that the selection rule watches."""
    return tables.threshold if probe == data.watched(tables) else None


def _all_probes(tables: Tables) -> list[str]:
    return data.probes(tables, "new") + data.probes(tables, "old")


def _rouge_values(tables: Tables, probe: str, bounds: bool = False) -> pd.Series:
    """All that a ROUGE axis of a probe must hold, whatever the score; with `bounds`, the intervals.

    The axis stays where it is when the menu switches the score.
    """
    found = []
    for metric in data.SCORES.values():
        found.append(data.measured(tables, metric, probe)["value"])
        found.append(data.base_row(tables, metric, probe)["value"])
        if bounds:
            picked = data.at_selected(tables, metric, probe)
            found += [picked["low"], picked["high"]]
    return pd.concat([series.astype(float) for series in found], ignore_index=True)


FIGURES = {
    "trajectories": trajectories,
    "old_versus_new": old_versus_new,
    "truth_ratio": truth_ratio,
    "distance": distance,
    "benchmarks": benchmarks,
    "course": course,
}
