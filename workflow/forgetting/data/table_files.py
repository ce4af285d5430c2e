"""Files of tables: found in a folder, read row by row, faults told by file, line and column."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from forgetting.config.data import ColumnsConfig
from forgetting.errors import InputError
from forgetting.io import read_jsonl_numbered

Row = dict[str, Any]
Locate = Callable[[str], str]
"""Gives the file and the line of a row by its id."""

_PLAIN_TYPES = ColumnsConfig()

SAMPLED, TEXT_SHARE = 1000, 0.1
"""A column has text if this share of that many first rows has some. Most rows of Alpaca have no
`input`."""

_IGNORED_COLUMNS = re.compile(
    "id|idx|index|uid|uuid|hash|source|origin|dataset|config|split|subset|category|topic|subject|"
    "task|type|kind|tags?|label|language|lang|url|license|date|author|user|model|meta|metadata|"
    "notes?|comment|difficulty|level|paraphrased_(answer|question)|perturbed_answer|"
    "original_(answer|question)",
    re.IGNORECASE,
)
"""Columns that are not expected to be trained on: identifiers, sources, kinds, other wordings."""

MAX_CELL_CHARACTERS = 2**24
"""Characters of the longest cell of a CSV table: an open quotation mark reads no further."""


def find_table(folder: Path, table: str) -> Path:
    """The file of a table in a folder: TABLE.jsonl, TABLE.json or TABLE.csv."""
    for suffix in (".jsonl", ".json", ".csv"):
        path = folder / f"{table}{suffix}"
        if path.is_file():
            return path
    raise InputError(f"{folder}: there is no {table}.jsonl (nor .json, nor .csv) in this folder")


def read_rows(path: Path, columns: ColumnsConfig) -> Iterator[tuple[str, Row]]:
    """Yield every row under our column names, with its file and line."""
    where = ""
    for where, row, names in _named_rows(path, columns):
        yield where, _renamed(row, names)
    if not where:
        expected = "a line of names and rows" if path.suffix == ".csv" else "one JSON object a line"
        raise InputError(f"{path}: no rows; expected {expected}")


def _named_rows(path: Path, columns: ColumnsConfig) -> Iterator[tuple[str, Row, dict[str, str]]]:
    """Yield file and line, the row as it is, and the table's names of the renamed columns."""
    is_csv = path.suffix == ".csv"
    names: dict[str, str] | None = None
    for line, row in _read_csv(path) if is_csv else read_jsonl_numbered(path):
        where = f"{path}, line {line}"
        names = columns_of(row, columns, where) if names is None else names
        _refuse_mixed_names(row, names, columns, where)
        # An empty cell is an absent one, but its column is a column of the table.
        yield where, {k: v for k, v in row.items() if v} if is_csv else row, names


def _renamed(row: Row, names: dict[str, str]) -> Row:
    kept = {name: value for name, value in row.items() if name not in names}
    return kept | {ours: row[theirs] for ours, theirs in names.items() if theirs in row}


def columns_of(row: Row, columns: ColumnsConfig, where: str) -> dict[str, str]:
    """Return the name of each renamed column in a table whose first row is given.

    `columns` holds for all tables of a dataset. A table that lacks a name from there and has our
    own name is read under ours.

    Raises:
        InputError: one column is under our name, and another could be under either.
    """
    taken = set(columns.renamed.values())
    ours_only = {
        ours
        for ours, theirs in columns.renamed.items()
        if theirs not in row and ours in row and ours not in taken
    }
    for ours, theirs in columns.renamed.items():
        if ours_only and theirs in row and ours in row:
            raise InputError(
                f"{where}: `{ours}` and `{theirs}` are both columns here, and `columns` of the "
                f"dataset does not fit the others ({', '.join(sorted(ours_only))}); rename or "
                "remove one of the two, or put the table into a dataset of its own"
            )
    return {ours: ours if ours in ours_only else theirs for ours, theirs in columns.renamed.items()}


def _refuse_mixed_names(
    row: Row, names: dict[str, str], columns: ColumnsConfig, where: str
) -> None:
    """Refuse a row that has the dataset's name of a column that the first row has under ours."""
    for ours, theirs in columns.renamed.items():
        if names[ours] == ours and theirs in row:
            raise InputError(
                f"{where}: this row has `{theirs}`, where the first row of the table has "
                f"`{ours}`; use one name in the whole table"
            )


def unused_columns(
    path: Path, columns: ColumnsConfig, used: Callable[[Row], set[str]]
) -> list[str]:
    """Return the columns of a table that hold text and are not read, without well-known ones.

    Args:
        columns: what the dataset calls its columns.
        used: gives the columns of a row that are read, under our names.
    """
    found: Counter[str] = Counter()
    total = 0
    for _, row, names in islice(_named_rows(path, columns), SAMPLED):
        read = {names.get(ours, ours) for ours in used(_renamed(row, names))}
        found.update(
            name
            for name, value in row.items()
            if name not in read and not _IGNORED_COLUMNS.fullmatch(name) and _holds_text(value)
        )
        total += 1
    return [name for name, count in found.items() if count >= TEXT_SHARE * total]


def _holds_text(value: object) -> bool:
    """Is there a letter in a value, or in one of its parts?"""
    if isinstance(value, dict | list):
        return any(map(_holds_text, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and any(map(str.isalpha, value))


def _read_csv(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a table with a line of column names, and the line where each begins."""
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    names: list[str] = []
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(_text_lines(file, path), strict=True)
        while True:
            first = reader.line_num + 1
            where = f"{path}, line {first}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                to = f" to {reader.line_num}" if reader.line_num > first else ""
                raise InputError(
                    f"{where}{to}: not a CSV row ({error}); put a cell with quotation marks, "
                    "commas or line breaks into quotation marks, double those inside it, and "
                    "close it"
                ) from None
            if cells is None:
                return
            if not cells:
                continue
            if not names:
                names = _csv_names(cells, where)
            else:
                yield first, _csv_row(names, cells, where)


def _text_lines(file: TextIO, path: Path) -> Iterator[str]:
    """Yield the lines of a file; refuse the first one that is not UTF-8 text."""
    for number, line in enumerate(file, start=1):
        try:
            line.encode()
        except UnicodeEncodeError:
            raise InputError(f"{path}, line {number}: not UTF-8 text; save it as UTF-8") from None
        if "\0" in line:
            raise InputError(
                f"{path}, line {number}: holds a zero byte, as UTF-16 does; save it as UTF-8"
            )
        yield line


def _csv_names(cells: list[str], where: str) -> list[str]:
    """Return the column names of a CSV table, without spaces around them."""
    names = [cell.strip() for cell in cells]
    if len(names) == 1 and (mark := re.search("[;\t|]", names[0])):
        name = "tabs" if mark[0] == "\t" else f"`{mark[0]}`"
        raise InputError(
            f"{where}: columns are separated by {name}; separate them by commas, in every row"
        )
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice:
        raise InputError(f"{where}: the column `{twice}` is there twice; rename or remove one")
    return names


def _csv_row(names: list[str], cells: list[str], where: str) -> Row:
    """Return the cells of a CSV row by column."""
    if len(cells) != len(names):
        raise InputError(
            f"{where}: {len(cells)} cells for {len(names)} columns; put a cell with commas into "
            "quotation marks, and write a comma for every empty cell"
        )
    for name, cell in zip(names, cells, strict=True):
        if re.fullmatch(r'\s+".*"', cell, re.DOTALL):
            raise InputError(
                f"{where}: in column `{name}` there is a space between the comma and the quotation "
                "mark, which then is part of the text; remove the space"
            )
    return {name: cell for name, cell in zip(names, cells, strict=True) if name}


def source_line(path: Path, row_id: str) -> str:
    """The file and the line of a row that was read, by its id."""
    number = int(row_id.rpartition("/")[2])
    return next(islice(read_rows(path, _PLAIN_TYPES), number, None))[0]


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
        raise InputError(
            f"{where}: expected a non-empty string `{column}`, found {list_names(text)}"
        )
    return text


def list_names(value: object) -> str:
    """A value in the words of JSON, which users wrote, in short."""
    if isinstance(value, str):
        return f"the text `{value[:40]}`" if value.strip() else "a blank one"
    if isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "an object"
        return kind if value else f"{kind} with nothing in it"
    words = json.dumps(value)
    return f"the number {words}" if words not in ("null", "true", "false") else words
