"""Files appear whole or not at all, and a user's mistake is told in one sentence."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


class InputError(Exception):
    """Something that the user gave cannot be used.

    The message names the file and the line or key, says what was expected and how to mend it.
    """


def tells_input_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Make a program's `main` end with one clear line and status 1 on an `InputError`."""

    @functools.wraps(main)
    def wrapper(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None

    return wrapper


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place once the block has ended well.

    The content is flushed to the disk before the rename, so that a crash leaves either the old
    file or the new one. A full disk leaves the old one and no debris.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _flush(path.parent)
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise InputError(f"{path}: not written: {error.strerror}; make room there") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def settle(partial: Path, final: Path) -> None:
    """Give a finished folder its name, after its files have reached the disk."""
    for path in [*partial.rglob("*"), partial]:
        _flush(path)
    partial.rename(final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text())


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, "".join(lines))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a malformed line is an `InputError` with its number."""
    return [row for _, row in read_numbered(path)]


def read_numbered(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The same with the number of each line; blank lines are counted and left out."""
    rows: list[tuple[int, dict[str, Any]]] = []
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows writes a byte-order mark.
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number}: not a JSON object ({error.msg} at column {error.colno}); "
                "expected one object a line"
            ) from None
        if not isinstance(row, dict):
            raise InputError(
                f"{path}, line {number}: expected a JSON object, found {type(row).__name__}"
            )
        rows.append((number, row))
    return rows


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as parquet, whole or not at all."""
    with replacing(path) as temporary:
        table.to_parquet(temporary, index=False)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_key(value: Any, length: int = 16) -> str:
    """Short digest of a JSON-able value: equal values have equal keys, whatever their key order."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]
