"""Studies with a mistake, and the message that reports it (tests/data/invalid_studies.yaml)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

TABLE = Path(__file__).parents[1] / "data" / "invalid_studies.yaml"


def invalid_studies(study: str) -> list[Any]:
    """Return the rows of one study of the table, as parameters of a test."""
    rows = yaml.safe_load(TABLE.read_text(encoding="utf-8"))[study]
    return [pytest.param(row, id=row["id"]) for row in rows]


def edited(text: str, changes: Iterable[tuple[str, str]]) -> str:
    """Return the text of a study with the first occurrence of each old text replaced."""
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text


def assert_reports(message: str, row: dict[str, str], path: Path, facts: Path) -> None:
    """Check that a message has the file, line, key and text of a row.

    Args:
        message: the message of the mistake.
        row: the row of the table.
        path: the file of the study.
        facts: the folder of its tables, which the row calls FACTS.
    """
    place = re.match(re.escape(str(path)) + r", line (\d+): ", message)
    assert place, message
    line = path.read_text(encoding="utf-8").splitlines()[int(place[1]) - 1]
    assert line.strip() == row["line"]
    text = message.removeprefix(place[0])
    if key := row.get("key"):
        assert text.startswith(f"{key}: "), message
    assert row["message"].replace("FACTS", str(facts)) in text
