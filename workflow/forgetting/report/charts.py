"""The figures of the report, as Altair charts.

Panels are concatenated, one per probe or benchmark, so that the page can lay them out in as many
columns as fit. Colours are the category range of the theme (report.theme), never part of a chart.

The figure of the benchmarks that are asked at every evaluation of a training.

The figure of how far the predictions of each method have moved from the base's.
"""

from __future__ import annotations

from typing import Any, Literal

import altair as alt
import numpy as np
import pandas as pd

from forgetting.config.evaluation import TEXT_PROBE
from forgetting.report import chart_parts, frames
from forgetting.report.dot_plots import benchmarks, harness_metric, truth_ratio
from forgetting.report.frames import ReportTables


def benchmark_trajectories(tables: ReportTables, width: int = 250) -> alt.ConcatChart:
    """Accuracy by epoch, a panel per benchmark, with the base's and that of blind guessing."""
    found = tables.benchmark_trajectory
    metrics = dict(zip(found["task"], found["metric"], strict=True)) if len(found) else {}
    panels = [
        _benchmark_panel(tables, task, metric, rows)
        for task, metric in metrics.items()
        if len(rows := frames.training_benchmarks(tables, task))
    ]
    if not panels:
        return chart_parts.empty_chart("The study asks no benchmarks while it trains.")
    told = "Benchmark scores by epoch, with the base's score and that of blind guessing."
    sized = [panel.properties(width=width, height=230) for panel in panels]
    return chart_parts.combine_panels(sized, [chart_parts.focus()], told, narrowest=230)


def _benchmark_panel(
    tables: ReportTables, task: str, metric: str, rows: pd.DataFrame
) -> alt.LayerChart:
    chosen, others = chart_parts.split_selected(rows)
    picked = rows.merge(frames.selected_runs(tables), on=["run", "step"], how="inner")
    x = alt.X("epoch:Q").title("epoch").axis(grid=False, tickCount=6, labelFlush=False)
    y = alt.Y("value:Q").title(harness_metric(metric)).scale(zero=False).axis(tickCount=6)
    coded: dict[str, Any] = {
        "x": x,
        "y": y,
        "color": chart_parts.colour(frames.method_labels(tables)),
    }
    tip = [
        *chart_parts.run_tooltip(),
        chart_parts.number_format("epoch", "epoch", ".2~f"),
        *chart_parts.value_tooltip("score"),
    ]
    layers = [
        *_reference_levels(rows),
        alt.Chart(chosen)
        .mark_area(clip=True)
        .encode(
            x=x,
            y=alt.Y("low:Q").title(harness_metric(metric)),
            y2="high:Q",
            color=coded["color"],
            detail="run:N",
            opacity=chart_parts.opacity(0.16, 0, chart_parts.ANY_FOCUSED),
        ),
        *chart_parts.trajectory_lines(chosen, others, coded, tip),
        chart_parts.diverged_marker(frames.last_evaluations(rows), "epoch", "value"),
        chart_parts.selected_marker(picked, "epoch", "value", tip),
    ]
    count = f"{int(rows['n'].max())} items"
    return chart_parts.stack_panels(layers).properties(
        title=chart_parts.panel_title(frames.humanize(task), count)
    )


def _reference_levels(rows: pd.DataFrame) -> list[alt.Chart]:
    """The level lines of base and of blind guessing with their names; near each other, one text
    above the upper line names both."""
    found = {
        "base": rows[rows["step"] == 0]["value"].dropna().head(1),
        "chance": rows["chance"].dropna().head(1),
    }
    levels = {name: float(value.iloc[0]) for name, value in found.items() if len(value)}
    drawn = [_reference_rule(value, _STYLES[name]) for name, value in levels.items()]
    if len(levels) == 2 and abs(levels["base"] - levels["chance"]) < NEAR_FRACTION * _height(rows):
        lower, upper = sorted(levels, key=lambda name: levels[name])
        equal = levels[lower] == levels[upper]
        words = "base and chance" if equal else f"{upper}, above {lower}"
        return [*drawn, _level_words(levels[upper], words)]
    return drawn + [_level_words(value, name) for name, value in levels.items()]


_STYLES = {"base": "reference", "chance": "chance"}
NEAR_FRACTION = 0.08
"""Lines nearer than this share of a panel's height have no room for a name between them."""


def _height(rows: pd.DataFrame) -> float:
    """What a panel shows at least, from its lowest value to its highest."""
    shown = rows[["value", "low", "high", "chance"]].to_numpy(dtype=float)
    return float(np.nanmax(shown) - np.nanmin(shown))


def _reference_rule(value: float, style: str) -> alt.Chart:
    level = alt.Chart(pd.DataFrame({"level": [value]}))
    return level.mark_rule(style=style).encode(y="level:Q")


def _level_words(value: float, text: str) -> alt.Chart:
    words = alt.Chart(pd.DataFrame({"level": [value]})).mark_text(
        style="reference-label", align="right", dx=-2, dy=-7
    )
    return words.encode(x=alt.value("width"), y="level:Q", text=alt.value(text))


KL = "forgetting_kl"
_TITLE = "KL divergence from the base (nats)"


def divergence_chart(tables: ReportTables, width: int = 400) -> alt.ConcatChart:
    """KL divergence from the base on the general text: by epoch, and by what was learnt."""
    rows = frames.measured_probes(tables, KL, TEXT_PROBE)
    if not len(rows):
        return chart_parts.empty_chart("The study names no general text to compare predictions on.")
    panels = [_divergence_panel(tables, rows, "epoch", "epoch", "by epoch")]
    new = frames.watched_tasks(tables)
    if new is not None:
        learnt = frames.measured_probes(tables, frames.ROUGE, new)[["run", "step", "value"]]
        rows = rows.merge(learnt.rename(columns={"value": "learnt"}), on=["run", "step"])
        across = f"ROUGE-L recall, {frames.humanize(new)}"
        panels.append(_divergence_panel(tables, rows, "learnt", across, "by what was learnt"))
    told = "KL divergence between the base's and the tuned model's predictions on a general text."
    sized = [panel.properties(width=width, height=260) for panel in panels]
    return chart_parts.combine_panels(sized, [chart_parts.focus()], told, narrowest=230, columns=2)


def _divergence_panel(
    tables: ReportTables, rows: pd.DataFrame, across: str, title: str, subtitle: str
) -> alt.LayerChart:
    x = alt.X(f"{across}:Q").title(title).axis(grid=False, tickCount=6, labelFlush=False)
    # The square root shows the small distances of careful methods beside the large ones of others.
    y = alt.Y("value:Q").title(_TITLE).scale(type="sqrt").axis(tickCount=6)
    coded: dict[str, Any] = {
        "x": x,
        "y": y,
        "color": chart_parts.colour(frames.method_labels(tables)),
    }
    chosen, others = chart_parts.split_selected(rows)
    picked = rows.merge(frames.selected_runs(tables), on=["run", "step"], how="inner")
    tip = [
        *chart_parts.run_tooltip(),
        chart_parts.number_format("epoch", "epoch", ".2~f"),
        *chart_parts.value_tooltip("KL", pattern=".4f"),
    ]
    layers = [
        *chart_parts.trajectory_lines(chosen, others, coded, tip),
        chart_parts.diverged_marker(frames.last_evaluations(rows), across, "value"),
        chart_parts.selected_marker(picked, across, "value", tip),
    ]
    return chart_parts.stack_panels(layers).properties(
        title=chart_parts.panel_title("general text", subtitle)
    )


def trajectories(tables: ReportTables, width: int = 250) -> alt.ConcatChart:
    """ROUGE by epoch, a panel per probe; the chosen runs bold, the rest of the sweep faint."""
    # The old probes share a scale, so that their losses can be compared by eye.
    values = {name: _rouge_values(tables, name) for name in _all_probes(tables)}
    old = chart_parts.grid([values[name] for name in frames.probes_in_order(tables, "old")])
    panels = [
        _trajectory_chart(
            tables, name, "new", chart_parts.grid([values[name]], _threshold_label(tables, name))
        )
        for name in frames.probes_in_order(tables, "new")
    ]
    panels += [
        _trajectory_chart(tables, name, "old", old)
        for name in frames.probes_in_order(tables, "old")
    ]
    if not panels:
        return chart_parts.empty_chart("No probe was measured.")
    told = "ROUGE-L by epoch on the new knowledge and on each probe of old knowledge."
    sized = [panel.properties(width=width, height=230) for panel in panels]
    return chart_parts.combine_panels(
        sized,
        [chart_parts.focus(), chart_parts.score_menu(), _sweep_layer(tables, True)],
        told,
        narrowest=230,
    )


def _trajectory_chart(
    tables: ReportTables, probe: str, knowledge: str, ticks: list[float]
) -> alt.LayerChart:
    rows = chart_parts.score_switch(lambda metric: frames.measured_probes(tables, metric, probe))
    base = chart_parts.score_switch(lambda metric: frames.base_row(tables, metric, probe))
    picked = chart_parts.score_switch(lambda metric: frames.at_selected(tables, metric, probe))
    x = alt.X("epoch:Q").title("epoch")
    x = x.axis(tickMinStep=1, grid=False, tickCount=6, labelFlush=False)
    layers = [
        *_threshold_rule(_threshold_label(tables, probe), "y"),
        *(_base_rule(base, "right") if knowledge == "old" else []),
        *_sweep_and_choice(tables, rows, x, ticks),
        chart_parts.diverged_marker(frames.last_evaluations(rows), "epoch", "value"),
        chart_parts.selected_marker(picked, "epoch", "value", _tooltip()),
    ]
    title = chart_parts.panel_title(frames.humanize(probe), f"{knowledge} knowledge")
    return chart_parts.stack_panels(chart_parts.score_filter(layers)).properties(title=title)


def _sweep_and_choice(
    tables: ReportTables, rows: pd.DataFrame, x: alt.X, ticks: list[float]
) -> list[alt.Chart]:
    y = chart_parts.rouge_axis("value", chart_parts.FOCUS_SELECTION, ticks)
    shade = chart_parts.colour(frames.method_labels(tables))
    chosen, others = chart_parts.split_selected(rows)
    means = frames.mean_over_seeds(rows)
    # Where means are drawn, they are the thick lines and every seed is a thin one.
    several = len(means) > 0
    coded: dict[str, Any] = {"x": x, "y": y, "color": shade}
    tip = _tooltip()
    lines = alt.Chart(chosen).mark_line(strokeJoin="round", strokeWidth=1 if several else 2.2)
    return [
        _other_runs(others).encode(**coded, order="step:Q"),
        alt.Chart(chosen)
        .mark_area(clip=True)
        .encode(
            x=x,
            y=chart_parts.rouge_axis("low", chart_parts.FOCUS_SELECTION, ticks),
            y2="high:Q",
            color=shade,
            detail="run:N",
            opacity=chart_parts.opacity(0.16, 0, chart_parts.ANY_FOCUSED),
        ),
        lines.encode(**coded, detail="run:N", opacity=chart_parts.opacity(0.5 if several else 1)),
        alt.Chart(means)
        .mark_line(strokeJoin="round", strokeWidth=2.6)
        .encode(**coded, opacity=chart_parts.opacity(1)),
        alt.Chart(chosen)
        .mark_point(filled=True, size=14)
        .encode(**coded, opacity=chart_parts.opacity(0.6 if several else 1), tooltip=tip),
    ]


def _other_runs(rows: pd.DataFrame) -> alt.Chart:
    """The runs that were not chosen, as lines that the checkbox `sweep` hides."""
    shown = f"sweep && ({chart_parts.IS_FOCUSED})"
    mark = alt.Chart(rows).mark_line(strokeJoin="round", strokeWidth=1, aria=False)
    shade = chart_parts.opacity(0.28, 0, shown)
    lines: alt.Chart = mark.encode(detail="run:N", opacity=shade, tooltip=chart_parts.run_tooltip())
    return lines


def old_versus_new(tables: ReportTables, width: int = 400) -> alt.ConcatChart:
    """ROUGE on old knowledge against ROUGE on the new, a panel per probe of old knowledge."""
    new, old = frames.watched_tasks(tables), frames.probes_in_order(tables, "old")
    if new is None or not old:
        return chart_parts.empty_chart("No probe of old knowledge was measured.")
    ticks = chart_parts.grid([_rouge_values(tables, name, bounds=True) for name in old])
    panels = [
        _tradeoff_plane(tables, new, name, ticks).properties(width=width, height=300)
        for name in old
    ]
    told = "ROUGE-L on old knowledge against ROUGE-L on the new knowledge."
    params = [chart_parts.focus(), chart_parts.score_menu(), _sweep_layer(tables, False)]
    return chart_parts.combine_panels(panels, params, told, narrowest=230, columns=2)


def _tradeoff_plane(tables: ReportTables, new: str, old: str, ticks: list[float]) -> alt.LayerChart:
    rows = chart_parts.score_switch(lambda metric: frames.old_versus_new(tables, metric, new, old))
    chosen, others = chart_parts.split_selected(rows)
    picked = rows.merge(frames.selected_runs(tables), on=["run", "step"], how="inner")
    base = chart_parts.score_switch(lambda metric: frames.base_row(tables, metric, old))
    across = f"{chart_parts.FOCUS_SELECTION}, {frames.humanize(new)}"
    x = alt.X("value_new:Q").scale(domain=(0, 1))
    x = x.axis(title=across, grid=False, tickCount=6, labelFlush=False)
    y = chart_parts.rouge_axis("value_old", chart_parts.FOCUS_SELECTION, ticks)
    coded: dict[str, Any] = {
        "x": x,
        "y": y,
        "color": chart_parts.colour(frames.method_labels(tables)),
    }
    start = rows[rows["step"] == 0].groupby("score", sort=False).head(1)
    layers = [
        *_base_rule(base, "left"),
        *_threshold_rule(_threshold_label(tables, new), "x"),
        _other_runs(others).encode(**coded, order="step:Q"),
        alt.Chart(chosen)
        .mark_line(strokeJoin="round", strokeWidth=1.8)
        .encode(**coded, detail="run:N", order="step:Q", opacity=chart_parts.opacity(0.85)),
        alt.Chart(chosen)
        .mark_point(filled=True, size=16)
        .encode(**coded, opacity=chart_parts.opacity(0.9), tooltip=_plane_tooltip()),
        *_interval_crosses(picked, coded, across, ticks),
        chart_parts.diverged_marker(frames.last_evaluations(rows), "value_new", "value_old"),
        chart_parts.selected_marker(picked, "value_new", "value_old", _plane_tooltip()),
        alt.Chart(start)
        .mark_point(style="base", shape="diamond", size=110, filled=True)
        .encode(x="value_new:Q", y="value_old:Q", tooltip=_plane_tooltip()[-9:]),
    ]
    title = chart_parts.panel_title(frames.humanize(old), "old knowledge")
    return chart_parts.stack_panels(chart_parts.score_filter(layers)).properties(title=title)


def _interval_crosses(
    picked: pd.DataFrame, coded: dict[str, Any], across: str, ticks: list[float]
) -> list[alt.Chart]:
    """The 95 % intervals of both coordinates at the selected checkpoints."""
    bounded = picked.dropna(subset=["low_new", "high_new", "low_old", "high_old"])
    mark = alt.Chart(bounded).mark_rule(strokeWidth=1.2)
    shade = {"color": coded["color"], "opacity": chart_parts.opacity(0.65)}
    low_new = alt.X("low_new:Q").axis(title=across)
    low_old = chart_parts.rouge_axis("low_old", chart_parts.FOCUS_SELECTION, ticks)
    return [
        mark.encode(x=low_new, x2="high_new:Q", y=coded["y"], **shade),
        mark.encode(x=coded["x"], y=low_old, y2="high_old:Q", **shade),
    ]


def _threshold_rule(goal: float | None, channel: str) -> list[alt.Chart]:
    """A dashed line at the selection rule's threshold, with its value."""
    if goal is None:
        return []
    score = next(iter(frames.SCORES))  # the rule is about recall
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
    tip = [alt.Tooltip("score:N"), *chart_parts.value_tooltip("base")]
    rule = alt.Chart(base).mark_rule(style="reference").encode(y="value:Q", tooltip=tip)
    inset, place = (2, alt.value(0)) if side == "left" else (-2, alt.value("width"))
    words = alt.Chart(base).mark_text(style="reference-label", align=side, dx=inset, dy=-7)
    return [rule, words.encode(x=place, y="value:Q", text=alt.value("base"))]


def _tooltip() -> list[alt.Tooltip]:
    moment = [
        chart_parts.number_format("epoch", "epoch", ".2~f"),
        chart_parts.number_format("step", "step", ","),
    ]
    score = alt.Tooltip("score:N")
    return [*chart_parts.run_tooltip(), *moment, score, *chart_parts.value_tooltip("value")]


def _plane_tooltip() -> list[alt.Tooltip]:
    moment = [
        chart_parts.number_format("epoch", "epoch", ".2~f"),
        chart_parts.number_format("step", "step", ","),
    ]
    values = [*chart_parts.value_tooltip("new", "_new"), *chart_parts.value_tooltip("old", "_old")]
    return [*chart_parts.run_tooltip(), *moment, alt.Tooltip("score:N"), *values]


def _sweep_layer(tables: ReportTables, shown: bool) -> alt.Parameter:
    others = int((~tables.tuned["chosen"].astype(bool)).sum())
    told = "Every run of the sweep"
    if others > chart_parts.MAX_OTHER_RUNS:
        told = f"{chart_parts.MAX_OTHER_RUNS} of {others:,} other runs of the sweep"
    box = alt.binding_checkbox(name=told)
    return alt.param("sweep", value=shown, bind=box)


def _threshold_label(tables: ReportTables, probe: str) -> float | None:
    """The threshold, on the probe that the selection rule watches."""
    return tables.threshold if probe == frames.watched_tasks(tables) else None


def _all_probes(tables: ReportTables) -> list[str]:
    return frames.probes_in_order(tables, "new") + frames.probes_in_order(tables, "old")


def _rouge_values(tables: ReportTables, probe: str, bounds: bool = False) -> pd.Series:
    """All that a ROUGE axis of a probe must hold, whatever the score; with `bounds`, the intervals.

    The axis stays where it is when the menu switches the score.
    """
    found = []
    for metric in frames.SCORES.values():
        found.append(frames.measured_probes(tables, metric, probe)["value"])
        found.append(frames.base_row(tables, metric, probe)["value"])
        if bounds:
            picked = frames.at_selected(tables, metric, probe)
            found += [picked["low"], picked["high"]]
    return pd.concat([series.astype(float) for series in found], ignore_index=True)


FIGURES = {
    "trajectories": trajectories,
    "old_versus_new": old_versus_new,
    "truth_ratio": truth_ratio,
    "distance": divergence_chart,
    "benchmarks": benchmarks,
    "course": benchmark_trajectories,
}
