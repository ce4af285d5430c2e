"""A run group of LoRA runs: fused in one forward and backward pass, or one after the other.

A part of train.py's record. The runs differ in their learning rate, or in rank and seed as well,
and train two epochs, of which the second is timed, but for its last step and the evaluation there.
Both ways take turns, round by round, so that whatever else the machine does meets both; of a single
thread the seconds are those of the processor, which others who share it do not change.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from baselines import LEARNING_RATE, Bench, clock, recipe_of
from forgetting.config.methods import Hyperparameters
from forgetting.models.adapters import cast_frozen_weights
from forgetting.models.loading import Model
from forgetting.schedule import LrSchedule
from forgetting.training.batched_lora import AdapterState
from forgetting.training.checkpoints import TrainState
from forgetting.training.trainer import train_batched

STEPS = 8
"""Steps of an epoch: enough to measure, whatever the number of pairs to a step."""


def compare(
    benches: Sequence[Bench], runs: int, batch_sizes: Sequence[int], rounds: int
) -> pd.DataFrame:
    """One row per number of pairs to a step: seconds of the run group both ways, and their ratio.

    The runs are dealt out evenly over the methods of the benches; where there are several, every
    run has a seed of its own too.
    """
    rows = []
    methods = ", ".join(bench.tuning.name for bench in benches)
    for size in batch_sizes:
        run_group = [
            replace(
                bench,
                batch_size=size,
                examples=bench.examples[: STEPS * size],
                seed=number if len(benches) > 1 else 0,
            )
            for bench in benches
            for number in range(runs // len(benches))
        ]
        times = []
        for number in range(rounds):
            times.append((measured([[run] for run in run_group]), measured([run_group])))
            told = f"{runs} runs, {methods}, {size} pairs to a step, round {number + 1}"
            print(f"{told}: {times[-1][0]:,.0f} and {times[-1][1]:,.0f} tokens/s", flush=True)
        apart, fused = (statistics.median(column) for column in zip(*times, strict=True))
        ratios = [other / one for one, other in times]
        tokens = run_group[0].tokens * size / len(run_group[0].examples)
        rows.append(
            {
                "run group": f"{runs // len(benches)} x {methods}",
                "pairs to a step": size,
                "tokens to a step": f"{tokens:.0f}",
                "one after the other, tokens/s": f"{apart:,.0f}",
                "fused, tokens/s": f"{fused:,.0f}",
                "fused is faster by": f"{statistics.median(ratios):.2f}",
                "range": f"{min(ratios):.2f}-{max(ratios):.2f}",
            }
        )
    return pd.DataFrame(rows)


def measured(groups: Sequence[Sequence[Bench]]) -> float:
    """Tokens of all runs per second, when they are trained in these groups."""
    tokens, seconds = zip(*[_train(group) for group in groups], strict=True)
    return float(sum(tokens) / sum(seconds))


def _train(group: Sequence[Bench]) -> tuple[int, float]:
    """Tokens of a group in the steps that are timed, and their seconds."""
    starts = []
    for bench in group:
        model = bench.model()
        starts.append(AdapterState.of(model))
    cast_frozen_weights(model, bench.precision)
    rates = [LEARNING_RATE * 1.2**number for number in range(len(group))]
    recipes = [
        recipe_of(bench, Hyperparameters(learning_rate=rate))
        for bench, rate in zip(group, rates, strict=True)
    ]
    schedule = recipes[0].schedule
    noted: dict[int, tuple[int, float]] = {}

    def tell(number: int, progress: TrainState, _: LrSchedule) -> None:
        if number == len(recipes) - 1:
            noted[progress.step] = progress.tokens, clock()

    def evaluate(_: Model) -> tuple[pd.DataFrame, float]:
        return pd.DataFrame(), 0.0

    with tempfile.TemporaryDirectory() as folder:
        plans = [(recipe, Path(folder) / str(number)) for number, recipe in enumerate(recipes)]
        train_batched(model, group[0].examples, plans, 0.0, evaluate, tell, starts)
    begin, end = noted[schedule.steps_per_epoch], noted[schedule.steps - 1]
    return len(recipes) * (end[0] - begin[0]), end[1] - begin[1]
