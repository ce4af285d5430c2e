"""Parse a line of a JSON Lines file; every mistake becomes an error with file and line number."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from forgetting.errors import InputError

_ARRAY = (
    "a JSON array; expected JSON lines, one object a line: `jq -c '.[]' ARRAY.json > TABLE.jsonl` "
    "makes them"
)


def parse_line(encoded: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object of a line; its text can be encoded as UTF-8 again.

    Args:
        encoded: the bytes of the line.
        where: file and line number, for errors.

    Raises:
        InputError: the line is not a JSON object, repeats a key or holds a surrogate.
    """
    try:
        line = encoded.decode("utf-8-sig")  # Windows writes a byte-order mark.
        row = json.loads(line, object_pairs_hook=functools.partial(_unique_keys, where))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        if encoded.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
            raise InputError(f"{where}: {_ARRAY}") from None
        raise InputError(
            f"{where}: not a JSON object ({error.msg} at column {error.colno}); "
            "expected one object a line"
        ) from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply; expected a flat JSON object") from None
    except ValueError:
        raise InputError(f"{where}: a whole number there has more digits than are read") from None
    if isinstance(row, list):
        raise InputError(f"{where}: {_ARRAY}")
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    # In UTF-8 text, a surrogate can only come from an escape.
    if r"\ud" in line.lower() and (broken := [key for key in row if not _is_encodable(key, row)]):
        raise InputError(f"{where}: `{broken[0]}` holds half a character (a surrogate)")
    return row


def _unique_keys(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise an `InputError` if a key occurs twice.

    The json module would keep the last value.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f"{where}: `{twice}` is there twice; take one of them out")
    return row


def _is_encodable(key: str, row: Mapping[str, Any]) -> bool:
    """Return whether a value can be encoded as UTF-8."""
    try:
        json.dumps({key: row[key]}, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
