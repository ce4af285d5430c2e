"""The figures of the report, as Altair charts.

Panels are concatenated, one per probe or benchmark, so that the page can lay them out in as many
columns as fit. Colours are the category range of `chart_parts.theme`, not part of a chart.
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

KL = "forgetting_kl"
_KL_TITLE = "KL divergence from the base (nats)"

NEAR_FRACTION = 0.08
"""Lines nearer than this share of a panel's height have no room for a name between them."""
_LEVEL_STYLES = {"base": "reference", "chance": "chance"}


def trajectories(tables: ReportTables, width: int = 250) -> alt.ConcatChart:
    """Draw ROUGE by epoch, a panel per probe, with chosen runs bold and other runs faint."""
    # The old probes share a scale, so that their losses can be compared by eye.
    values = {name: _rouge_values(tables, name) for name in frames.all_probes(tables)}
    old = chart_parts.grid([values[name] for name in frames.probes_in_order(tables, "old")])
    panels = [
        _trajectory_chart(
            tables, name, "new", chart_parts.grid([values[name]], _threshold_of(tables, name))
        )
        for name in frames.probes_in_order(tables, "new")
    ]
    panels += [
        _trajectory_chart(tables, name, "old", old)
        for name in frames.probes_in_order(tables, "old")
    ]
    if not panels:
        return chart_parts.empty_chart("No probe was measured.")
    description = "ROUGE-L by epoch on the new knowledge and on each probe of old knowledge."
    params = [chart_parts.focus(), chart_parts.score_menu(), _sweep_checkbox(tables, True)]
    sized = [panel.properties(width=width, height=230) for panel in panels]
    return chart_parts.combine_panels(sized, params, description, narrowest=230)


def _trajectory_chart(
    tables: ReportTables, probe: str, knowledge: str, ticks: list[float]
) -> alt.LayerChart:
    rows = chart_parts.score_switch(lambda metric: frames.measured_probes(tables, metric, probe))
    base = chart_parts.score_switch(lambda metric: frames.base_row(tables, metric, probe))
    selected = chart_parts.score_switch(lambda metric: frames.at_selected(tables, metric, probe))
    x = alt.X("epoch:Q").title("epoch")
    x = x.axis(tickMinStep=1, grid=False, tickCount=6, labelFlush=False)
    layers = [
        *_threshold_rule(_threshold_of(tables, probe), "y"),
        *(_base_rule(base, "right") if knowledge == "old" else []),
        *_sweep_and_choice(tables, rows, x, ticks),
        chart_parts.diverged_marker(frames.last_evaluations(rows), "epoch", "value"),
        chart_parts.selected_marker(selected, "epoch", "value", _trajectory_tooltip()),
    ]
    title = chart_parts.panel_title(frames.humanize(probe), f"{knowledge} knowledge")
    return chart_parts.stack_panels(chart_parts.score_filter(layers)).properties(title=title)


def _sweep_and_choice(
    tables: ReportTables, rows: pd.DataFrame, x: alt.X, ticks: list[float]
) -> list[alt.Chart]:
    y = chart_parts.rouge_axis("value", chart_parts.MENU_SCORE, ticks)
    colour = chart_parts.colour(frames.method_labels(tables))
    chosen, others = chart_parts.split_selected(rows)
    means = frames.mean_over_seeds(rows)
    # Where there are means, they are the thick lines, and every seed is a thin line.
    has_means = len(means) > 0
    encoding: dict[str, Any] = {"x": x, "y": y, "color": colour}
    tooltip = _trajectory_tooltip()
    lines = alt.Chart(chosen).mark_line(strokeJoin="round", strokeWidth=1 if has_means else 2.2)
    return [
        _other_runs(others).encode(**encoding, order="step:Q"),
        alt.Chart(chosen)
        .mark_area(clip=True)
        .encode(
            x=x,
            y=chart_parts.rouge_axis("low", chart_parts.MENU_SCORE, ticks),
            y2="high:Q",
            color=colour,
            detail="run:N",
            opacity=chart_parts.opacity(0.16, 0, chart_parts.ANY_FOCUSED),
        ),
        lines.encode(
            **encoding, detail="run:N", opacity=chart_parts.opacity(0.5 if has_means else 1)
        ),
        alt.Chart(means)
        .mark_line(strokeJoin="round", strokeWidth=2.6)
        .encode(**encoding, opacity=chart_parts.opacity(1)),
        alt.Chart(chosen)
        .mark_point(filled=True, size=14)
        .encode(**encoding, opacity=chart_parts.opacity(0.6 if has_means else 1), tooltip=tooltip),
    ]


def _other_runs(rows: pd.DataFrame) -> alt.Chart:
    """Return the runs that were not chosen, as lines that the checkbox `sweep` hides."""
    test = f"sweep && ({chart_parts.IS_FOCUSED})"
    mark = alt.Chart(rows).mark_line(strokeJoin="round", strokeWidth=1, aria=False)
    opacity = chart_parts.opacity(0.28, 0, test)
    lines: alt.Chart = mark.encode(
        detail="run:N", opacity=opacity, tooltip=chart_parts.run_tooltip()
    )
    return lines


def old_versus_new(tables: ReportTables, width: int = 400) -> alt.ConcatChart:
    """Draw ROUGE on old knowledge against ROUGE on the new, a panel per probe of old knowledge."""
    new, old = frames.watched_probe(tables), frames.probes_in_order(tables, "old")
    if new is None or not old:
        return chart_parts.empty_chart("No probe of old knowledge was measured.")
    ticks = chart_parts.grid([_rouge_values(tables, name, bounds=True) for name in old])
    panels = [
        _tradeoff_plane(tables, new, name, ticks).properties(width=width, height=300)
        for name in old
    ]
    description = "ROUGE-L on old knowledge against ROUGE-L on the new knowledge."
    params = [chart_parts.focus(), chart_parts.score_menu(), _sweep_checkbox(tables, False)]
    return chart_parts.combine_panels(panels, params, description, narrowest=230, columns=2)


def _tradeoff_plane(tables: ReportTables, new: str, old: str, ticks: list[float]) -> alt.LayerChart:
    rows = chart_parts.score_switch(
        lambda metric: frames.old_versus_new_rows(tables, metric, new, old)
    )
    chosen, others = chart_parts.split_selected(rows)
    selected = rows.merge(frames.selected_runs(tables), on=["run", "step"], how="inner")
    base = chart_parts.score_switch(lambda metric: frames.base_row(tables, metric, old))
    x_title = f"{chart_parts.MENU_SCORE}, {frames.humanize(new)}"
    x = alt.X("value_new:Q").scale(domain=(0, 1))
    x = x.axis(title=x_title, grid=False, tickCount=6, labelFlush=False)
    y = chart_parts.rouge_axis("value_old", chart_parts.MENU_SCORE, ticks)
    colour = chart_parts.colour(frames.method_labels(tables))
    encoding: dict[str, Any] = {"x": x, "y": y, "color": colour}
    start = rows[rows["step"] == 0].groupby("score", sort=False).head(1)
    layers = [
        *_base_rule(base, "left"),
        *_threshold_rule(_threshold_of(tables, new), "x"),
        _other_runs(others).encode(**encoding, order="step:Q"),
        alt.Chart(chosen)
        .mark_line(strokeJoin="round", strokeWidth=1.8)
        .encode(**encoding, detail="run:N", order="step:Q", opacity=chart_parts.opacity(0.85)),
        alt.Chart(chosen)
        .mark_point(filled=True, size=16)
        .encode(**encoding, opacity=chart_parts.opacity(0.9), tooltip=_plane_tooltip()),
        *_interval_crosses(selected, encoding, x_title, ticks),
        chart_parts.diverged_marker(frames.last_evaluations(rows), "value_new", "value_old"),
        chart_parts.selected_marker(selected, "value_new", "value_old", _plane_tooltip()),
        alt.Chart(start)
        .mark_point(style="base", shape="diamond", size=110, filled=True)
        .encode(x="value_new:Q", y="value_old:Q", tooltip=_value_pair_tooltip()),
    ]
    title = chart_parts.panel_title(frames.humanize(old), "old knowledge")
    return chart_parts.stack_panels(chart_parts.score_filter(layers)).properties(title=title)


def _interval_crosses(
    selected: pd.DataFrame, encoding: dict[str, Any], x_title: str, ticks: list[float]
) -> list[alt.Chart]:
    """Return the 95 % intervals of both coordinates at the selected checkpoints."""
    bounded = selected.dropna(subset=["low_new", "high_new", "low_old", "high_old"])
    mark = alt.Chart(bounded).mark_rule(strokeWidth=1.2)
    shade = {"color": encoding["color"], "opacity": chart_parts.opacity(0.65)}
    low_new = alt.X("low_new:Q").axis(title=x_title)
    low_old = chart_parts.rouge_axis("low_old", chart_parts.MENU_SCORE, ticks)
    return [
        mark.encode(x=low_new, x2="high_new:Q", y=encoding["y"], **shade),
        mark.encode(x=encoding["x"], y=low_old, y2="high_old:Q", **shade),
    ]


def _threshold_rule(threshold: float | None, channel: str) -> list[alt.Chart]:
    """Return a dashed line at the selection rule's threshold, with its value."""
    if threshold is None:
        return []
    score = next(iter(frames.SCORES))  # the rule is about recall
    text = f"threshold {threshold:g}"
    chart = alt.Chart(pd.DataFrame({"goal": [threshold], "text": [text], "score": [score]}))
    rule = chart.mark_rule(style="reference").encode(**{channel: "goal:Q"})
    if channel == "y":
        # The left is free of selected checkpoints, because nothing is learnt yet.
        words = chart.mark_text(style="reference-label", align="left", dx=2, dy=-7)
        return [rule, words.encode(x=alt.value(0), y="goal:Q", text="text:N")]
    words = chart.mark_text(style="reference-label", align="right", dx=-4, dy=-8)
    return [rule, words.encode(x="goal:Q", y=alt.value("height"), text="text:N")]


def _base_rule(base: pd.DataFrame, side: Literal["left", "right"]) -> list[alt.Chart]:
    """Return a dashed line at the base's value, named on one side; nothing is forgotten above."""
    tooltip = [alt.Tooltip("score:N"), *chart_parts.value_tooltip("base")]
    rule = alt.Chart(base).mark_rule(style="reference").encode(y="value:Q", tooltip=tooltip)
    inset, x = (2, alt.value(0)) if side == "left" else (-2, alt.value("width"))
    words = alt.Chart(base).mark_text(style="reference-label", align=side, dx=inset, dy=-7)
    return [rule, words.encode(x=x, y="value:Q", text=alt.value("base"))]


def _step_tooltip() -> list[alt.Tooltip]:
    return [
        *chart_parts.run_tooltip(),
        chart_parts.number_tooltip("epoch", "epoch", ".2~f"),
        chart_parts.number_tooltip("step", "step", ","),
    ]


def _trajectory_tooltip() -> list[alt.Tooltip]:
    return [*_step_tooltip(), alt.Tooltip("score:N"), *chart_parts.value_tooltip("value")]


def _plane_tooltip() -> list[alt.Tooltip]:
    return [*_step_tooltip(), *_value_pair_tooltip()]


def _value_pair_tooltip() -> list[alt.Tooltip]:
    values = [*chart_parts.value_tooltip("new", "_new"), *chart_parts.value_tooltip("old", "_old")]
    return [alt.Tooltip("score:N"), *values]


def _sweep_checkbox(tables: ReportTables, shown: bool) -> alt.Parameter:
    others = int((~tables.tuned["chosen"].astype(bool)).sum())
    name = "Every run of the sweep"
    if others > chart_parts.MAX_OTHER_RUNS:
        name = f"{chart_parts.MAX_OTHER_RUNS} of {others:,} other runs of the sweep"
    return alt.param("sweep", value=shown, bind=alt.binding_checkbox(name=name))


def _threshold_of(tables: ReportTables, probe: str) -> float | None:
    """Return the threshold, if the selection rule watches this probe."""
    return tables.threshold if probe == frames.watched_probe(tables) else None


def _rouge_values(tables: ReportTables, probe: str, bounds: bool = False) -> pd.Series:
    """Return all values that a ROUGE axis of a probe must hold; with `bounds`, also the intervals.

    All scores are included, so that the axis does not change when the menu switches the score.
    """
    values = []
    for metric in frames.SCORES.values():
        values.append(frames.measured_probes(tables, metric, probe)["value"])
        values.append(frames.base_row(tables, metric, probe)["value"])
        if bounds:
            selected = frames.at_selected(tables, metric, probe)
            values += [selected["low"], selected["high"]]
    return pd.concat([series.astype(float) for series in values], ignore_index=True)


def divergence_chart(tables: ReportTables, width: int = 400) -> alt.ConcatChart:
    """Draw the KL divergence from the base on general text, by epoch and by what was learnt."""
    rows = frames.measured_probes(tables, KL, TEXT_PROBE)
    if not len(rows):
        return chart_parts.empty_chart("The study names no general text to compare predictions on.")
    panels = [_divergence_panel(tables, rows, "epoch", "epoch", "by epoch")]
    new = frames.watched_probe(tables)
    if new is not None:
        learnt = frames.measured_probes(tables, frames.ROUGE, new)[["run", "step", "value"]]
        rows = rows.merge(learnt.rename(columns={"value": "learnt"}), on=["run", "step"])
        x_title = f"ROUGE-L recall, {frames.humanize(new)}"
        panels.append(_divergence_panel(tables, rows, "learnt", x_title, "by what was learnt"))
    description = (
        "KL divergence between the base's and the tuned model's predictions on a general text."
    )
    sized = [panel.properties(width=width, height=260) for panel in panels]
    return chart_parts.combine_panels(
        sized, [chart_parts.focus()], description, narrowest=230, columns=2
    )


def _divergence_panel(
    tables: ReportTables, rows: pd.DataFrame, x_field: str, x_title: str, subtitle: str
) -> alt.LayerChart:
    x = alt.X(f"{x_field}:Q").title(x_title).axis(grid=False, tickCount=6, labelFlush=False)
    # A square root keeps small divergences visible when other methods have large ones.
    y = alt.Y("value:Q").title(_KL_TITLE).scale(type="sqrt").axis(tickCount=6)
    colour = chart_parts.colour(frames.method_labels(tables))
    chosen, others = chart_parts.split_selected(rows)
    selected = rows.merge(frames.selected_runs(tables), on=["run", "step"], how="inner")
    tooltip = [
        *chart_parts.run_tooltip(),
        chart_parts.number_tooltip("epoch", "epoch", ".2~f"),
        *chart_parts.value_tooltip("KL", pattern=".4f"),
    ]
    layers = [
        *chart_parts.trajectory_lines(chosen, others, {"x": x, "y": y, "color": colour}, tooltip),
        chart_parts.diverged_marker(frames.last_evaluations(rows), x_field, "value"),
        chart_parts.selected_marker(selected, x_field, "value", tooltip),
    ]
    return chart_parts.stack_panels(layers).properties(
        title=chart_parts.panel_title("general text", subtitle)
    )


def benchmark_trajectories(tables: ReportTables, width: int = 250) -> alt.ConcatChart:
    """Draw in-training benchmarks by epoch, a panel per task, with the base's and chance levels."""
    rows = tables.benchmark_trajectory
    metrics = dict(zip(rows["task"], rows["metric"], strict=True)) if len(rows) else {}
    panels = [
        _benchmark_panel(tables, task, metric, task_rows, "epoch")
        for task, metric in metrics.items()
        if len(task_rows := frames.training_benchmark_rows(tables, task))
    ]
    if not panels:
        return chart_parts.empty_chart("The study has no in-training benchmarks.")
    description = "Benchmark scores by epoch, with the base's score and that of blind guessing."
    sized = [panel.properties(width=width, height=230) for panel in panels]
    return chart_parts.combine_panels(sized, [chart_parts.focus()], description, narrowest=230)


def benchmark_durations(tables: ReportTables, width: int = 250) -> alt.ConcatChart:
    """Draw benchmarks by the tokens trained on, with a point at the end of every duration."""
    rows = tables.durations
    metrics = dict(zip(rows["task"], rows["metric"], strict=True)) if len(rows) else {}
    panels = [
        _benchmark_panel(tables, task, metric, frames.duration_rows(tables, task), "tokens")
        for task, metric in metrics.items()
    ]
    if not panels:
        return chart_parts.empty_chart("The study has no benchmarks of several durations.")
    description = "Benchmark scores by training tokens, with the base's and the chance level."
    sized = [panel.properties(width=width, height=230) for panel in panels]
    return chart_parts.combine_panels(sized, [chart_parts.focus()], description, narrowest=230)


def _benchmark_panel(
    tables: ReportTables,
    task: str,
    metric: str,
    rows: pd.DataFrame,
    x_field: Literal["epoch", "tokens"],
) -> alt.LayerChart:
    chosen, others = chart_parts.split_selected(rows)
    selected = rows.merge(frames.selected_runs(tables), on=["run", "step"], how="inner")
    title, pattern = ("epoch", alt.Undefined) if x_field == "epoch" else ("training tokens", "~s")
    x = alt.X(f"{x_field}:Q").title(title)
    x = x.axis(grid=False, tickCount=6, labelFlush=False, format=pattern)
    y = alt.Y("value:Q").title(harness_metric(metric)).scale(zero=False).axis(tickCount=6)
    colour = chart_parts.colour(frames.method_labels(tables))
    tooltip = [
        *chart_parts.run_tooltip(),
        chart_parts.number_tooltip("epoch", "epoch", ".2~f"),
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
            color=colour,
            detail="run:N",
            opacity=chart_parts.opacity(0.16, 0, chart_parts.ANY_FOCUSED),
        ),
        *chart_parts.trajectory_lines(chosen, others, {"x": x, "y": y, "color": colour}, tooltip),
        chart_parts.diverged_marker(frames.last_evaluations(rows), x_field, "value"),
        chart_parts.selected_marker(selected, x_field, "value", tooltip),
    ]
    items = f"{int(rows['n'].max())} items"
    return chart_parts.stack_panels(layers).properties(
        title=chart_parts.panel_title(frames.humanize(task), items)
    )


def _reference_levels(rows: pd.DataFrame) -> list[alt.Chart]:
    """Return lines at the base's and the chance level, with their names.

    If the lines are near each other, one text above the upper line names both.
    """
    first_values = {
        "base": rows[rows["step"] == 0]["value"].dropna().head(1),
        "chance": rows["chance"].dropna().head(1),
    }
    levels = {name: float(value.iloc[0]) for name, value in first_values.items() if len(value)}
    rules = [_level_rule(value, _LEVEL_STYLES[name]) for name, value in levels.items()]
    if len(levels) == 2 and abs(levels["base"] - levels["chance"]) < NEAR_FRACTION * _height(rows):
        lower, upper = sorted(levels, key=lambda name: levels[name])
        is_equal = levels[lower] == levels[upper]
        words = "base and chance" if is_equal else f"{upper}, above {lower}"
        return [*rules, _level_words(levels[upper], words)]
    return rules + [_level_words(value, name) for name, value in levels.items()]


def _height(rows: pd.DataFrame) -> float:
    """Return the range from the lowest to the highest value of a panel."""
    shown = rows[["value", "low", "high", "chance"]].to_numpy(dtype=float)
    return float(np.nanmax(shown) - np.nanmin(shown))


def _level_rule(value: float, style: str) -> alt.Chart:
    level = alt.Chart(pd.DataFrame({"level": [value]}))
    return level.mark_rule(style=style).encode(y="level:Q")


def _level_words(value: float, text: str) -> alt.Chart:
    words = alt.Chart(pd.DataFrame({"level": [value]})).mark_text(
        style="reference-label", align="right", dx=-2, dy=-7
    )
    return words.encode(x=alt.value("width"), y="level:Q", text=alt.value(text))


FIGURES = {
    "trajectories": trajectories,
    "old_versus_new": old_versus_new,
    "truth_ratio": truth_ratio,
    "divergence": divergence_chart,
    "benchmarks": benchmarks,
    "benchmark_trajectory": benchmark_trajectories,
    "durations": benchmark_durations,
}
