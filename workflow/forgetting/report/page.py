"""The report: one HTML file that needs nothing but a browser, and its figures as files.

The page loads nothing: Vega is inlined. A content security policy forbids every request, and every
script except the two whose digests it names. The template escapes text from models, data and
configuration. Data in a script element is JSON without `<`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from forgetting.io import write_atomically
from forgetting.report import frames, summary
from forgetting.report.chart_parts import MODES, palette, switching_titles, theme
from forgetting.report.charts import FIGURES
from forgetting.report.dot_plots import harness_metric
from forgetting.report.frames import OPTIONAL_COLUMNS, ReportTables, sampled_tasks
from forgetting.report.matched import matched_rows, matched_sentence
from forgetting.report.narrative import narrative

TEMPLATES = Path(__file__).parent / "templates"
VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


def write_report(tables: ReportTables, page: Path, folder: Path) -> None:
    """Write the figures (SVG and PNG) and then the page, each file atomically."""
    specs = {
        name: chart_spec(figure(tables))
        for name, figure in FIGURES.items()
        if name not in OPTIONAL_COLUMNS or len(getattr(tables, name))
    }
    for name, spec in specs.items():
        svg = static_svg(spec, _method_kinds(tables))
        write_atomically(folder / f"{name}.svg", svg, recorded=False)
        write_atomically(
            folder / f"{name}.png", vl_convert.svg_to_png(svg, scale=2), recorded=False
        )
    write_atomically(page, render(tables, specs), recorded=False)


def chart_spec(chart: alt.ConcatChart) -> dict[str, Any]:
    """Return a chart as Vega-Lite JSON without configuration; drawing adds the theme."""
    # Altair limits charts to 5,000 rows for the sake of notebooks. A page may hold more.
    with alt.data_transformers.disable_max_rows():
        spec: dict[str, Any] = chart.to_dict()
    spec.pop("config", None)
    datasets = spec.pop("datasets", {})
    spec = switching_titles(spec)
    spec["datasets"] = {
        name: [_without_nan(row) for row in rows] for name, rows in datasets.items()
    }
    return spec


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without NaN, which JSON lacks and Altair keeps in text columns."""
    return {key: value for key, value in row.items() if value is not None and value == value}


def static_svg(spec: dict[str, Any], kinds: list[str]) -> str:
    """Return a figure as SVG on white paper, with its parameters at their defaults."""
    themed = {**spec, "config": theme(kinds, "light")}
    svg: str = vl_convert.vegalite_to_svg(themed, vl_version=VEGA_LITE)
    return svg


def render(tables: ReportTables, specs: dict[str, dict[str, Any]]) -> str:
    """Return the whole page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    kinds = _method_kinds(tables)
    scripts = [_vega(), _asset("page.js")]
    answer, qualified = narrative(tables)
    numbers = figure_numbers(tables)
    settings = {
        "themes": {mode: theme(kinds, mode) for mode in MODES},
        "figures": {name: spec for name, spec in specs.items() if name in numbers},
    }
    html: str = environment.get_template("page.html.j2").render(
        study=tables.config,
        provenance=tables.study.get("provenance", {}),
        computed=summary.computed_on(tables),
        notes=tables.study.get("notes", []),
        forecast=tables.study.get("forecast", []),
        matched=matched_rows(tables),
        matched_sentence=matched_sentence(tables),
        answer=answer,
        qualified=qualified,
        rouge_tokenizer=tables.rouge_tokenizer,
        rule=[sentence for sentence in summary.selection_rule(tables) if sentence],
        summary=summary.summary(tables),
        probes={kind: frames.probes_in_order(tables, kind) for kind in ("new", "old")},
        runs=summary.run_rows(tables),
        tasks=task_rows(tables),
        samples=sampled_tasks(tables),
        labels=frames.method_labels(tables),
        numbers=numbers,
        colours=list(zip(*(palette(kinds, mode) for mode in MODES), strict=True)),
        downloads=table_downloads(tables),
        settings=script_json(settings),
        bundle=scripts[0],
        script=scripts[1],
        style=_asset("page.css"),
        policy=_policy(scripts),
    )
    return html


def figure_numbers(tables: ReportTables) -> dict[str, int]:
    """Return the number of each figure; figures of what the study does not measure are left out."""
    benchmarks = tables.config.get("benchmarks", {})
    left_out = {
        "divergence": not tables.config.get("general_text"),
        "benchmarks": not (benchmarks.get("tasks") or benchmarks.get("refusals")),
        "benchmark_trajectory": not benchmarks.get("during_training"),
        "durations": not len(tables.durations),
    }
    shown = [name for name in FIGURES if not left_out.get(name)]
    return {name: number for number, name in enumerate(shown, start=1)}


def task_rows(tables: ReportTables) -> list[dict[str, Any]]:
    """Return metric, examples in the prompt, items and chance of each scored benchmark."""
    rows = frames.available_scores(tables).drop_duplicates("task")
    return [
        {
            "task": frames.humanize(str(row["task"])),
            "metric": harness_metric(str(row["metric"])),
            "fewshot": row["num_fewshot"],
            "n": row["n"],
            "chance": row["chance"],
        }
        for row in rows.to_dict("records")
    ]


def table_downloads(tables: ReportTables) -> list[dict[str, str]]:
    """Return the tables that the page offers as CSV, as data URLs."""
    downloads = {
        "summary": summary.summary_frame(tables),
        "matched_values": tables.matched_values.round(5),
        "matched_differences": tables.matched_differences.round(5),
        "selection": tables.selection,
        "runs": tables.runs,
        "benchmarks": tables.benchmarks,
        "benchmark_trajectory": tables.benchmark_trajectory,
        "durations": tables.durations,
    }
    return [
        {"name": name, "url": _data_url(frame)} for name, frame in downloads.items() if len(frame)
    ]


def script_json(value: Any) -> Markup:
    """Return JSON for a script element: without `<`, hence without `</script` and `<!--`."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _data_url(frame: pd.DataFrame) -> str:
    encoded = base64.b64encode(frame.to_csv(index=False).encode()).decode()
    return f"data:text/csv;charset=utf-8;base64,{encoded}"


def _inline_asset(script: str) -> Markup:
    return Markup(script.replace("</script", "<\\/script").replace("<!--", "<\\!--"))


@cache
def _vega() -> Markup:
    """Return Vega, Vega-Lite and Vega-Embed as one script."""
    return _inline_asset(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE))


def _asset(name: str) -> Markup:
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def _policy(scripts: list[Markup]) -> str:
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _method_kinds(tables: ReportTables) -> list[str]:
    return [str(kind) for kind in frames.methods_in_order(tables)["kind"]]


def _signed(value: float) -> str:
    text = f"{value:+.2f}".replace("-", "−")
    return "±0.00" if text[1:] == "0.00" else text


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=88)
    return text


def _count(value: Any) -> str:
    return "" if value is None else f"{int(value):,}".replace(",", "\u202f")


def _emphasized(text: str) -> Markup:
    """Return escaped text with *words* between asterisks as emphasis."""
    return Markup(re.sub(r"\*([^*]+)\*", r"<em>\1</em>", str(escape(text))))


def _decimals(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _short(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:g}"


FILTERS = {
    "signed": _signed,
    "yaml": _yaml,
    "count": _count,
    "human": frames.humanize,
    "emphasised": _emphasized,
    "decimals": _decimals,
    "short": _short,
}
