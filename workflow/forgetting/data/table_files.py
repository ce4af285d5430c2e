"""Find table files in a folder and read them row by row; errors name file, line and column."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from forgetting.config.data import ColumnsConfig, HasDatasets, TableRef
from forgetting.errors import InputError
from forgetting.io import read_jsonl_numbered

Row = dict[str, Any]
Locate = Callable[[str], str]
"""Returns the file and the line of a row by its id."""

STANDARD_COLUMNS = ColumnsConfig()
"""Columns of a dataset that renames none."""

SAMPLE_ROWS, MIN_TEXT_FRACTION = 1000, 0.1
"""A column holds text if this fraction of the first rows does: Alpaca's `input` is mostly empty."""

_IGNORED_COLUMNS = re.compile(
    "id|idx|index|uid|uuid|hash|source|origin|dataset|config|split|subset|category|topic|subject|"
    "task|type|kind|tags?|label|language|lang|url|license|date|author|user|model|meta|metadata|"
    "notes?|comment|difficulty|level|paraphrased_(answer|question)|perturbed_answer|"
    "original_(answer|question)",
    re.IGNORECASE,
)
"""Columns that are usually not trained on: identifiers, sources, kinds and paraphrases."""

MAX_CELL_CHARACTERS = 2**24
"""Characters of the longest cell of a CSV table; limits how far an open quotation mark reads."""


def find_table(folder: Path, table: str) -> Path:
    """Return the file of a table in a folder: TABLE.jsonl, TABLE.json or TABLE.csv.

    Raises:
        InputError: there is none, or more than one.
    """
    names = [f"{table}{suffix}" for suffix in (".jsonl", ".json", ".csv")]
    paths = [folder / name for name in names if (folder / name).is_file()]
    if not paths:
        raise InputError(f"{folder}: there is no {names[0]} (nor .json, nor .csv) in this folder")
    if len(paths) > 1:
        raise InputError(
            f"{folder}: both {paths[0].name} and {paths[1].name} could be the table {table}; "
            "rename or remove one"
        )
    return paths[0]


def table_in_folder(study: HasDatasets, table: str) -> Path | None:
    """Return the file of a table that is in a folder of the user's; None for other tables.

    Raises:
        InputError: there is no such file.
    """
    ref = TableRef.parse(table)
    folder = ref.config(study).folder
    return find_table(Path(folder), ref.table) if folder else None


def read_rows(path: Path, columns: ColumnsConfig) -> Iterator[tuple[str, Row]]:
    """Yield file and line of every row, and the row under the standard column names."""
    where = ""
    for where, row, names in _named_rows(path, columns):
        yield where, _standard_row(row, names)
    if not where:
        expected = "a line of names and rows" if path.suffix == ".csv" else "one JSON object a line"
        raise InputError(f"{path}: no rows; expected {expected}")


def _named_rows(path: Path, columns: ColumnsConfig) -> Iterator[tuple[str, Row, dict[str, str]]]:
    """Yield file and line, the row unchanged, and the table's names of renamed columns."""
    is_csv = path.suffix == ".csv"
    names: dict[str, str] | None = None
    for line, row in _read_csv(path) if is_csv else read_jsonl_numbered(path):
        where = f"{path}, line {line}"
        names = columns_of(row, columns, where) if names is None else names
        _refuse_mixed_names(row, names, columns, where)
        # Empty CSV cells are dropped after the names are taken from the full row.
        yield where, {k: v for k, v in row.items() if v} if is_csv else row, names


def _standard_row(row: Row, names: dict[str, str]) -> Row:
    """Return a row under the standard column names."""
    others = {name: value for name, value in row.items() if name not in names}
    return others | {ours: row[theirs] for ours, theirs in names.items() if theirs in row}


def columns_of(row: Row, columns: ColumnsConfig, where: str) -> dict[str, str]:
    """Return the names of renamed columns in a table, by their standard names.

    `columns` applies to all tables of a dataset. A table that lacks the dataset's name of a column
    and has the standard name is read under the standard name.

    Args:
        row: the first row of the table.
        columns: names of the columns in the dataset.
        where: file and line, for the message.

    Raises:
        InputError: one column has its standard name, and another one is present under both names.
    """
    dataset_names = set(columns.renamed.values())
    ours_only = {
        ours
        for ours, theirs in columns.renamed.items()
        if theirs not in row and ours in row and ours not in dataset_names
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
    """Refuse the dataset's name of a column if the first row uses the standard name."""
    for ours, theirs in columns.renamed.items():
        if names[ours] == ours and theirs in row:
            raise InputError(
                f"{where}: this row has `{theirs}`, where the first row of the table has "
                f"`{ours}`; use one name in the whole table"
            )


def unused_columns(
    path: Path, columns: ColumnsConfig, used: Callable[[Row], set[str]]
) -> list[str]:
    """Return the columns of a table that hold text and are not read, except well-known ones.

    Args:
        path: of the table.
        columns: names of the columns in the dataset.
        used: returns the standard names of the columns that are read from a row.
    """
    counts: Counter[str] = Counter()
    total = 0
    for _, row, names in islice(_named_rows(path, columns), SAMPLE_ROWS):
        read = {names.get(ours, ours) for ours in used(_standard_row(row, names))}
        counts.update(
            name
            for name, value in row.items()
            if name not in read and not _IGNORED_COLUMNS.fullmatch(name) and _holds_text(value)
        )
        total += 1
    return [name for name, count in counts.items() if count >= MIN_TEXT_FRACTION * total]


def _holds_text(value: object) -> bool:
    """Return whether a value, or one of its parts, has a letter."""
    if isinstance(value, dict | list):
        return any(map(_holds_text, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and any(map(str.isalpha, value))


def _read_csv(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the first line and the cells of each row of a CSV table, which begins with names."""
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
                last = f" to {reader.line_num}" if reader.line_num > first else ""
                raise InputError(
                    f"{where}{last}: not a CSV row ({error}); put a cell with quotation marks, "
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
    repeated = next((name for name in names if name and names.count(name) > 1), None)
    if repeated:
        raise InputError(f"{where}: the column `{repeated}` is there twice; rename or remove one")
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


def table_of_row(row_id: str) -> str:
    """Return the table of a row by its id, which is TABLE/NUMBER; numbers count from 0."""
    return row_id.rpartition("/")[0]


def source_line(path: Path, row_id: str) -> str:
    """Return file and line of a row by its id."""
    number = int(row_id.removeprefix(f"{table_of_row(row_id)}/"))
    return next(islice(read_rows(path, STANDARD_COLUMNS), number, None))[0]


def is_text(value: object) -> bool:
    """Return whether a value is a string with more than white space."""
    return isinstance(value, str) and bool(value.strip())


def required_text(row: Mapping[str, Any], column: str, where: str) -> str:
    """Return the text in a column; raise `InputError` if it is missing or blank."""
    if column not in row:
        names = ", ".join(row) or "nothing"
        raise InputError(f"{where}: expected a non-empty string `{column}`; the row has {names}")
    text: str = row[column]
    if not is_text(text):
        raise InputError(
            f"{where}: expected a non-empty string `{column}`, found {describe_value(text)}"
        )
    return text


def describe_value(value: object) -> str:
    """Return a short description of a JSON value for messages."""
    if isinstance(value, str):
        return f"the text `{value[:40]}`" if value.strip() else "a blank one"
    if isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "an object"
        return kind if value else f"{kind} with nothing in it"
    words = json.dumps(value)
    return f"the number {words}" if words not in ("null", "true", "false") else words
