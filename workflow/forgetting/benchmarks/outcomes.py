"""How the programs of a model ended: the file that `execute_programs` writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from forgetting.benchmarks.programs import Program
from forgetting.records import damaged, read_json, removal, write_json
from forgetting.sandbox import Outcome


def has_bubblewrap() -> bool:
    """Is bubblewrap in the path? Whether it works, `search_sandbox` finds out in a second."""
    return shutil.which("bwrap") is not None


def was_run(outcomes: Path) -> bool:
    """Do the outcomes that `execute_programs` wrote, if it did, come from programs that were run?

    Only the lines before the list are read, since of many samples it is long.
    """
    if not outcomes.is_file():
        return False
    with outcomes.open(encoding="utf-8") as file:
        head = "".join(takewhile(lambda line: '"outcomes": [' not in line, file))
    try:
        return json.loads(head.rstrip().rstrip(",") + "}")["sandbox"] is not None
    except (ValueError, KeyError, TypeError):
        return False  # damaged: whoever reads the outcomes tells of it


@dataclass(frozen=True)
class Executed:
    """What became of a model's programs; `outcomes` is empty where there was no `sandbox`."""

    sandbox: str | None
    why: str
    outcomes: Sequence[Outcome]


def write_outcomes(path: Path, programs: Sequence[Program], executed: Executed) -> None:
    """Write each outcome with the task, item and sample of its program."""
    rows = [
        {**_identity(program), **outcome.to_dict()}
        for program, outcome in zip(
            programs, executed.outcomes, strict=executed.sandbox is not None
        )
    ]
    write_json(path, {"sandbox": executed.sandbox, "why": executed.why, "outcomes": rows})


def read_outcomes(path: Path, programs: Sequence[Program]) -> Executed:
    """Return what `write_outcomes` wrote of exactly these programs, in their order.

    Raises `InputError` if the file is damaged or holds the outcomes of other programs.
    """
    then = "the programs are run again"
    try:
        told = read_json(path)
        known = [(row["task"], row["item"], row["sample"]) for row in told["outcomes"]]
        outcomes = [Outcome(row["status"], row["detail"]) for row in told["outcomes"]]
        executed = Executed(told["sandbox"], told["why"], outcomes)
    except (ValueError, KeyError, TypeError):
        raise damaged(path, "is not a whole file of outcomes", removal(path), then) from None
    expected = [tuple(_identity(program).values()) for program in programs]
    if executed.sandbox is not None and known != expected:
        wrong = (
            f"has {len(known)} outcomes, which are not those of the {len(expected)} programs in "
            "programs.json"
        )
        raise damaged(path, wrong, removal(path), then)
    return executed


def _identity(program: Program) -> dict[str, Any]:
    return {"task": program.task, "item": program.item, "sample": program.sample}
