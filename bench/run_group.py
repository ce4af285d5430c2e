"""Compare batched LoRA with training the runs of a group one after the other.

train.py calls `compare`. The runs differ in learning rate, or also in rank and seed. They train two
epochs; the second is timed, without its last step and evaluation. Both ways alternate round by
round, so that other load on the machine affects both.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from baselines import LEARNING_RATE, Bench, clock, run_config
from forgetting.config.methods import Hyperparameters
from forgetting.models.adapters import cast_frozen_weights
from forgetting.models.loading import Model
from forgetting.schedule import LrSchedule
from forgetting.training.batched_lora import AdapterState
from forgetting.training.checkpoints import TrainState
from forgetting.training.trainer import train_batched

STEPS = 8
"""Steps of an epoch."""


def compare(
    benches: Sequence[Bench], runs: int, batch_sizes: Sequence[int], rounds: int
) -> pd.DataFrame:
    """Return one row per number of pairs in a step: both speeds and their ratio.

    The runs are distributed evenly over the methods of the benches. With several methods, every run
    has its own seed.
    """
    rows = []
    methods = ", ".join(bench.method.name for bench in benches)
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
            times.append((_speed([[run] for run in run_group]), _speed([run_group])))
            label = f"{runs} runs, {methods}, {size} pairs to a step, round {number + 1}"
            print(f"{label}: {times[-1][0]:,.0f} and {times[-1][1]:,.0f} tokens/s", flush=True)
        sequential, batched = (statistics.median(column) for column in zip(*times, strict=True))
        ratios = [batched_speed / speed for speed, batched_speed in times]
        tokens = run_group[0].tokens * size / len(run_group[0].examples)
        rows.append(
            {
                "run group": f"{runs // len(benches)} x {methods}",
                "pairs to a step": size,
                "tokens to a step": f"{tokens:.0f}",
                "one after the other, tokens/s": f"{sequential:,.0f}",
                "batched, tokens/s": f"{batched:,.0f}",
                "batched is faster by": f"{statistics.median(ratios):.2f}",
                "range": f"{min(ratios):.2f}-{max(ratios):.2f}",
            }
        )
    return pd.DataFrame(rows)


def _speed(groups: Sequence[Sequence[Bench]]) -> float:
    """Return the tokens of all runs per second, trained in these groups."""
    tokens, seconds = zip(*[_train(group) for group in groups], strict=True)
    return float(sum(tokens) / sum(seconds))


def _train(group: Sequence[Bench]) -> tuple[int, float]:
    """Return the tokens of a group in the timed steps, and their seconds."""
    adapters = []
    for bench in group:
        model = bench.model()
        adapters.append(AdapterState.of(model))
    cast_frozen_weights(model, bench.precision)
    rates = [LEARNING_RATE * 1.2**number for number in range(len(group))]
    configs = [
        run_config(bench, Hyperparameters(learning_rate=rate))
        for bench, rate in zip(group, rates, strict=True)
    ]
    schedule = configs[0].schedule
    recorded: dict[int, tuple[int, float]] = {}

    def log(number: int, state: TrainState, _: LrSchedule) -> None:
        if number == len(configs) - 1:
            recorded[state.step] = state.tokens, clock()

    def evaluate(_: Model) -> tuple[pd.DataFrame, float]:
        return pd.DataFrame(), 0.0

    with tempfile.TemporaryDirectory() as folder:
        plans = [(config, Path(folder) / str(number)) for number, config in enumerate(configs)]
        train_batched(model, group[0].examples, plans, 0.0, evaluate, log, adapters)
    start, end = recorded[schedule.steps_per_epoch], recorded[schedule.steps - 1]
    return len(configs) * (end[0] - start[0]), end[1] - start[1]
