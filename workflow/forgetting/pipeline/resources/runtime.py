"""Seconds that the stages of a job take, from counted FLOPs, bytes and operations.

A pass takes the longer of its arithmetic and of starting its operations: `flops / (peak x share)`
and `blocks x seconds to start a block`. A decoded token reads all weights, the keys and values of
its batch, and is hardly ever more than that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from forgetting.config.expand import Method
from forgetting.models.size import ModelSize
from forgetting.pipeline.resources.hardware import NETWORK, STORAGE
from forgetting.pipeline.resources.memory import checkpoint_bytes
from forgetting.pipeline.resources.workload import (
    ProcessCount,
    TaskWorkload,
    Workload,
    training_benchmark_workloads,
)

STARTUP_SECONDS = {True: 30.0, False: 10.0}
"""Seconds to import torch and transformers and to read the files, by whether there is a GPU: from a
shared file system with CUDA, or from a local disk without it."""

PADDED = 1.2
"""Tokens of a pass per token that is not padding, for pairs of question and answer on a GPU.
Batches on a CPU have no padding."""

LONGEST = 2.5
"""Ratio of the longest answer of a batch to the mean one, in tokens."""

TOKENIZED = 2e5
"""Tokens that one core makes of texts in a second."""


def load_seconds(case: Workload) -> float:
    """Reading the base, in bfloat16 as it was published, from the shared file system."""
    return 2.0 * case.model_size.parameters / STORAGE


def tokenize_seconds(case: Workload, team: ProcessCount) -> float:
    """Making tokens of the new knowledge, and writing them, once for all runs of a job."""
    tokens = case.training_sequences.count * case.training_sequences.tokens
    return tokens / (TOKENIZED * case.cores * team.per_node) + 4.0 * tokens / STORAGE


def step_seconds(case: Workload, runs: Sequence[Method], team: ProcessCount) -> float:
    """One optimizer step of runs that share it.

    Args:
        runs: the method of each.
    """
    study, shape, device, tuning = case.study, case.model_size, case.device, runs[0]
    training, data = study.training, case.training_sequences
    mitigation = tuning.mitigation
    replayed = mitigation.replay.ratio if mitigation and mitigation.replay else 0.0
    rows = training.batch_size / (1.0 - replayed)
    whole = training.packing or data.targets == 1.0 or not device.is_gpu
    padded = 1.0 if whole else PADDED
    again = training.activation_checkpointing
    flops = sum(shape.training(run, data.tokens, data.targets, again) for run in runs)
    if mitigation and any(s.needs_base_model for s in mitigation.sections.values()):
        # the base's predictions of the same tokens
        flops += shape.forward(data.tokens, data.targets)
    flops *= rows * data.tokens * padded / team.processes
    passes = math.ceil(rows / team.processes / training.micro_batch_size)
    launches = device.backward + (device.forward if again else 0.0)
    own = sum(map(shape.trained, runs))
    # AdamW reads weight, gradient and two moments and writes three: 28 bytes; the gradients are
    # written, measured for clipping and emptied before: 16.
    update = 44.0 * own / (team.processes if tuning.kind == "full" else 1) / device.bandwidth
    arithmetic = device.training_seconds(flops)
    talk = exchange_seconds(case, tuning, team, passes)
    if tuning.kind == "full":  # a block's weights are gathered while another one computes
        return max(arithmetic, passes * shape.blocks * launches, talk) + update
    return max(arithmetic, passes * shape.blocks * launches) + talk + update


def exchange_seconds(case: Workload, tuning: Method, team: ProcessCount, passes: int) -> float:
    """What the processes send each other in a step.

    Sharded weights are gathered before both directions of every pass, 2 bytes each, and gradients
    are summed, 4 bytes each; adapters are summed once a step, there and back.
    """
    if team.processes == 1:
        return 0.0
    link = case.device.link if team.nodes == 1 else NETWORK
    trained = case.model_size.trained(tuning)
    if tuning.kind == "full":
        return passes * (2 * 2.0 + 4.0) * trained / link
    return 2 * 4.0 * trained / link


def evaluation_seconds(case: Workload, team: ProcessCount) -> float:
    """One measurement of all probes and of the general text, dealt over the processes."""
    study, shape, device, asked = case.study, case.model_size, case.device, case.probe_workloads
    count, batch = math.ceil(asked.count / team.processes), study.evaluation.batch_size
    wanted = min(study.evaluation.max_new_tokens, LONGEST * asked.answer)
    answers = generation_seconds(case, count, batch, asked.prompt, wanted)
    batches = math.ceil(count / batch) + 1
    scored = device.scoring_seconds(
        count * asked.scored * shape.forward(asked.scored, 1.0 - asked.prompt / asked.scored)
    )
    read, passes = 0.0, 0
    if text := study.general_text:
        read = device.scoring_seconds(asked.text * shape.forward(text.block, 1.0))
        passes = math.ceil(asked.text / text.block / text.batch_size)
    reading = max(scored, batches * shape.blocks * device.forward)
    return answers + reading + max(read, passes * shape.blocks * device.forward)


def generation_seconds(
    case: Workload, count: int, batch: int, prompt: float, tokens: float
) -> float:
    """Return the seconds to generate `count` greedy answers of `tokens` tokens."""
    shape, device = case.model_size, case.device
    batches = math.ceil(count / batch)
    rows = count / max(1, batches)
    number = 2.0 if case.half else 4.0
    # Frozen float32 weights are read, rounded and read again.
    weights = (8.0 if case.half else 4.0) * (shape.linear + shape.embedding)
    cache = rows * (prompt + tokens / 2) * shape.cache * number
    token = max(
        shape.blocks * device.forward,
        (weights + cache) / device.bandwidth,
        device.scoring_seconds(rows * shape.forward(prompt + tokens / 2, 1.0)),
    )
    first = device.scoring_seconds(rows * prompt * shape.forward(prompt, 1.0 / max(1.0, prompt)))
    return batches * (first + tokens * token)


def run_group_seconds(
    case: Workload,
    run_group: Sequence[Method],
    team: ProcessCount,
    steps: int,
    evaluations: int,
    stored: int = 0,
) -> dict[str, float]:
    """Return the seconds of each stage of a run group.

    Args:
        run_group: the method of each run.
        steps: optimizer steps of each run.
        evaluations: evaluations of each run.
        stored: checkpoints of each run in addition to those of evaluations.
    """
    passes = case.microbatches(run_group, team)
    of_each = [step_seconds(case, [run_group[owner] for owner in part], team) for part in passes]
    # A base is read for every member of a pass, and for every run that is alone.
    loads = sum(len(set(part)) for part in passes)
    runs = sum(len(tuning.hyperparameters) for tuning in run_group)
    written = sum(
        len(tuning.hyperparameters)
        * checkpoint_bytes(case, tuning)
        / (team.processes if tuning.kind == "full" else 1)
        for tuning in run_group
    )
    asked_along = benchmark_seconds(
        case, training_benchmark_workloads(case.study, case.task_workloads)
    )
    return {
        "start": STARTUP_SECONDS[case.device.is_gpu],
        "load": loads * load_seconds(case),
        "training": steps * sum(of_each),
        "probes": runs * evaluations * evaluation_seconds(case, team),
        # Of several processes each asks all of them.
        "benchmarks": runs * evaluations * asked_along,
        "checkpoints": (evaluations + stored) * written / STORAGE,
    }


def benchmark_seconds(case: Workload, asked: Mapping[str, TaskWorkload] | None = None) -> float:
    """All benchmarks on one model, or those that are given, in one process."""
    study, shape, device = case.study, case.model_size, case.device
    batch, total = study.benchmarks.batch_size, 0.0
    for bench in (case.task_workloads if asked is None else asked).values():
        if bench.most:
            # Most answers end at half of the longest that is allowed, a batch with its last one.
            count, tokens = bench.items * bench.samples, 0.75 * bench.most
            total += generation_seconds(case, count, batch, bench.prompt, tokens)
            continue
        tokens = bench.prompt + bench.choices
        arithmetic = device.scoring_seconds(
            bench.items * tokens * shape.forward(tokens, bench.choices / tokens)
        )
        passes = math.ceil(bench.items * tokens / (64 * batch))
        total += max(arithmetic, passes * shape.blocks * device.forward)
    return total


def pretraining_seconds(case: Workload, shape: ModelSize, tokens: float) -> float:
    """Return the seconds to pretrain a small model on `tokens` tokens."""
    spec = case.study.base.pretrain
    assert spec
    steps = spec.epochs * tokens / spec.batch_tokens
    whole = 3.0 * shape.forward(spec.block_size, 1.0) * spec.batch_tokens
    arithmetic = case.device.training_seconds(whole)
    update = 44.0 * shape.parameters / case.device.bandwidth
    return steps * (max(arithmetic, shape.blocks * case.device.backward) + update)
