"""Tables of what the programs of a model came to: pass@k and diversity, by item and by task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import pandas as pd

from forgetting.benchmarks.programs import PassRate, Program, pass_at_k

PASSING, FAILING = "distinct_passing", "distinct_failing"
"""Of several answers to an item, how many differ, among those that pass and those that fail
(Biderman et al. 2024, arXiv 2405.09673: fine-tuning makes answers alike)."""


class Ended(Protocol):
    """What is asked of an outcome."""

    @property
    def passed(self) -> bool:
        """Whether the program and its tests came to their end."""
        ...


def program_items(
    programs: Sequence[Program],
    outcomes: Sequence[Ended],
    rates: Mapping[str, PassRate] | None = None,
) -> pd.DataFrame:
    """task, item, metric, value: every pass@k of each item; of several answers the diversity too.

    Raises `ValueError` if programs and outcomes do not come in pairs.
    """
    if len(programs) != len(outcomes):
        raise ValueError(f"{len(programs)} programs, but {len(outcomes)} outcomes")
    answers: dict[tuple[str, int], list[tuple[str, bool]]] = {}
    for program, outcome in zip(programs, outcomes, strict=True):
        mine = answers.setdefault((program.task, program.item), [])
        mine.append((program.program, outcome.passed))
    rows = [
        {"task": task, "item": item, "metric": metric, "value": value}
        for (task, item), several in answers.items()
        for metric, value in _metrics(several, (rates or {}).get(task, PassRate())).items()
    ]
    return pd.DataFrame(rows, columns=["task", "item", "metric", "value"])


def _metrics(answers: Sequence[tuple[str, bool]], rate: PassRate) -> dict[str, float]:
    n, right = len(answers), sum(passed for _, passed in answers)
    found = {f"pass@{k},{rate.filter}": pass_at_k(n, right, k) for k in rate.draws if k <= n}
    if n > 1:
        for name, wanted in ((PASSING, True), (FAILING, False)):
            texts = {text for text, passed in answers if passed is wanted}
            found[f"{name},{rate.filter}"] = float(len(texts))
    return found


def score_programs(
    programs: Sequence[Program],
    outcomes: Sequence[Ended],
    rates: Mapping[str, PassRate] | None = None,
) -> pd.DataFrame:
    """Rows for the table of scores: the mean of each metric of each task over its items.

    The standard error is that of a mean, s / sqrt(n) with s the sample standard deviation
    over items, as the harness has it; it is missing where there is a single item.
    """
    rows = []
    main: set[str] = set()
    items = program_items(programs, outcomes, rates)
    for (task, metric), group in items.groupby(["task", "metric"], sort=False):
        values = group["value"].to_numpy(dtype=float)
        n = len(values)
        error = float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
        rows.append(
            {
                "task": task,
                "metric": metric,
                "main": task not in main,
                "value": float(values.mean()),
                "stderr": error,
                "n": n,
                "chance": 0.0 if str(metric).startswith("pass@") else math.nan,
            }
        )
        main.add(str(task))
    columns = ["task", "metric", "main", "value", "stderr", "n", "chance"]
    return pd.DataFrame(rows, columns=columns)
