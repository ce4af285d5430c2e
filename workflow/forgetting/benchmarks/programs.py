"""Programs that a model wrote, and the share of tasks that they solve (pass@k).

A program is a prompt with the model's continuation; its tests are a separate piece of code.
They are generated on the machine that has the model and run wherever a sandbox is; standard library
only, so that a job which runs programs is not held up by libraries that it does not use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any


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
