"""Programs that a model wrote, their outcomes, and pass@k.

A program is a prompt with the model's continuation; its tests are a separate piece of code.
Programs are generated on the machine that has the model and run wherever a sandbox works. This
module uses the standard library only, so that a job which runs programs starts fast.
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


@dataclass(frozen=True)
class Program:
    """A program and its tests, which run after it.

    Attributes:
        task, task_id: the benchmark, and the dataset's name of the item.
        item: the harness's document number.
        sample: number among the answers to the same item.
        program, tests: source code.
    """

    task: str
    task_id: str
    item: int
    sample: int
    program: str
    tests: str


@dataclass(frozen=True)
class PassRate:
    """How the programs of a task are scored.

    Attributes:
        draws: every k of pass@k; the first gives the main metric.
        filter: the harness's name of the step that makes programs from answers.
    """

    draws: tuple[int, ...] = (1,)
    filter: str = "create_test"


@dataclass(frozen=True)
class ProgramOutcomes:
    """Outcomes of a model's programs.

    Attributes:
        sandbox: name of the sandbox; None if no sandbox works.
        why: the reason for this sandbox, or for none.
        outcomes: one per program; empty without a sandbox.
    """

    sandbox: str | None
    why: str
    outcomes: Sequence[Outcome]


def has_bubblewrap() -> bool:
    """Return whether bubblewrap is in the path. `search_sandbox` finds out whether it works."""
    return shutil.which("bwrap") is not None


def programs_were_run(outcomes: Path) -> bool:
    """Return whether a file of outcomes exists and comes from programs that were run.

    Only the lines before the list of outcomes are read, because the list may be long.
    """
    if not outcomes.is_file():
        return False
    with outcomes.open(encoding="utf-8") as file:
        head = "".join(takewhile(lambda line: '"outcomes": [' not in line, file))
    try:
        return json.loads(head.rstrip().rstrip(",") + "}")["sandbox"] is not None
    except (ValueError, KeyError, TypeError):
        return False  # the file is damaged; `read_outcomes` reports it


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
    """Return what `write_outcomes` wrote for exactly these programs, in their order.

    Raises:
        InputError: the file is damaged or holds the outcomes of other programs.
    """
    effect = "the programs are run again"
    try:
        content = read_json(path)
        written = [(row["task"], row["item"], row["sample"]) for row in content["outcomes"]]
        outcomes = [Outcome(row["status"], row["detail"]) for row in content["outcomes"]]
        executed = ProgramOutcomes(content["sandbox"], content["why"], outcomes)
    except (ValueError, KeyError, TypeError):
        raise damage_error(
            path, "is not a whole file of outcomes", removal_command(path), effect
        ) from None
    expected = [tuple(_identity(program).values()) for program in programs]
    if executed.sandbox is not None and written != expected:
        reason = (
            f"has {len(written)} outcomes, which are not those of the {len(expected)} programs in "
            "programs.json"
        )
        raise damage_error(path, reason, removal_command(path), effect)
    return executed


def _identity(program: Program) -> dict[str, Any]:
    return {"task": program.task, "item": program.item, "sample": program.sample}


def describe(
    programs: Iterable[Program], rates: Mapping[str, PassRate] | None = None
) -> dict[str, Any]:
    """Return programs and scoring as plain values for JSON, with the tests once per item."""
    items = []
    for (task, task_id, item), group in groupby(
        programs, key=lambda p: (p.task, p.task_id, p.item)
    ):
        samples = list(group)
        first = {"task": task, "task_id": task_id, "item": item, "tests": samples[0].tests}
        items.append({**first, "programs": [program.program for program in samples]})
    return {"rates": {name: asdict(rate) for name, rate in (rates or {}).items()}, "items": items}


def read_programs(described: Mapping[str, Any]) -> list[Program]:
    """Return the programs from the values of `describe`."""
    return [
        Program(item["task"], item["task_id"], item["item"], number, program, item["tests"])
        for item in described["items"]
        for number, program in enumerate(item["programs"])
    ]


def read_rates(described: Mapping[str, Any]) -> dict[str, PassRate]:
    """Return the scoring of each task from the values of `describe`."""
    return {
        name: PassRate(tuple(rate["draws"]), rate["filter"])
        for name, rate in described["rates"].items()
    }


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the probability that at least one of k answers passes, if c of n answers passed.

    The unbiased estimator is 1 - C(n-c, k) / C(n, k): the probability that k answers drawn from the
    n without replacement are not all wrong (Chen et al. 2021, "Evaluating Large Language Models
    Trained on Code", section 2.1, equation 1). The quotient is the product of 1 - k/i over
    i = n-c+1 .. n. It is summed in logarithms, which avoids large binomials.

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return -math.expm1(math.fsum(math.log1p(-k / i) for i in range(n - c + 1, n + 1)))
