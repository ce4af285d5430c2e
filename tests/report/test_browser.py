"""Tests of the page in a browser: figures, menus, widths, highlighting and hostile text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from forgetting.report.frames import ReportTables
from forgetting.report.page import write_report
from support import browser
from support.result_tables import HOSTILE_TEXT
from support.result_tables import tables as make_tables

pytestmark = pytest.mark.skipif(browser.EXECUTABLE is None, reason="no `chromium` on this machine")


@pytest.fixture
def page(tmp_path: Path) -> Iterator[browser.Page]:
    with browser.Page(tmp_path / "profile") as opened:
        yield opened


@pytest.mark.parametrize(
    ("width", "height", "dark"), [(390, 844, False), (1280, 800, True), (1920, 1080, False)]
)
def test_page_works_offline_at_every_width(
    written: Path, page: browser.Page, width: int, height: int, dark: bool
) -> None:
    """Every figure is drawn, without requests, errors or overflow."""
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


def test_highlighted_methods_survive_a_change_of_theme(written: Path, page: browser.Page) -> None:
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


def test_menu_switches_the_truth_ratio(written: Path, page: browser.Page) -> None:
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


def test_menu_switches_to_f1(written: Path, page: browser.Page) -> None:
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


@pytest.mark.parametrize("width", [320, 390])
def test_summary_fits_a_phone(written: Path, page: browser.Page, width: int) -> None:
    """Every cell of the summary, with its probe's name, and every chip is on the screen."""
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


def test_hostile_text_does_nothing_in_a_browser(hostile_page: Path, page: browser.Page) -> None:
    page.open(hostile_page.as_uri(), 390, 844)
    assert page.run("window.hostile === undefined")
    assert page.run("document.querySelectorAll('img').length") == 0
    assert page.run("document.title") == HOSTILE_TEXT
    assert page.run("document.documentElement.scrollWidth") <= 390
    assert page.errors == []


def test_page_shows_every_figure_without_data(tmp_path: Path, page: browser.Page) -> None:
    made = make_tables(ranks=(), rates=(1e-5,), old=(), tasks=(), never=("full",), epochs=3)
    write_report(ReportTables(**made), tmp_path / "page.html", tmp_path / "figures")
    page.open((tmp_path / "page.html").as_uri(), 390, 844)
    assert page.errors == []
    assert page.run("document.documentElement.scrollWidth") <= 390


def test_tooltip_fits_a_phone(written: Path, page: browser.Page) -> None:
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
    tooltip = "document.getElementById('vg-tooltip-element')"
    assert "ROUGE-L recall" in page.run(f"{tooltip}.textContent")
    assert page.run(f"{tooltip}.textContent").count("ROUGE-L") == 1
    box = page.run(f"(b => [b.left, b.top, b.right, b.bottom])({tooltip}.getBoundingClientRect())")
    assert box[0] >= 0
    assert box[1] >= 0
    assert box[2] <= 390
    assert box[3] <= 844
