"""Compare batched LoRA with training the runs of a group one after the other.

train.py calls `compare`. The runs differ in learning rate. They train two epochs; the second is
timed, without its last step and evaluation. Both ways alternate round by round, so that other load
on the machine affects both.
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
from forgetting.training.checkpoints import TrainState
from forgetting.training.trainer import train_batched

STEPS = 8
"""Steps of an epoch."""


def compare(bench: Bench, runs: int, batch_sizes: Sequence[int], rounds: int) -> pd.DataFrame:
    """Return one row per number of pairs in a step: both speeds and their ratio."""
    rows = []
    for size in batch_sizes:
        sized = replace(bench, batch_size=size, examples=bench.examples[: STEPS * size])
        times = []
        for number in range(rounds):
            times.append((_speed(sized, runs, batched=1), _speed(sized, 1, batched=runs)))
            label = f"{runs} runs, {bench.method.name}, {size} pairs to a step, round {number + 1}"
            print(f"{label}: {times[-1][0]:,.0f} and {times[-1][1]:,.0f} tokens/s", flush=True)
        sequential, batched = (statistics.median(column) for column in zip(*times, strict=True))
        ratios = [batched_speed / speed for speed, batched_speed in times]
        tokens = sized.tokens * size / len(sized.examples)
        rows.append(
            {
                "run group": f"{runs} x {bench.method.name}",
                "pairs to a step": size,
                "tokens to a step": f"{tokens:.0f}",
                "one after the other, tokens/s": f"{sequential:,.0f}",
                "batched, tokens/s": f"{batched:,.0f}",
                "batched is faster by": f"{statistics.median(ratios):.2f}",
                "range": f"{min(ratios):.2f}-{max(ratios):.2f}",
            }
        )
    return pd.DataFrame(rows)


def _speed(bench: Bench, groups: int, batched: int) -> float:
    """Return the tokens of all runs per second, in groups of batched runs one after the other."""
    tokens, seconds = zip(*[_train(bench, batched) for _ in range(groups)], strict=True)
    return float(sum(tokens) / sum(seconds))


def _train(bench: Bench, runs: int) -> tuple[int, float]:
    """Return the tokens of batched runs in the timed steps, and their seconds."""
    model = bench.model()
    cast_frozen_weights(model, bench.precision)
    configs = [
        run_config(bench, Hyperparameters(learning_rate=LEARNING_RATE * 1.2**number))
        for number in range(runs)
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
        train_batched(model, bench.examples, plans, evaluate, log)
    start, end = recorded[schedule.steps_per_epoch], recorded[schedule.steps - 1]
    return len(configs) * (end[0] - start[0]), end[1] - start[1]
