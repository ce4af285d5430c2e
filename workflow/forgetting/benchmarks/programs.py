"""Programs that a model wrote, and the share of tasks that they solve (pass@k).

A program is a prompt with the model's continuation; its tests are a separate piece of code.
They are generated on the machine that has the model, run wherever a sandbox is, and scored
here: this module needs neither the model nor the sandbox.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd

METRIC = "pass@1,create_test"  # the harness's name for it


class Ended(Protocol):
    """What is asked of an outcome."""

    @property
    def passed(self) -> bool:
        """Whether the program and its tests came to their end."""
        ...


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

    @property
    def source(self) -> str:
        """What has to run to its end for the program to count as correct."""
        return f"{self.program}\n{self.tests}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Program:
        """The inverse of `to_dict`."""
        return cls(**values)


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


def program_items(programs: Sequence[Program], outcomes: Sequence[Ended]) -> pd.DataFrame:
    """pass@1 of each item: task, item, metric, value.

    Raises `ValueError` if programs and outcomes do not come in pairs.
    """
    if len(programs) != len(outcomes):
        raise ValueError(f"{len(programs)} programs, but {len(outcomes)} outcomes")
    frame = pd.DataFrame(
        {
            "task": [program.task for program in programs],
            "item": [program.item for program in programs],
            "passed": [outcome.passed for outcome in outcomes],
        }
    )
    rows = [
        {"task": task, "item": item, "metric": METRIC, "value": pass_at_k(n, c, 1)}
        for (task, item), (n, c) in _counts(frame).items()
    ]
    return pd.DataFrame(rows, columns=["task", "item", "metric", "value"])


def _counts(frame: pd.DataFrame) -> dict[tuple[str, int], tuple[int, int]]:
    """(answers, correct answers) of each item, in order of appearance."""
    counts: dict[tuple[str, int], tuple[int, int]] = {}
    for task, item, passed in zip(frame["task"], frame["item"], frame["passed"], strict=True):
        n, c = counts.get((task, item), (0, 0))
        counts[task, item] = (n + 1, c + int(passed))
    return counts


def score_programs(programs: Sequence[Program], outcomes: Sequence[Ended]) -> pd.DataFrame:
    """Rows for the table of scores: the mean pass@1 of each task over its items.

    The standard error is that of a mean, s / sqrt(n) with s the sample standard deviation
    over items, as the harness has it; it is missing where there is a single item.
    """
    rows = []
    for task, group in program_items(programs, outcomes).groupby("task", sort=False):
        values = group["value"].to_numpy(dtype=float)
        n = len(values)
        error = float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
        rows.append(
            {
                "task": task,
                "metric": METRIC,
                "main": True,
                "value": float(values.mean()),
                "stderr": error,
                "n": n,
                "chance": 0.0,
            }
        )
    columns = ["task", "metric", "main", "value", "stderr", "n", "chance"]
    return pd.DataFrame(rows, columns=columns)
