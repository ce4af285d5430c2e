"""Pages that several test modules read."""

from __future__ import annotations

from pathlib import Path

import pytest

from forgetting.report.frames import ReportTables
from forgetting.report.page import write_report
from scripts import report
from support.result_tables import hostile_tables, write
from support.result_tables import tables as make_tables


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a page and its figures, written by the program from tables on disk."""
    folder = tmp_path_factory.mktemp("report")
    source = write(folder / "tables", make_tables(diverged=("lora-r8",)))
    arguments = ["--tables", str(source), "--output", str(folder / "tradeoff.html")]
    report.main([*arguments, "--figures", str(folder / "figures")])
    return folder


@pytest.fixture(scope="session")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of a study that tries to break out of it."""
    folder = tmp_path_factory.mktemp("hostile")
    write_report(ReportTables(**hostile_tables()), folder / "page.html", folder / "figures")
    return folder / "page.html"
