"""Files of tables: found in a folder, read row by row, faults told by file, line and column."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from forgetting.records import InputError, read_numbered
from forgetting.sections.columns import Columns

Row = dict[str, Any]
Where = Callable[[str], str]
"""Gives the file and the line of a row by its id."""

PLAIN = Columns()


def find_table(folder: Path, table: str) -> Path:
    """The file of a table in a folder: TABLE.jsonl, TABLE.json or TABLE.csv."""
    for suffix in (".jsonl", ".json", ".csv"):
        path = folder / f"{table}{suffix}"
        if path.is_file():
            return path
    raise InputError(f"{folder}: there is no {table}.jsonl (nor .json, nor .csv) in this folder")


def read_rows(path: Path, columns: Columns) -> Iterator[tuple[str, Row]]:
    """Every row under our names of columns, with the place where it stands."""
    line = 0
    for line, row in _read_csv(path) if path.suffix == ".csv" else read_numbered(path):
        renamed = columns.renamed
        kept = {name: value for name, value in row.items() if name not in renamed}
        kept |= {ours: row[theirs] for ours, theirs in renamed.items() if theirs in row}
        yield f"{path}, line {line}", kept
    if not line:
        raise InputError(f"{path}: no rows; expected one JSON object a line")


def _read_csv(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows of a table with a line of names, all of them text; empty cells are absent."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row:
                    raise InputError(f"{where}: more cells than the first line has names")
                yield reader.line_num, {name: cell for name, cell in row.items() if cell}
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason})") from None
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not a CSV row ({error})") from None


def place(path: Path, row_id: str) -> str:
    """The file and the line of a row that was read, by its id."""
    number = int(row_id.rpartition("/")[2])
    return next(islice(read_rows(path, PLAIN), number, None))[0]


def is_text(value: object) -> bool:
    """Is it a text of more than blanks?"""
    return isinstance(value, str) and bool(value.strip())


def text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """A text that a row must have."""
    if column not in row:
        names = ", ".join(row) or "nothing"
        raise InputError(f"{where}: expected a non-empty string `{column}`; the row has {names}")
    text: str = row[column]
    if not is_text(text):
        raise InputError(f"{where}: expected a non-empty string `{column}`, found {found(text)}")
    return text


def found(value: object) -> str:
    """A value in the words of JSON, which users wrote, in short."""
    if isinstance(value, str):
        return f"the text `{value[:40]}`" if value.strip() else "a blank one"
    if isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "an object"
        return kind if value else f"{kind} with nothing in it"
    words = json.dumps(value)
    return f"the number {words}" if words not in ("null", "true", "false") else words
