"""End a program at a chosen call of a function, within the process of the test."""

from __future__ import annotations

from typing import Any

import pytest

BEFORE_AND_AFTER = pytest.mark.parametrize(
    "after", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["before", "after"]
)
"""Parameters of tests that call `kill_at`.

The files after one call are those before the next one, so `make test` kills before calls only.
"""


class Killed(BaseException):
    """Represents the end of the process; nothing in the library may catch it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, after: bool) -> None:
    """Raise `Killed` at a call of a function, before or after its work."""
    original, count = getattr(owner, name), 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call and not after:
            raise Killed
        result = original(*args, **kwargs)
        if count == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, deadly)
