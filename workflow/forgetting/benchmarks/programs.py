"""How the programs of a model ended: the file that `run_programs` writes.

Programs that a model wrote, and the share of tasks that they solve (pass@k).

A program is a prompt with the model's continuation; its tests are a separate piece of code.
They are generated on the machine that has the model and run wherever a sandbox is; standard library
only, so that a job which runs programs is not held up by libraries that it does not use.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

from forgetting.benchmarks.sandbox import Outcome
from forgetting.io import damage_error, read_json, removal_command, write_json


def has_bubblewrap() -> bool:
    """Is bubblewrap in the path? Whether it works, `search_sandbox` finds out in a second."""
    return shutil.which("bwrap") is not None


def programs_were_run(outcomes: Path) -> bool:
    """Do the outcomes that `run_programs` wrote, if it did, come from programs that were run?

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
class ProgramOutcomes:
    """What became of a model's programs; `outcomes` is empty where there was no `sandbox`."""

    sandbox: str | None
    why: str
    outcomes: Sequence[Outcome]


def write_outcomes(path: Path, programs: Sequence[Program], executed: ProgramOutcomes) -> None:
    """Write each outcome with the task, item and sample of its program."""
    rows = [
        {**_identity(program), **outcome.to_dict()}
        for program, outcome in zip(
            programs, executed.outcomes, strict=executed.sandbox is not None
        )
    ]
    write_json(path, {"sandbox": executed.sandbox, "why": executed.why, "outcomes": rows})


def read_outcomes(path: Path, programs: Sequence[Program]) -> ProgramOutcomes:
    """Return what `write_outcomes` wrote of exactly these programs, in their order.

    Raises `InputError` if the file is damaged or holds the outcomes of other programs.
    """
    then = "the programs are run again"
    try:
        told = read_json(path)
        known = [(row["task"], row["item"], row["sample"]) for row in told["outcomes"]]
        outcomes = [Outcome(row["status"], row["detail"]) for row in told["outcomes"]]
        executed = ProgramOutcomes(told["sandbox"], told["why"], outcomes)
    except (ValueError, KeyError, TypeError):
        raise damage_error(
            path, "is not a whole file of outcomes", removal_command(path), then
        ) from None
    expected = [tuple(_identity(program).values()) for program in programs]
    if executed.sandbox is not None and known != expected:
        wrong = (
            f"has {len(known)} outcomes, which are not those of the {len(expected)} programs in "
            "programs.json"
        )
        raise damage_error(path, wrong, removal_command(path), then)
    return executed


def _identity(program: Program) -> dict[str, Any]:
    return {"task": program.task, "item": program.item, "sample": program.sample}


@dataclass(frozen=True)
class Program:
    """One program to run: `program` and then `tests`. `item` is the harness's document number,
    `sample` counts the answers to the same item."""

    task: str
    task_id: str
    item: int
    sample: int
    program: str
    tests: str


@dataclass(frozen=True)
class PassRate:
    """How the programs of a task are scored: pass@k for every k of `draws`, of which the first
    stands for the task. `filter` is what the harness calls the making of programs from answers."""

    draws: tuple[int, ...] = (1,)
    filter: str = "create_test"


def describe(
    programs: Iterable[Program], rates: Mapping[str, PassRate] | None = None
) -> dict[str, Any]:
    """Plain values for JSON. The tests of an item are written once, not with every program."""
    items = []
    for (task, task_id, item), group in groupby(
        programs, key=lambda p: (p.task, p.task_id, p.item)
    ):
        several = list(group)
        first = {"task": task, "task_id": task_id, "item": item, "tests": several[0].tests}
        items.append({**first, "programs": [program.program for program in several]})
    return {"rates": {name: asdict(rate) for name, rate in (rates or {}).items()}, "items": items}


def read_programs(described: Mapping[str, Any]) -> list[Program]:
    """The programs of what `describe` made."""
    return [
        Program(item["task"], item["task_id"], item["item"], number, program, item["tests"])
        for item in described["items"]
        for number, program in enumerate(item["programs"])
    ]


def read_rates(described: Mapping[str, Any]) -> dict[str, PassRate]:
    """How they are scored, by task."""
    return {
        name: PassRate(tuple(rate["draws"]), rate["filter"])
        for name, rate in described["rates"].items()
    }


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k answers passes, from n answers of which c passed.

    The unbiased estimator 1 - C(n-c, k) / C(n, k), which is the chance that k answers drawn
    from the n without replacement are not all wrong (Chen et al. 2021, "Evaluating Large
    Language Models Trained on Code", section 2.1, equation 1). The quotient is taken as the
    product of 1 - k/i over i = n-c+1 .. n, summed in logarithms: no large binomial appears.

    Raises `ValueError` unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return -math.expm1(math.fsum(math.log1p(-k / i) for i in range(n - c + 1, n + 1)))
