"""Figures that compare methods at their selected checkpoints.

A panel per probe or benchmark has one row per method, with dots and 95 % intervals.
"""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd

from forgetting.report import chart_parts, frames
from forgetting.report.frames import ReportTables

_NONE_SELECTED = "no checkpoint selected"


def truth_ratio(tables: ReportTables, width: int = 300) -> alt.ConcatChart:
    """Draw the truth ratio on each probe of old knowledge; a menu switches its definition."""
    by_probe = {
        name: frames.truth_ratios(tables, name) for name in frames.probes_in_order(tables, "old")
    }
    by_probe = {name: rows for name, rows in by_probe.items() if len(rows)}
    if not by_probe:
        return chart_parts.empty_chart("No truth ratio of old knowledge was measured.")
    menu = alt.param(
        "definition",
        value="arithmetic",
        bind=alt.binding_select(options=list(frames.TRUTH_RATIOS), name="Mean over wrong answers"),
    )
    tooltip = [alt.Tooltip("definition:N"), *chart_parts.value_tooltip("truth ratio")]
    panels = [
        _dot_layer(
            rows,
            frames.method_labels(tables),
            chart_parts.panel_title(frames.humanize(name), "old knowledge"),
            "truth ratio (higher: more retained)",
            tooltip,
            menu="definition",
        ).properties(width=width)
        for name, rows in by_probe.items()
    ]
    description = (
        "Truth ratio on old knowledge of the base and of each method's selected checkpoint."
    )
    return chart_parts.combine_panels(
        panels, [chart_parts.focus(), menu], description, narrowest=170
    )


def benchmarks(tables: ReportTables, width: int = 215) -> alt.ConcatChart:
    """Draw the main metric of each benchmark for the base and the selected checkpoints."""
    rows = frames.available_scores(tables)
    if not len(rows):
        return chart_parts.empty_chart("No benchmark was scored.")
    tooltip = [
        alt.Tooltip("metric:N"),
        *chart_parts.value_tooltip("score"),
        chart_parts.number_tooltip("chance", "chance"),
    ]
    panels = [
        _dot_layer(
            group,
            frames.method_labels(tables),
            chart_parts.panel_title(
                frames.humanize(str(task)), harness_metric(group["metric"].iloc[0])
            ),
            None,
            tooltip,
        ).properties(width=width)
        for task, group in rows.groupby("task", sort=False)
    ]
    description = (
        "Benchmark scores of the base and of the selected checkpoints, with chance levels."
    )
    return chart_parts.combine_panels(panels, [chart_parts.focus()], description, narrowest=170)


def harness_metric(metric: str) -> str:
    """Return a metric of lm-eval, `name,filter`, as words: `exact match (strict-match)`."""
    name, _, filter_name = metric.partition(",")
    has_filter = filter_name not in ("", "none")
    return frames.humanize(name) + (f" ({filter_name})" if has_filter else "")


def _dot_layer(
    rows: pd.DataFrame,
    labels: list[str],
    title: alt.TitleParams,
    axis: str | None,
    tooltip: Sequence[alt.Tooltip],
    menu: str | None = None,
) -> alt.LayerChart:
    """Return one panel with the base first, then the methods in their order.

    Args:
        rows: label, run, value, low, high, and seed and chance where they exist.
        labels: of the methods, in order.
        title: heading of the panel.
        axis: title of the horizontal axis.
        tooltip: what a dot shows after its method and run.
        menu: a column whose values a menu of the same name selects.
    """
    order = ["base", *labels]
    # An explicit domain keeps the same rows in every panel, also for methods without a value.
    tuned = rows[rows["label"] != "base"]
    has_seeds = "seed" in tuned and tuned["seed"].nunique() > 1
    band = {"paddingInner": 0.35} if has_seeds else {}
    y = alt.Y("label:N").title(None).scale(domain=order, **band)
    y = y.axis(grid=False, ticks=False, domain=False)
    x = alt.X("value:Q").title(axis).scale(zero=False, nice=True)
    x = x.axis(tickCount=4, labelFlush=False)
    model = [alt.Tooltip("label:N", title="method"), alt.Tooltip("run:N", title="run")]
    tooltip = [*model, *tooltip]
    marks = [
        *_base_band(rows, y, tooltip),
        *_chance_rule(rows),
        _interval_bars(tuned, y, has_seeds, labels).encode(
            x=alt.X("low:Q").title(axis), x2="high:Q"
        ),
        _points(tuned, y, has_seeds, labels).encode(x=x, tooltip=tooltip),
    ]
    if menu:
        marks = [mark.transform_filter(f"datum.{menu} === {menu}") for mark in marks]
    marks.append(_missing_marks(order, rows, y))
    step = 40 if has_seeds else 24
    return chart_parts.stack_panels(marks).properties(title=title, height=step * len(order))


def _base_band(rows: pd.DataFrame, y: alt.Y, tooltip: Sequence[alt.Tooltip]) -> list[alt.Chart]:
    base = alt.Chart(rows[rows["label"] == "base"])
    bounded = alt.Chart(rows[rows["label"] == "base"].dropna(subset=["low", "high"]))
    return [
        bounded.mark_rect(style="base", opacity=0.12, stroke=None).encode(x="low:Q", x2="high:Q"),
        base.mark_rule(style="reference").encode(x="value:Q"),
        base.mark_point(style="base", filled=True, size=75, opacity=1).encode(
            x="value:Q", y=y, tooltip=[*tooltip]
        ),
    ]


def _chance_rule(rows: pd.DataFrame) -> list[alt.Chart]:
    if "chance" not in rows or rows["chance"].isna().all():
        return []
    level = alt.Chart(rows[["chance"]].dropna().drop_duplicates().head(1))
    rule = level.mark_rule(style="chance").encode(x="chance:Q")
    words = level.mark_text(style="reference-label", align="left", dx=3, dy=-5)
    return [rule, words.encode(x="chance:Q", y=alt.value(0), text=alt.value("chance"))]


def _interval_bars(rows: pd.DataFrame, y: alt.Y, has_seeds: bool, labels: list[str]) -> alt.Chart:
    chart = alt.Chart(rows.dropna(subset=["low", "high"])).mark_rule(strokeWidth=2)
    return _by_row(chart, y, has_seeds, labels).encode(opacity=chart_parts.opacity(0.6))


def _points(rows: pd.DataFrame, y: alt.Y, has_seeds: bool, labels: list[str]) -> alt.Chart:
    chart = alt.Chart(rows).mark_point(filled=True, size=75)
    return _by_row(chart, y, has_seeds, labels).encode(opacity=chart_parts.opacity(1))


def _by_row(chart: alt.Chart, y: alt.Y, has_seeds: bool, labels: list[str]) -> alt.Chart:
    chart = chart.encode(y=y, color=chart_parts.colour(labels, legend=False))
    return chart.encode(yOffset=alt.YOffset("seed:N")) if has_seeds else chart


def _missing_marks(order: list[str], rows: pd.DataFrame, y: alt.Y) -> alt.Chart:
    """Return a note in the rows of methods without a value."""
    missing = [label for label in order if label not in set(rows["label"])]
    table = pd.DataFrame({"label": pd.Series(missing, dtype="object")})
    words = alt.Chart(table).mark_text(style="absent", align="left", dx=4)
    encoded: alt.Chart = words.encode(y=y, x=alt.value(0), text=alt.value(_NONE_SELECTED))
    return encoded
