"""Ends a program in the middle of what it does, without a process of its own."""

from __future__ import annotations

from typing import Any

import pytest

BEFORE_AND_AFTER = pytest.mark.parametrize(
    "after", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["before", "after"]
)
"""Where a test calls `kill_at`. What is there after a call is what is there before the next one,
so that `make test` kills before calls alone."""


class Killed(BaseException):
    """What stands for the end of the process: nothing in the library may catch it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, after: bool) -> None:
    """End the process at a call of a function: before it does its work, or just after."""
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
