"""The page: what it says, that it loads nothing, escapes everything, and works in a browser."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import struct
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from forgetting.errors import InputError
from forgetting.report import summary
from forgetting.report.charts import FIGURES
from forgetting.report.frames import ReportTables, read_tables
from forgetting.report.narrative import narrative
from forgetting.report.page import chart_spec, render, script_json, write_report
from scripts import report
from support import browser
from support import result_tables as synthetic

EVIL = "</script><script>window.evil = 1</script><img src=x onerror='window.evil=2'>"


class Elements(HTMLParser):
    """Tags with their attributes, and the text of elements by id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def _tables(**options: Any) -> ReportTables:
    return ReportTables(**synthetic.tables(**options))


def _words(tables: ReportTables) -> str:
    """The page but for its drawings, which take most of the time."""
    return render(tables, {})


def _evil() -> dict[str, Any]:
    """A study in which all that is named or noted tries to break out of the page."""
    made = synthetic.tables(ranks=(2,), rates=(1e-3,), old=(f"old {EVIL}",), epochs=5)
    for name in ("runs", "trajectory", "selection", "benchmarks"):
        made[name].loc[made[name]["run"] != "base", "run"] += EVIL
    made["runs"].loc[made["runs"]["kind"] != "base", "label"] += EVIL
    made["selection"]["reason"] = EVIL
    made["study"]["study"].update(title=EVIL, description=EVIL, name=EVIL)
    made["study"]["notes"] = [EVIL]
    made["study"]["provenance"]["hardware"] = {EVIL: EVIL}
    return made


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page and its figures, written by the program from tables on disk."""
    folder = tmp_path_factory.mktemp("report")
    tables = synthetic.write(folder / "tables", synthetic.tables(diverged=("lora-r8",)))
    arguments = ["--tables", str(tables), "--output", str(folder / "tradeoff.html")]
    report.main([*arguments, "--figures", str(folder / "figures")])
    return folder


@pytest.fixture(scope="module")
def evil_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a study that tries to break out of it."""
    folder = tmp_path_factory.mktemp("evil")
    write_report(ReportTables(**_evil()), folder / "page.html", folder / "figures")
    return folder / "page.html"


def test_figures_are_written_as_svg_and_png(written: Path) -> None:
    assert sorted(path.name for path in (written / "figures").iterdir()) == sorted(
        f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")
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


def test_the_page_loads_nothing(written: Path) -> None:
    """No element refers to anything outside the file, and the policy would not let it."""
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


def test_equal_tables_give_an_equal_page(written: Path) -> None:
    tables = read_tables(written / "tables")
    specs = {name: chart_spec(figure(tables)) for name, figure in FIGURES.items()}
    assert render(tables, specs) == (written / "tradeoff.html").read_text()


def test_text_from_outside_is_escaped(evil_page: Path) -> None:
    """Nothing that a model, a file or a configuration wrote becomes an element."""
    elements = Elements(evil_page.read_text())
    assert len([tag for tag, _ in elements.tags if tag == "script"]) == 3
    assert not [tag for tag, _ in elements.tags if tag == "img"]
    assert not [name for _, a in elements.tags for name in a if name.startswith("on")]


def test_script_json_holds_no_markup_and_reads_back() -> None:
    value = {"a": "</script><!-- \u2028 & ' \" ]]>", "b": [1, None, 0.5]}
    text = str(script_json(value))
    assert "<" not in text
    assert "\u2028" not in text
    assert json.loads(text) == value


def test_the_answer_compares_the_methods_that_keep_most_and_least() -> None:
    """Their order is judged by the difference on the same questions, not by two intervals."""
    tables = _tables()
    said, qualified = narrative(tables)
    cells = {line.label: line.cells["real_authors"] for line in summary.summary(tables)[1:]}
    most, least = cells["full"], cells["rank 2"]
    assert most.value == max(cell.value for cell in cells.values())
    assert least.value == min(cell.value for cell in cells.values())
    assert "ROUGE-L recall on new authors reaches 0.9" in said[0]
    assert f"full fine-tuning keeps most, {most.value:.2f}" in said[1]
    assert f"rank 2 least, {least.value:.2f} ({least.interval})" in said[1]
    assert "on the same questions 0.20 more (0.10 to 0.30)." in said[1]
    assert said[-1] == "There the methods have learnt new authors to between 0.85 and 0.90."
    assert not qualified


def test_the_answer_says_where_a_difference_may_be_chance() -> None:
    made = synthetic.tables()
    made["comparisons"]["high_all"] = 0.05
    assert (
        "0.20 more (\u22120.05 to 0.30), which may be chance."
        in (narrative(ReportTables(**made))[0][1])
    )


def test_what_the_base_does_not_know_is_not_ranked() -> None:
    """Who keeps most of nothing is a matter of chance, and it must not read like a finding."""
    made = synthetic.tables()
    rows = made["trajectory"]
    rows.loc[(rows["run"] == "base") & (rows["probe"] == "real_authors"), "value"] = 0.03
    said = narrative(ReportTables(**made))[0]
    assert not [one for one in said if one.startswith("On real authors, where")]
    assert [one for one in said if one.startswith("On world facts, where")]
    assert (
        "On real authors the base itself has only 0.03: there is next to nothing to forget, and no "
        "method is ranked by it."
    ) in said


def test_benchmarks_at_chance_are_named() -> None:
    """A base that guesses has nothing to lose there."""
    made = synthetic.tables()
    rows = made["benchmarks"]
    main = rows["main"].astype(bool) & (rows["run"] == "base")
    rows.loc[main, "low"] = rows.loc[main, "chance"] + 0.01
    assert "chance at" not in " ".join(narrative(ReportTables(**made))[0])
    rows.loc[main & rows["task"].isin(["gsm8k", "winogrande"]), "low"] -= 0.01
    assert "The base is not surely better than chance at gsm8k and winogrande" in " ".join(
        narrative(ReportTables(**made))[0]
    )


def test_what_is_above_the_base_was_not_kept() -> None:
    """Fine-tuning can teach old questions too: that is a gain, not retention."""
    made = synthetic.tables()
    rows = made["trajectory"]
    rows.loc[(rows["run"] == "base") & (rows["probe"] == "real_authors"), "value"] = 0.15
    said = next(
        one for one in narrative(ReportTables(**made))[0] if one.startswith("On real authors")
    )
    assert " has most, " in said
    assert " keeps " not in said


def test_the_answer_names_methods_without_a_checkpoint() -> None:
    said, qualified = narrative(_tables(never=("lora-r2",)))
    assert "rank 8 least" in said[1]
    assert qualified == ["Rank 2 has no selected checkpoint: ROUGE never reached 0.9."]


def test_the_answer_claims_nothing_where_nothing_was_selected() -> None:
    said, qualified = narrative(_tables(ranks=(2,), never=("lora-r2", "full")))
    assert said == [
        "No run has a checkpoint selected at ROUGE-L recall 0.9 on new authors: nothing to compare."
    ]
    assert len(qualified) == 2


def test_a_fallback_checkpoint_is_marked() -> None:
    made = synthetic.tables()
    made["selection"].loc[0, "status"] = "last"
    html = _words(ReportTables(**made))
    assert "reaches 0.9; rank 2 never reaches it: there the last checkpoint stands in." in html
    assert "<small>last</small>" in html


def _at_last(methods: tuple[str, ...], learnt: dict[str, float] | None = None) -> dict[str, Any]:
    """Tables in which methods never reach the threshold and stand at their last checkpoint."""
    made = synthetic.tables()
    selection, rows = made["selection"], made["trajectory"]
    selection.loc[selection["method"].isin(methods), "status"] = "last"
    for method, value in (learnt or {}).items():
        run, step = selection.set_index("method").loc[method, ["run", "step"]]
        there = (rows["run"] == run) & (rows["step"] == step) & (rows["knowledge"] == "new")
        rows.loc[there, "value"] = value
    return made


def test_methods_that_do_not_arrive_are_not_ranked_among_those_that_do() -> None:
    said, qualified = narrative(ReportTables(**_at_last(("lora-r2", "lora-r8"))))
    assert said[0].endswith(
        "reaches 0.9; rank 2 and rank 8 never reach it: there the last checkpoint stands in."
    )
    assert "full fine-tuning keeps most" in said[1]
    assert "rank 32 least" in said[1]
    assert not qualified


def test_where_no_method_arrives_it_is_said_and_unequal_learning_is_not_ranked() -> None:
    every = ("lora-r2", "lora-r8", "lora-r32", "lora-r128", "full")
    said, _ = narrative(ReportTables(**_at_last(every, {"lora-r2": 0.21, "full": 0.87})))
    assert said == [
        "No method reaches ROUGE-L recall 0.9 on new authors: each stands at its last checkpoint.",
        "The methods have learnt new authors to between 0.21 (rank 2) and 0.87 (full fine-tuning), "
        "too unequally to say which keeps more of the old: what learns less has less to forget.",
    ]
    said, _ = narrative(ReportTables(**_at_last(every)))
    assert said[0].startswith("No method reaches")
    assert "keeps most" in said[1]


def test_stand_ins_that_differ_surely_in_learning_are_not_ranked() -> None:
    """Even if the difference is small; methods that reach the threshold are, with a caution."""
    every = ("lora-r2", "lora-r8", "lora-r32", "lora-r128", "full")
    for methods, ranked in ((every, False), ((), True)):
        made = _at_last(methods, {"lora-r2": 0.75})
        pairs = made["comparisons"]
        told_of = ["difference", "low_all", "high_all"]
        pairs.loc[pairs["probe"] == "new_authors", told_of] = 0.0
        first = (pairs["label"] == "rank 2") & (pairs["other"] == "full")
        first &= pairs["probe"] == "new_authors"
        pairs.loc[first, told_of] = [-0.11, -0.17, -0.05]
        told = " ".join(narrative(ReportTables(**made))[0])
        assert ("keeps most" in told) is ranked
        assert ("too unequally to say which keeps more" in told) is not ranked
        assert (
            ", which is not equal: full fine-tuning has 0.11 more than rank 2 (0.05 to 0.17 on the "
            "same questions), and may have forgotten more for that alone." in told
        ) is ranked


def test_the_largest_of_many_differences_is_told_only_where_all_bounds_hold_at_once() -> None:
    """One of ten pairs leaves out 0 by its own interval in many studies of equal methods."""
    made = synthetic.tables()
    pairs = made["comparisons"]
    pairs[["difference", "low", "high", "low_all", "high_all"]] = -0.11, -0.17, -0.05, -0.23, 0.01
    said, _ = narrative(ReportTables(**made))
    assert "0.11 more (\u22120.01 to 0.23), which may be chance." in said[1]
    assert "not equal" not in " ".join(said)


def test_answers_that_go_on_are_told_where_recall_hides_them() -> None:
    made = synthetic.tables()
    rows = made["trajectory"]
    tuned = rows["run"].str.startswith("full/") & (rows["probe"] == "world_facts")
    rows.loc[tuned & (rows["metric"] == "rougeL_f1"), "value"] *= 0.5
    rows.loc[tuned & (rows["metric"] == "generated_tokens"), "value"] = 31.0
    tables = ReportTables(**made)
    full = summary.summary(tables)[-1]
    recall, f1 = full.cells["world_facts"].value, full.f1["world_facts"].value
    assert f1 == pytest.approx(recall / 2)
    assert narrative(tables)[0][-1] == (
        "Recall does not see that answers go on: F1 falls much further than recall with 1 of 5 "
        f"methods, most with full fine-tuning on world facts, to {f1:.2f} from 0.85 (recall to "
        f"{recall:.2f} from 0.85), at 31.0 tokens an answer against 14.0."
    )
    assert "go on" not in " ".join(narrative(_tables())[0])
    text = summary.summary_frame(tables).set_index(["method", "probe"]).loc[("full", "world_facts")]
    assert text["rougeL_f1"] == pytest.approx(f1, abs=1e-5)
    assert text["rougeL_f1_change_against_base"] == pytest.approx(f1 - 0.85, abs=1e-5)


def test_what_rises_is_not_said_to_fall() -> None:
    """A base that knows nothing of a probe: F1 rises less than recall, and does not fall."""
    made = synthetic.tables()
    rows = made["trajectory"]
    for metric, before, after in (("rougeL_recall", 0.03, 0.33), ("rougeL_f1", 0.01, 0.15)):
        of_metric = (rows["metric"] == metric) & rows["probe"].isin(["world_facts", "real_authors"])
        rows.loc[of_metric, "value"] = after
        rows.loc[of_metric, "change"] = after - before
        rows.loc[of_metric & (rows["run"] == "base"), "value"] = before
    assert "falls" not in " ".join(narrative(ReportTables(**made))[0])


def test_the_summary_has_change_and_interval_and_averages_seeds() -> None:
    tables = _tables(seeds=(0, 1, 2))
    base, *lines = summary.summary(tables)
    assert base.cells["real_authors"].change is None
    for line in lines:
        cell = line.cells["real_authors"]
        assert len(line.steps) == 3
        assert cell.low < cell.value < cell.high
        assert cell.lowest <= cell.value <= cell.highest
        assert cell.change == pytest.approx(cell.value - base.cells["real_authors"].value)
    assert narrative(tables)[1] == ["Values and interval bounds are means over seeds."]


def test_the_selection_rule_is_told_as_configured() -> None:
    made = synthetic.tables()
    made["study"]["study"]["selection"].update(
        threshold=0.75, hyperparameters="smallest-lr", deadline_epochs=6, if_not_reached="last"
    )
    text = " ".join(summary.selection_rule(ReportTables(**made)))
    assert "first reaches 0.75" in text
    assert "smallest learning rate that reaches it within 6 epochs" in text
    assert "last checkpoint" in text


def test_tables_can_be_downloaded_from_the_page(written: Path) -> None:
    links = {
        str(attributes["download"]): str(attributes["href"])
        for tag, attributes in Elements((written / "tradeoff.html").read_text()).tags
        if tag == "a" and "download" in attributes
    }
    names = ("summary", "selection", "runs", "benchmarks", "benchmark_course")
    assert set(links) == {f"mini-{name}.csv" for name in names}
    text = base64.b64decode(links["mini-selection.csv"].split(",", 1)[1]).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["method"] for row in rows] == list(read_tables(written / "tables").selection.method)


def test_notes_provenance_and_every_run_are_on_the_page(written: Path) -> None:
    html = (written / "tradeoff.html").read_text()
    tables = read_tables(written / "tables")
    for text in (*tables.study["notes"], "0123456789abcdef", "torch: 2.13.0", "ab" * 32):
        assert text in html
    assert "computed in float32 on CPU, 1 of 2 threads (Made CPU 9000); with another" in html
    assert all(f"<code>{run}</code>" in html for run in tables.tuned["run"])
    assert html.count('class="chosen"') == 5


def test_the_definitions_tell_how_many_examples_each_prompt_had() -> None:
    """The number of the loaded task, where the study left it to the task."""
    html = _words(_tables(ranks=(2,), epochs=3, tasks=("gsm8k", "humaneval")))
    cells = re.findall(r'<th scope="row">(gsm8k|humaneval)</th><td>.*?</td><td>(.*?)</td>', html)
    assert cells == [("gsm8k", "5"), ("humaneval", "0")]


@pytest.mark.parametrize("missing", ["runs.parquet", "study.json"])
def test_a_missing_table_is_named(tmp_path: Path, missing: str) -> None:
    folder = synthetic.write(tmp_path, synthetic.tables(ranks=(2,), epochs=3))
    (folder / missing).unlink()
    with pytest.raises(InputError, match=missing):
        read_tables(folder)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    made = synthetic.tables(ranks=(2,), epochs=3)
    made["trajectory"] = made["trajectory"].drop(columns="low")
    folder = synthetic.write(tmp_path, made)
    with pytest.raises(InputError, match=r"trajectory\.parquet: column `low`"):
        read_tables(folder)


def test_the_program_fails_with_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    with pytest.raises(SystemExit) as ended:
        report.main(["--tables", str(tmp_path), "--output", str(output), "--figures", str(output)])
    assert ended.value.code == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not output.exists()


needs_browser = pytest.mark.skipif(
    browser.EXECUTABLE is None, reason="no `chromium` on this machine"
)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[browser.Page]:
    with browser.Page(tmp_path / "profile") as opened:
        yield opened


@needs_browser
@pytest.mark.parametrize(
    ("width", "height", "dark"), [(390, 844, False), (1280, 800, True), (1920, 1080, False)]
)
def test_the_page_works_offline_at_every_width(
    written: Path, page: browser.Page, width: int, height: int, dark: bool
) -> None:
    """Every figure is drawn, nothing is requested, nothing complains, nothing overflows."""
    address = (written / "tradeoff.html").as_uri()
    page.open(address, width, height, dark)
    assert page.requests == [address]
    assert page.errors == []
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run(
        "[...document.querySelectorAll('.chart')].every(c => c.scrollWidth <= c.clientWidth)"
    )
    marks = page.run(
        "[...document.querySelectorAll('.chart')]"
        ".map(c => c.querySelectorAll('svg .mark-symbol path').length)"
    )
    assert min(marks) > 10
    assert page.run("document.documentElement.dataset.theme") == ("dark" if dark else "light")


@needs_browser
def test_methods_are_singled_out_in_all_figures_and_the_theme_keeps_it(
    written: Path, page: browser.Page
) -> None:
    page.open((written / "tradeoff.html").as_uri(), 1280, 800)
    faded = "document.querySelectorAll('.chart .mark-symbol path[opacity=\"0.06\"]').length"
    before = page.run(faded)
    page.run("document.querySelector('.chip[data-label=\"full\"]').click()")
    page.wait(f"{faded} > {before} + 50")
    assert page.run("document.querySelectorAll('.chip[aria-pressed=true]').length") == 1
    page.run("document.getElementById('theme').click()")
    page.wait("document.documentElement.dataset.theme === 'dark'")
    page.wait("!document.querySelector('.chart svg text[fill=\"#5b6472\"]')")
    page.wait(f"{faded} > {before} + 50")
    assert page.errors == []


@needs_browser
def test_the_menu_switches_the_definition_of_the_truth_ratio(
    written: Path, page: browser.Page
) -> None:
    page.open((written / "tradeoff.html").as_uri(), 1280, 800)
    places = (
        "[...document.querySelectorAll('[data-figure=truth_ratio] .mark-symbol path')]"
        ".map(p => p.getAttribute('transform')).join()"
    )
    before = page.run(places)
    page.run(
        "(() => { const menu = document.querySelector('[data-figure=truth_ratio] select');"
        "menu.value = 'geometric'; menu.dispatchEvent(new Event('change')); })()"
    )
    page.wait(f"{places} !== {json.dumps(before)}")
    assert page.errors == []


@needs_browser
def test_the_menu_shows_f1_in_place_of_recall(written: Path, page: browser.Page) -> None:
    page.open((written / "tradeoff.html").as_uri(), 390, 844)
    titles = (
        "[...document.querySelectorAll('[data-figure=trajectories] svg text')]"
        ".map(t => t.textContent).filter(t => t.startsWith('ROUGE'))"
    )
    assert page.run(titles) == ["ROUGE-L recall"] * 3
    page.run(
        "(() => { const menu = document.querySelector('[data-figure=trajectories] select');"
        "menu.value = 'ROUGE-L F1'; menu.dispatchEvent(new Event('change')); })()"
    )
    page.wait(f"{titles}.every(t => t === 'ROUGE-L F1')")
    page.run("document.getElementById('theme').click()")
    page.wait("!document.querySelector('[data-figure=benchmarks] svg text[fill=\"#5b6472\"]')")
    assert page.run(titles) == ["ROUGE-L F1"] * 3
    assert page.errors == []


@needs_browser
@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_all_that_is_kept_without_moving_sideways(
    written: Path, page: browser.Page, width: int
) -> None:
    """Every cell of the summary with its probe's name, and every chip, lies on the screen."""
    page.open((written / "tradeoff.html").as_uri(), width, 844)
    boxes = page.run(
        "[...document.querySelectorAll('.summary td, .summary td > *, .chip:not([hidden])')]"
        ".map(e => e.getBoundingClientRect()).filter(b => b.width).map(b => [b.left, b.right])"
    )
    assert len(boxes) > 60
    assert min(left for left, _ in boxes) >= 0
    assert max(right for _, right in boxes) <= width
    names = page.run(
        "[...document.querySelectorAll('.summary tbody tr:last-child td')]"
        ".map(e => getComputedStyle(e, '::before').content)"
    )
    assert names[1] == '"real authors\\a old knowledge"'
    assert page.errors == []


@needs_browser
def test_runs_can_be_sorted_and_filtered(written: Path, page: browser.Page) -> None:
    page.open((written / "tradeoff.html").as_uri(), 1280, 800)
    column = (
        "[...document.querySelectorAll('#run-table tbody tr')].filter(r => !r.hidden)"
        ".map(r => Number(r.cells[1].dataset.value))"
    )
    button = "document.querySelectorAll('#run-table thead button')[1].click()"
    page.run(button)
    assert page.run(column) == sorted(page.run(column))
    page.run(button)
    assert page.run(column) == sorted(page.run(column), reverse=True)
    page.run(
        "(() => { const f = document.getElementById('filter'); f.value = 'diverged';"
        "f.dispatchEvent(new Event('input')); })()"
    )
    assert page.run(f"{column}.length") == 1
    assert page.run("document.getElementById('count').textContent") == "1 of 15 runs"


@needs_browser
def test_hostile_text_does_nothing_in_a_browser(evil_page: Path, page: browser.Page) -> None:
    page.open(evil_page.as_uri(), 390, 844)
    assert page.run("window.evil === undefined")
    assert page.run("document.querySelectorAll('img').length") == 0
    assert page.run("document.title") == EVIL
    assert page.run("document.documentElement.scrollWidth") <= 390
    assert page.errors == []


def test_what_a_study_does_not_measure_has_no_figure() -> None:
    """A caption about dots under an empty frame would make readers look for what went wrong."""
    made = synthetic.tables(tasks=())
    made["study"]["study"]["general_text"] = None
    html = _words(ReportTables(**made))
    assert 'data-figure="truth_ratio"' in html
    assert "<b>Figure 3.</b>" in html
    assert 'data-figure="distance"' not in html
    assert 'data-figure="benchmarks"' not in html
    assert 'data-figure="course"' not in html
    html = _words(ReportTables(**synthetic.tables(tasks=())))
    assert "<b>Figure 4.</b>" in html
    assert 'data-figure="distance"' in html


def test_emphasis_of_a_description_is_shown_and_all_else_escaped() -> None:
    made = synthetic.tables()
    made["study"]["study"]["description"] = "As in *Low <b> ranks*, 2 * 3"
    assert "As in <em>Low &lt;b&gt; ranks</em>, 2 * 3</p>" in _words(ReportTables(**made))


def test_methods_that_learnt_nothing_are_not_ranked() -> None:
    """As at toy size: who keeps most is then who changed least."""
    made = synthetic.tables()
    rows = made["trajectory"]
    rows.loc[rows["probe"] == "new_authors", "value"] = 0.001
    said = narrative(ReportTables(**made))[0]
    assert "None of the methods has learnt new authors: there is nothing to rank." in said
    assert not [one for one in said if "most" in one and "least" in one]


@needs_browser
def test_a_study_with_nothing_to_draw_still_shows_every_figure(
    tmp_path: Path, page: browser.Page
) -> None:
    made = synthetic.tables(ranks=(), rates=(1e-5,), old=(), tasks=(), never=("full",), epochs=3)
    write_report(ReportTables(**made), tmp_path / "page.html", tmp_path / "figures")
    page.open((tmp_path / "page.html").as_uri(), 390, 844)
    assert page.errors == []
    assert page.run("document.documentElement.scrollWidth") <= 390


@needs_browser
def test_a_tooltip_stays_on_a_phone_s_screen(written: Path, page: browser.Page) -> None:
    page.open((written / "tradeoff.html").as_uri(), 390, 844)
    point = page.run(
        "(() => { const mark = document.querySelectorAll("
        "'[data-figure=trajectories] .mark-symbol path')[9];"
        "mark.scrollIntoView({ behavior: 'instant', block: 'center' });"
        "const box = mark.getBoundingClientRect();"
        "return [box.left + box.width / 2, box.top + box.height / 2]; })()"
    )
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=point[0], y=point[1])
    page.wait("document.querySelector('#vg-tooltip-element.visible td') !== null")
    told = "document.getElementById('vg-tooltip-element')"
    assert "ROUGE-L recall" in page.run(f"{told}.textContent")
    assert page.run(f"{told}.textContent").count("ROUGE-L") == 1
    box = page.run(f"(b => [b.left, b.top, b.right, b.bottom])({told}.getBoundingClientRect())")
    assert box[0] >= 0
    assert box[1] >= 0
    assert box[2] <= 390
    assert box[3] <= 844


def test_refusals_are_defined_where_they_are_measured() -> None:
    """There is no chance level of refusing, and none is made up."""
    html = _words(_tables(ranks=(2,), epochs=3, tasks=("gsm8k", "refusals")))
    assert "thirteen published keywords" in html
    row = html.split('<tr><th scope="row">refusals</th>')[1].split("</tr>")[0]
    assert "<td>refused</td>" in row
    assert row.rstrip().endswith("<td></td>")
    without = _words(_tables(ranks=(2,), epochs=3, tasks=("gsm8k",)))
    assert "thirteen published keywords" not in without


def test_rouge_of_another_tokenizer_is_named_wherever_rouge_is() -> None:
    made = synthetic.tables(ranks=(2,), epochs=3)
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


def test_answers_that_were_drawn_have_pass_rates_and_diversity_on_the_page() -> None:
    """A row per model, a column per pass@k and for the different answers; the figure has one."""
    made = synthetic.tables(ranks=(2,), epochs=3, tasks=("gsm8k", "humaneval"))
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
    section = html.split("humaneval: 50 answers drawn to each item")[1].split("</section>")[0]
    assert [part.split("<")[0] for part in section.split('<th scope="col">')[1:]] == [
        "Model",
        "pass@1",
        "pass@10",
        "Different answers that pass",
        "Different answers that fail",
    ]
    base = section.split('<th scope="row">base</th>')[1].split("</tr>")[0]
    assert "0.75" in base and "3.25" in base and "41.5" in base
    assert "drawn to each item" not in _words(_tables(ranks=(2,), epochs=3, tasks=("humaneval",)))
