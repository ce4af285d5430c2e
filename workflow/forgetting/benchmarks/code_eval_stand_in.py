"""Load the harness's tasks with programs although nothing here runs them through `evaluate`."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator


@contextlib.contextmanager
def without_code_eval(needed: bool) -> Iterator[None]:
    """Have `evaluate` replaced during the block, if that is `needed`.

    The helper modules of tasks with programs fetch the hub's `code_eval` metric when they are
    imported, and try it at once. That needs a connection, takes seconds, and would run programs
    outside any sandbox. A stand-in takes its place for the import; a program that reached it
    would be an error of ours, so it refuses to judge. Afterwards the stand-in and the modules
    that saw it are forgotten, so that nothing else in this process meets them.
    """
    if not needed:
        yield
        return
    before, known = sys.modules.get("evaluate"), set(sys.modules)
    stand_in = types.ModuleType("evaluate")
    stand_in.load = lambda *_, **__: _NoCodeEval()  # type: ignore[attr-defined]
    sys.modules["evaluate"] = stand_in
    try:
        yield
    finally:
        for module in set(sys.modules) - known:
            if module.startswith("lm_eval.tasks."):
                del sys.modules[module]
        if before is None:
            sys.modules.pop("evaluate", None)
        else:
            sys.modules["evaluate"] = before


class _NoCodeEval:
    """Answers the self-test at import with nothing, and anything after it with an error."""

    def __init__(self) -> None:
        self._asked = 0

    def compute(self, **_: object) -> tuple[dict[str, float], dict[str, object]]:
        self._asked += 1
        if self._asked > 1:
            raise RuntimeError("programs are run in a sandbox, never inside the harness")
        return {"pass@1": 0.0}, {}
