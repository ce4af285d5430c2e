"""Tables of what the programs of a model came to: pass@1 by item and by task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pandas as pd

from forgetting.benchmarks.programs import Program, pass_at_k

METRIC = "pass@1,create_test"  # the harness's name for it


class Ended(Protocol):
    """What is asked of an outcome."""

    @property
    def passed(self) -> bool:
        """Whether the program and its tests came to their end."""
        ...


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
