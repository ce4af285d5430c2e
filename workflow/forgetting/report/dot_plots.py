"""Figures that compare methods at their selected checkpoints: one row a method, dots with 95 %
intervals, a panel per probe or benchmark."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd

from forgetting.report import chart_parts, frames
from forgetting.report.frames import ReportTables

_NONE_SELECTED = "no checkpoint selected"


def truth_ratio(tables: ReportTables, width: int = 300) -> alt.ConcatChart:
    """Truth ratio on each probe of old knowledge by rank; a menu switches its definition."""
    by_probe = {
        name: frames.truth_ratios(tables, name) for name in frames.probes_in_order(tables, "old")
    }
    by_probe = {name: rows for name, rows in by_probe.items() if len(rows)}
    if not by_probe:
        return chart_parts.empty_chart("No truth ratio of old knowledge was measured.")
    choice = alt.param(
        "definition",
        value="arithmetic",
        bind=alt.binding_select(options=list(frames.TRUTH_RATIOS), name="Mean over wrong answers"),
    )
    tip = [alt.Tooltip("definition:N"), *chart_parts.value_tooltip("truth ratio")]
    panels = [
        _dot_layer(
            rows,
            frames.method_labels(tables),
            chart_parts.panel_title(frames.humanize(name), "old knowledge"),
            "truth ratio (higher: more retained)",
            tip,
            chosen="definition",
        ).properties(width=width)
        for name, rows in by_probe.items()
    ]
    told = "Truth ratio on old knowledge of the base and of each method's selected checkpoint."
    return chart_parts.combine_panels(panels, [chart_parts.focus(), choice], told, narrowest=170)


def benchmarks(tables: ReportTables, width: int = 215) -> alt.ConcatChart:
    """The main metric of each benchmark, of the base and of the selected checkpoints."""
    rows = frames.available_scores(tables)
    if not len(rows):
        return chart_parts.empty_chart("No benchmark was scored.")
    tip = [
        alt.Tooltip("metric:N"),
        *chart_parts.value_tooltip("score"),
        chart_parts.number_format("chance", "chance"),
    ]
    panels = [
        _dot_layer(
            group,
            frames.method_labels(tables),
            chart_parts.panel_title(
                frames.humanize(str(task)), harness_metric(group["metric"].iloc[0])
            ),
            None,
            tip,
        ).properties(width=width)
        for task, group in rows.groupby("task", sort=False)
    ]
    told = "Benchmark scores of the base and of the selected checkpoints, with chance levels."
    return chart_parts.combine_panels(panels, [chart_parts.focus()], told, narrowest=170)


def harness_metric(metric: str) -> str:
    """A metric of lm-eval, `name,filter`, as words: `exact match (strict-match)`."""
    name, _, used = metric.partition(",")
    return frames.humanize(name) + (f" ({used})" if used and used != "none" else "")


def _dot_layer(
    rows: pd.DataFrame,
    labels: list[str],
    title: alt.TitleParams,
    axis: str | None,
    tip: Sequence[alt.Tooltip],
    chosen: str | None = None,
) -> alt.LayerChart:
    """One panel: base first, then the methods in their order; `chosen` names a menu's column."""
    order = ["base", *labels]
    # Independent panels would each sort their rows; an explicit domain keeps them comparable and
    # leaves a row for a method without a value.
    tuned = rows[rows["label"] != "base"]
    several = "seed" in tuned and tuned["seed"].nunique() > 1
    band = {"paddingInner": 0.35} if several else {}
    y = alt.Y("label:N").title(None).scale(domain=order, **band)
    y = y.axis(grid=False, ticks=False, domain=False)
    x = alt.X("value:Q").title(axis).scale(zero=False, nice=True)
    x = x.axis(tickCount=4, labelFlush=False)
    who = [alt.Tooltip("label:N", title="method"), alt.Tooltip("run:N", title="run")]
    about = [*who, *tip]
    marks = [
        *_base_band(rows, y, about),
        *_chance(rows),
        _interval_bars(tuned, y, several, labels).encode(x=alt.X("low:Q").title(axis), x2="high:Q"),
        _points(tuned, y, several, labels).encode(x=x, tooltip=about),
    ]
    if chosen:
        marks = [mark.transform_filter(f"datum.{chosen} === {chosen}") for mark in marks]
    marks.append(_missing_marks(order, rows, y))
    step = 40 if several else 24
    return chart_parts.stack_panels(marks).properties(title=title, height=step * len(order))


def _base_band(rows: pd.DataFrame, y: alt.Y, who: Sequence[alt.Tooltip]) -> list[alt.Chart]:
    base = alt.Chart(rows[rows["label"] == "base"])
    bounded = alt.Chart(rows[rows["label"] == "base"].dropna(subset=["low", "high"]))
    return [
        bounded.mark_rect(style="base", opacity=0.12, stroke=None).encode(x="low:Q", x2="high:Q"),
        base.mark_rule(style="reference").encode(x="value:Q"),
        base.mark_point(style="base", filled=True, size=75, opacity=1).encode(
            x="value:Q", y=y, tooltip=[*who]
        ),
    ]


def _chance(rows: pd.DataFrame) -> list[alt.Chart]:
    if "chance" not in rows or rows["chance"].isna().all():
        return []
    level = alt.Chart(rows[["chance"]].dropna().drop_duplicates().head(1))
    rule = level.mark_rule(style="chance").encode(x="chance:Q")
    words = level.mark_text(style="reference-label", align="left", dx=3, dy=-5)
    return [rule, words.encode(x="chance:Q", y=alt.value(0), text=alt.value("chance"))]


def _interval_bars(rows: pd.DataFrame, y: alt.Y, several: bool, labels: list[str]) -> alt.Chart:
    chart = alt.Chart(rows.dropna(subset=["low", "high"])).mark_rule(strokeWidth=2)
    return _with_positions(chart, y, several, labels).encode(opacity=chart_parts.opacity(0.6))


def _points(rows: pd.DataFrame, y: alt.Y, several: bool, labels: list[str]) -> alt.Chart:
    chart = alt.Chart(rows).mark_point(filled=True, size=75)
    return _with_positions(chart, y, several, labels).encode(opacity=chart_parts.opacity(1))


def _with_positions(chart: alt.Chart, y: alt.Y, several: bool, labels: list[str]) -> alt.Chart:
    chart = chart.encode(y=y, color=chart_parts.colour(labels, legend=False))
    return chart.encode(yOffset=alt.YOffset("seed:N")) if several else chart


def _missing_marks(order: list[str], rows: pd.DataFrame, y: alt.Y) -> alt.Chart:
    """Words in the rows of methods that have nothing to show."""
    missing = [label for label in order if label not in set(rows["label"])]
    table = pd.DataFrame({"label": pd.Series(missing, dtype="object")})
    words = alt.Chart(table).mark_text(style="absent", align="left", dx=4)
    placed: alt.Chart = words.encode(y=y, x=alt.value(0), text=alt.value(_NONE_SELECTED))
    return placed
