"""Decide which runs of a run group share a forward pass, for training and for the forecast.

Runs can share a pass if the loss of each run depends on its own rows only and its update is s B A
on frozen matrices. Sharing is faster only where a step is so small that launching its operations
takes longer than their arithmetic.
"""

from __future__ import annotations

import math

from forgetting.config.expand import Method
from forgetting.config.training import TrainingConfig
from forgetting.config.variants import VARIANTS

MAX_BATCHED_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Most tokens of an optimizer step of runs that share a pass, by kind of device.

On a CPU eight runs were 1.1 times as fast at 844 tokens (bench/results/training.md); larger steps
were not measured. The value for a GPU is the fixed cost of a pass in tokens (`passes`), not a
measurement.
"""

MIN_RUNS = 4
"""Fewest runs that share a pass: two runs were not faster than one after the other."""

TOKENS_PER_PASS = 4096
"""On a CPU, most tokens of a pass that runs share, unless one example of each run has more.

It bounds the activations, because a CPU process gets no error when memory is short.
"""

CPU_BYTES = 2 * 2**30
"""On a CPU, most bytes of the weights, gradients and moments of the runs that share a pass."""

BYTES_PER_WEIGHT = 16
"""Weight, gradient and two moments, all in float32."""


def is_plain_lora(method: Method) -> bool:
    """Return whether the update is s B A on frozen matrices and the loss is that of the batch.

    Replay only adds rows. KL, EWC and L2-SP are penalties of a single run.
    """
    sections = method.mitigation.sections.values() if method.mitigation else ()
    return (
        method.kind == "lora"
        and VARIANTS[method.variant].batchable
        and not method.trains_embeddings
        and not any(section.is_penalty for section in sections)
    )


def may_batch(method: Method, training: TrainingConfig) -> bool:
    """Return whether the settings allow runs of a method to share a pass.

    Trunks do not share one, so that a branch is bit-identical to its run without a trunk.
    """
    return training.batched_lora != "never" and not training.durations and is_plain_lora(method)


def rows_per_pass(rows: int, runs: int, tokens: float, kind: str) -> int:
    """Return how many of `rows` examples each run contributes to a pass.

    On a GPU this is all of them, as long as memory suffices.

    Args:
        rows: examples of a run.
        runs: runs that share the pass.
        tokens: tokens of an example.
        kind: kind of the device, cpu or cuda.
    """
    if runs == 1 or kind != "cpu":
        return rows
    return max(1, min(rows, int(TOKENS_PER_PASS / (runs * tokens))))


def memory_limit(parameters: int, memory: float | None) -> int:
    """Return the bytes for the weights, gradients and moments of the runs in a pass.

    On a GPU this is half of the memory that the base model leaves.

    Args:
        parameters: number of parameters of the base, in float32.
        memory: bytes of the GPU, or None on a CPU.
    """
    return CPU_BYTES if memory is None else max(0, int(memory - 4 * parameters) // 2)


def partition_runs(runs: int, weights: int, max_runs: int, max_bytes: int) -> list[int]:
    """Return the number of runs that share each pass.

    There are as few passes as possible, of sizes as equal as possible. A pass has at least
    `MIN_RUNS` runs within both bounds, or a single run.

    Args:
        runs: number of runs.
        weights: number of weights that a run trains.
        max_runs: most runs of a pass.
        max_bytes: most bytes of the weights, gradients and moments of a pass.
    """
    capacity = min(max_runs, max_bytes // (BYTES_PER_WEIGHT * weights))
    if capacity < MIN_RUNS:
        return [1] * runs
    passes, batched = math.ceil(runs / capacity), runs
    if runs < passes * MIN_RUNS:
        # The last pass would be too small: fill the others, and train the rest one by one.
        passes = runs // capacity
        batched = passes * capacity
    size, larger = divmod(batched, passes) if passes else (0, 0)
    return [size + 1] * larger + [size] * (passes - larger) + [1] * (runs - batched)
