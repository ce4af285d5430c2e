"""Tests of the page: it loads nothing, escapes everything and shows what the tables hold."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from forgetting.errors import InputError
from forgetting.pipeline.resources.forecast import forecast_against_measured
from forgetting.report.charts import FIGURES
from forgetting.report.frames import ReportTables, read_tables
from forgetting.report.page import chart_spec, render, script_json
from forgetting.study.load import load_study
from scripts import report
from support.result_tables import report_tables, write
from support.result_tables import tables as make_tables

STUDIES = Path(__file__).resolve().parents[2] / "config" / "studies"


class Elements(HTMLParser):
    """Tags with their attributes, and the text of elements by id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def _words(tables: ReportTables) -> str:
    """Return the page without its drawings, which take most of the time."""
    return render(tables, {})


def test_figures_are_written_as_svg_and_png(written: Path) -> None:
    assert sorted(path.name for path in (written / "figures").iterdir()) == sorted(
        f"{name}.{kind}" for name in {*FIGURES} - {"durations"} for kind in ("svg", "png")
    )
    for path in (written / "figures").glob("*.png"):
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", data[16:24])
        assert width > 800
        assert height > 300
        assert len(data) > 20_000
    for path in (written / "figures").glob("*.svg"):
        assert path.read_text().startswith("<svg")


def test_page_loads_nothing(written: Path) -> None:
    """No element refers to anything outside the file, and the policy forbids it."""
    html = (written / "tradeoff.html").read_text()
    elements = Elements(html)
    references = [
        value
        for _, attributes in elements.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "poster")
    ]
    assert references
    assert all(str(value).startswith(("#", "data:")) for value in references)
    style = "".join(re.findall(r"<style>(.*?)</style>", html, re.DOTALL))
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = [
        str(attributes["content"])
        for tag, attributes in elements.tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in policy
    assert "http" not in policy


def test_vega_is_inlined_once(written: Path) -> None:
    html = (written / "tradeoff.html").read_text()
    assert html.count("window.vegaEmbed") == 1
    assert len([tag for tag, _ in Elements(html).tags if tag == "script"]) == 3


def test_page_is_reproducible(written: Path) -> None:
    tables = read_tables(written / "tables")
    specs = {name: chart_spec(figure(tables)) for name, figure in FIGURES.items()}
    assert render(tables, specs) == (written / "tradeoff.html").read_text()


def test_page_escapes_text_from_outside(hostile_page: Path) -> None:
    """Text of models, files and configuration becomes no element."""
    elements = Elements(hostile_page.read_text())
    assert len([tag for tag, _ in elements.tags if tag == "script"]) == 3
    assert not [tag for tag, _ in elements.tags if tag == "img"]
    assert not [name for _, a in elements.tags for name in a if name.startswith("on")]


def test_script_json_has_no_markup_and_parses() -> None:
    value = {"a": "</script><!-- \u2028 & ' \" ]]>", "b": [1, None, 0.5]}
    text = str(script_json(value))
    assert "<" not in text
    assert "\u2028" not in text
    assert json.loads(text) == value


def test_page_marks_a_last_checkpoint() -> None:
    made = make_tables()
    made["selection"].loc[0, "status"] = "last"
    html = _words(ReportTables(**made))
    assert "reaches 0.9; rank 2 never reaches it and is compared at its last checkpoint." in html
    assert "<small>last</small>" in html


def test_page_offers_tables_as_csv(written: Path) -> None:
    links = {
        str(attributes["download"]): str(attributes["href"])
        for tag, attributes in Elements((written / "tradeoff.html").read_text()).tags
        if tag == "a" and "download" in attributes
    }
    names = ["summary", "selection", "runs", "benchmarks", "benchmark_trajectory"]
    names += ["matched_values", "matched_differences"]
    assert set(links) == {f"mini-{name}.csv" for name in names}
    text = base64.b64decode(links["mini-selection.csv"].split(",", 1)[1]).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["method"] for row in rows] == list(read_tables(written / "tables").selection.method)


def test_page_has_notes_provenance_and_every_run(written: Path) -> None:
    html = (written / "tradeoff.html").read_text()
    tables = read_tables(written / "tables")
    for text in (*tables.study["notes"], "0123456789abcdef", "torch: 2.13.0", "ab" * 32):
        assert text in html
    assert "computed in float32 on CPU, 1 of 2 threads (Made CPU 9000); with another" in html
    assert all(f"<code>{run}</code>" in html for run in tables.tuned["run"])
    assert html.count('class="chosen"') == 5


def test_definitions_have_the_number_of_examples() -> None:
    """The number is the task's where the study leaves it open."""
    html = _words(report_tables(ranks=(2,), epochs=3, tasks=("gsm8k", "humaneval")))
    cells = re.findall(r'<th scope="row">(gsm8k|humaneval)</th><td>.*?</td><td>(.*?)</td>', html)
    assert cells == [("gsm8k", "5"), ("humaneval", "0")]


@pytest.mark.parametrize("missing", ["runs.parquet", "study.json"])
def test_read_tables_names_a_missing_file(tmp_path: Path, missing: str) -> None:
    folder = write(tmp_path, make_tables(ranks=(2,), epochs=3))
    (folder / missing).unlink()
    with pytest.raises(InputError, match=missing):
        read_tables(folder)


def test_read_tables_names_a_missing_column(tmp_path: Path) -> None:
    made = make_tables(ranks=(2,), epochs=3)
    made["trajectory"] = made["trajectory"].drop(columns="low")
    folder = write(tmp_path, made)
    with pytest.raises(InputError, match=r"trajectory\.parquet: column `low`"):
        read_tables(folder)


def test_program_fails_with_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    with pytest.raises(SystemExit) as ended:
        report.main(["--tables", str(tmp_path), "--output", str(output), "--figures", str(output)])
    assert ended.value.code == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not output.exists()


def test_page_has_no_figure_of_what_is_not_measured() -> None:
    """A caption under an empty figure would look like an error."""
    made = make_tables(tasks=())
    made["study"]["study"]["general_text"] = None
    html = _words(ReportTables(**made))
    assert 'data-figure="truth_ratio"' in html
    assert "<b>Figure 3.</b>" in html
    assert 'data-figure="divergence"' not in html
    assert 'data-figure="benchmarks"' not in html
    assert 'data-figure="benchmark_trajectory"' not in html
    html = _words(report_tables(tasks=()))
    assert "<b>Figure 4.</b>" in html
    assert 'data-figure="divergence"' in html


def test_page_shows_emphasis_in_a_description() -> None:
    made = make_tables()
    made["study"]["study"]["description"] = "As in *Low <b> ranks*, 2 * 3"
    assert "As in <em>Low &lt;b&gt; ranks</em>, 2 * 3</p>" in _words(ReportTables(**made))


def test_definitions_have_refusals_if_measured() -> None:
    """Refusing has no chance level."""
    html = _words(report_tables(ranks=(2,), epochs=3, tasks=("gsm8k", "refusals")))
    assert "thirteen published keywords" in html
    row = html.split('<tr><th scope="row">refusals</th>')[1].split("</tr>")[0]
    assert "<td>refused</td>" in row
    assert row.rstrip().endswith("<td></td>")
    without = _words(report_tables(ranks=(2,), epochs=3, tasks=("gsm8k",)))
    assert "thirteen published keywords" not in without


def test_page_names_another_rouge_tokenizer() -> None:
    made = make_tables(ranks=(2,), epochs=3)
    published = _words(ReportTables(**made))
    assert "Words are made of a–z and 0–9" in published
    assert "tokenizer" not in published.split("<script")[0].split("Provenance</h2>")[0]
    made["study"]["study"]["evaluation"] = {"rouge_tokenizer": "unicode"}
    html = _words(ReportTables(**made))
    assert "Words are made of a–z and 0–9" not in html
    answer, figures, runs, definitions = (
        html.split(f'id="{name}"')[1].split("</section>")[0]
        for name in ("answer", "figures", "runs", "definitions")
    )
    assert "ROUGE is computed with the tokenizer unicode, not as published." in answer
    assert "ROUGE with the tokenizer <code>unicode</code>." in answer
    assert "ROUGE-L (tokenizer <code>unicode</code>)" in figures
    assert "ROUGE-L recall (tokenizer <code>unicode</code>)" in runs
    assert "Words are those of the tokenizer <code>unicode</code>" in definitions


def test_page_has_pass_rates_of_sampled_answers() -> None:
    """The table has a row per model, and a column per pass@k and for the different answers."""
    made = make_tables(ranks=(2,), epochs=3, tasks=("gsm8k", "humaneval"))
    scores = made["benchmarks"]
    of_programs = scores[scores["task"] == "humaneval"]
    more = {"pass@10": 0.75, "distinct_passing": 3.25, "distinct_failing": 41.5}
    extra = [
        of_programs.assign(metric=f"{name},create_test", main=False, value=value, low=0.5, high=50)
        for name, value in more.items()
    ]
    made["benchmarks"] = pd.concat([scores, *extra], ignore_index=True)
    made["study"]["study"]["benchmarks"]["tasks"]["humaneval"] = {"samples": 50}
    html = _words(ReportTables(**made))
    section = html.split("humaneval: 50 answers sampled per item")[1].split("</section>")[0]
    assert [part.split("<")[0] for part in section.split('<th scope="col">')[1:]] == [
        "Model",
        "pass@1",
        "pass@10",
        "Different answers that pass",
        "Different answers that fail",
    ]
    base = section.split('<th scope="row">base</th>')[1].split("</tr>")[0]
    assert "0.75" in base and "3.25" in base and "41.5" in base
    assert "sampled per item" not in _words(
        report_tables(ranks=(2,), epochs=3, tasks=("humaneval",))
    )


def test_page_compares_measured_times_with_the_forecast() -> None:
    record = {
        "run": "full/seed0/lr0.0002-wd0",
        "status": "ok",
        "steps": 162,
        "evaluations": [[9, 1, 0.5]] * 18,
        "training_seconds": 7.5,
        "wall_seconds": 22.5,
        "tokens_per_second": 100.0,
        "batched_runs": 1,
        "peak_memory_gib": 1.0,
        "device": "CPU, 1 of 2 threads",
        "processes": 1,
    }
    study = load_study({"study": "mini"}, STUDIES)[1]
    made = make_tables(ranks=(2,))
    assert "forecast against measured" not in _words(ReportTables(**made))
    made["study"]["forecast"] = rows = forecast_against_measured(study, [record])
    page = _words(ReportTables(**made))
    table = page.split("forecast against measured")[1].split("</table>")[0]
    assert f"<td>7.5 / {rows[0]['training_forecast']:.1f}</td>" in table
