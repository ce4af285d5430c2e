"""A cohort of LoRA runs: fused in one forward and backward pass, or one after the other.

A part of train.py's record. The runs differ in their learning rate and train two epochs, of which
the second is timed, but for its last step and the evaluation there. Both ways take turns, round by
round, so that whatever else the machine does meets both; of a single thread the seconds are those
of the processor, which others who share it do not change.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from contenders import LEARNING_RATE, Bench, clock, recipe_of
from forgetting.models.adapters import round_frozen
from forgetting.sections.method import Setting
from forgetting.training.checkpoints import Progress
from forgetting.training.recipe import Recipe
from forgetting.training.schedule import Schedule
from forgetting.training.train import train_together

STEPS = 8
"""Steps of an epoch: enough to measure, whatever the number of pairs to a step."""


def compare(bench: Bench, runs: int, batch_sizes: Sequence[int], rounds: int) -> pd.DataFrame:
    """One row per number of pairs to a step: seconds of the cohort both ways, and their ratio."""
    rows = []
    for size in batch_sizes:
        part = replace(bench, batch_size=size, examples=bench.examples[: STEPS * size])
        times = []
        for number in range(rounds):
            times.append((measured(part, runs, together=1), measured(part, runs, together=runs)))
            told = f"{runs} runs, {size} pairs to a step, round {number + 1}"
            print(f"{told}: {times[-1][0]:,.0f} and {times[-1][1]:,.0f} tokens/s", flush=True)
        apart, fused = (statistics.median(column) for column in zip(*times, strict=True))
        ratios = [other / one for one, other in times]
        rows.append(
            {
                "cohort": f"{runs} x {bench.tuning.name}",
                "pairs to a step": size,
                "tokens to a step": f"{part.tokens * size / len(part.examples):.0f}",
                "one after the other, tokens/s": f"{apart:,.0f}",
                "fused, tokens/s": f"{fused:,.0f}",
                "fused is faster by": f"{statistics.median(ratios):.2f}",
                "range": f"{min(ratios):.2f}-{max(ratios):.2f}",
            }
        )
    return pd.DataFrame(rows)


def measured(bench: Bench, runs: int, together: int) -> float:
    """Tokens of all runs per second, when they are trained in groups of so many."""
    rates = [LEARNING_RATE * 1.2**number for number in range(runs)]
    recipes = [recipe_of(bench, Setting(learning_rate=rate)) for rate in rates]
    groups = [recipes[start : start + together] for start in range(0, runs, together)]
    tokens, seconds = zip(*[_train(bench, group) for group in groups], strict=True)
    return float(sum(tokens) / sum(seconds))


def _train(bench: Bench, recipes: Sequence[Recipe]) -> tuple[int, float]:
    """Tokens of a group in the steps that are timed, and their seconds."""
    model = bench.model()
    round_frozen(model, bench.precision)
    schedule = recipes[0].schedule
    noted: dict[int, tuple[int, float]] = {}

    def tell(number: int, progress: Progress, _: Schedule) -> None:
        if number == len(recipes) - 1:
            noted[progress.step] = progress.tokens, clock()

    with tempfile.TemporaryDirectory() as folder:
        plans = [(recipe, Path(folder) / str(number)) for number, recipe in enumerate(recipes)]
        train_together(model, bench.examples, plans, 0.0, lambda _: (pd.DataFrame(), 0.0), tell)
    begin, end = noted[schedule.steps_per_epoch], noted[schedule.steps - 1]
    return len(recipes) * (end[0] - begin[0]), end[1] - begin[1]
