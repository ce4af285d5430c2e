"""Seconds of each stage of a job, from FLOPs, bytes and the number of operations.

A pass takes the longer of its arithmetic, `flops / (peak * efficiency)`, and of launching its
operations, `blocks * seconds per block`. Generating a token reads all weights and the key-value
cache of the batch, which usually takes longer than both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from forgetting.config.expand import Method
from forgetting.models.size import ModelSize
from forgetting.pipeline.resources.hardware import NETWORK, STORAGE
from forgetting.pipeline.resources.memory import checkpoint_bytes, shard_count
from forgetting.pipeline.resources.workload import (
    ProcessCount,
    TaskWorkload,
    Workload,
    training_benchmark_workloads,
)

STARTUP_SECONDS = {True: 30.0, False: 10.0}
"""Seconds to import torch and transformers and to read files, by whether there is a GPU: from a
shared file system with CUDA, or from a local disk without it."""

PADDED = 1.2
"""Tokens with padding per token without, for question-answer pairs on a GPU. Batches on a CPU are
padding-free."""

LONGEST = 2.5
"""Ratio of the longest to the mean answer of a batch, in tokens."""

TOKENIZED = 2e5
"""Tokens that one core tokenizes in a second."""


def load_seconds(workload: Workload) -> float:
    """Return the seconds to read the base in bfloat16 from the shared file system."""
    return 2.0 * workload.model_size.parameters / STORAGE


def tokenize_seconds(workload: Workload, group: ProcessCount) -> float:
    """Return the seconds to tokenize the training data and write it, once per job."""
    tokens = workload.training_sequences.count * workload.training_sequences.tokens
    return tokens / (TOKENIZED * workload.cores * group.per_node) + 4.0 * tokens / STORAGE


def step_seconds(workload: Workload, method: Method, group: ProcessCount, runs: int = 1) -> float:
    """Return the seconds of an optimizer step.

    Args:
        workload: the study on a device.
        method: of the runs.
        group: processes that train a run.
        runs: number of runs that share the step.
    """
    study, size, device = workload.study, workload.model_size, workload.device
    training, data = study.training, workload.training_sequences
    mitigation = method.mitigation
    replayed = mitigation.replay.ratio if mitigation and mitigation.replay else 0.0
    rows = training.batch_size / (1.0 - replayed)
    has_padding = device.is_gpu and not training.packing and data.targets != 1.0
    recomputes = training.activation_checkpointing
    flops = runs * size.training(method, data.tokens, data.targets, recomputes)
    if mitigation and any(section.needs_base_model for section in mitigation.sections.values()):
        flops += size.forward(data.tokens, data.targets)
    flops *= rows * data.tokens * (PADDED if has_padding else 1.0) / group.processes
    passes = math.ceil(rows / group.processes / training.micro_batch_size)
    launch = passes * size.blocks * (device.backward + (device.forward if recomputes else 0.0))
    # AdamW reads weight, gradient and two moments and writes three of them: 28 bytes. Gradients are
    # written, read for clipping and set to zero: 16.
    trained = runs * size.trained(method) / shard_count(method, group)
    update = 44.0 * trained / device.bandwidth
    arithmetic = device.training_seconds(flops)
    exchange = exchange_seconds(workload, method, group, passes)
    if method.kind == "full":  # weights of a block are gathered while another one computes
        return max(arithmetic, launch, exchange) + update
    return max(arithmetic, launch) + exchange + update


def exchange_seconds(workload: Workload, method: Method, group: ProcessCount, passes: int) -> float:
    """Return the seconds of communication between the processes in a step.

    Sharded weights are gathered for the forward and the backward pass (2 bytes each), and gradients
    are reduced (4 bytes each). Gradients of adapters are reduced once a step.
    """
    if group.processes == 1:
        return 0.0
    link = workload.device.link if group.nodes == 1 else NETWORK
    trained = workload.model_size.trained(method)
    if method.kind == "full":
        return passes * (2 * 2.0 + 4.0) * trained / link
    return 2 * 4.0 * trained / link


def evaluation_seconds(workload: Workload, group: ProcessCount) -> float:
    """Return the seconds of an evaluation on all probes and the general text."""
    study, size, device = workload.study, workload.model_size, workload.device
    probes, config = workload.probe_workloads, workload.study.evaluation
    count = math.ceil(probes.count / group.processes)
    longest = min(config.max_new_tokens, LONGEST * probes.answer)
    generating = generation_seconds(workload, count, config.batch_size, probes.prompt, longest)
    batches = math.ceil(count / config.batch_size) + 1
    flops = count * probes.scored * size.forward(probes.scored, 1.0 - probes.prompt / probes.scored)
    scoring = max(device.scoring_seconds(flops), batches * size.blocks * device.forward)
    text_arithmetic, passes = 0.0, 0
    if text := study.general_text:
        text_arithmetic = device.scoring_seconds(probes.text * size.forward(text.block, 1.0))
        passes = math.ceil(probes.text / text.block / text.batch_size)
    return generating + scoring + max(text_arithmetic, passes * size.blocks * device.forward)


def generation_seconds(
    workload: Workload, count: int, batch: int, prompt: float, tokens: float
) -> float:
    """Return the seconds to generate `count` greedy answers of `tokens` tokens."""
    size, device = workload.model_size, workload.device
    batches = math.ceil(count / batch)
    rows = count / max(1, batches)
    number = 2.0 if workload.half else 4.0
    # Frozen float32 weights are read, rounded and read again.
    weights = (8.0 if workload.half else 4.0) * (size.linear + size.embedding)
    cache = rows * (prompt + tokens / 2) * size.cache * number
    token = max(
        size.blocks * device.forward,
        (weights + cache) / device.bandwidth,
        device.scoring_seconds(rows * size.forward(prompt + tokens / 2, 1.0)),
    )
    first = device.scoring_seconds(rows * prompt * size.forward(prompt, 1.0 / max(1.0, prompt)))
    return batches * (first + tokens * token)


def run_group_seconds(
    workload: Workload,
    method: Method,
    group: ProcessCount,
    steps: int,
    evaluations: int,
    stored: int = 0,
) -> dict[str, float]:
    """Return the seconds of each stage of a run group.

    Args:
        workload: the study on a device.
        method: of the runs.
        group: processes that train a run.
        steps: optimizer steps of each run.
        evaluations: evaluations of each run.
        stored: checkpoints of each run in addition to those of evaluations.
    """
    passes, runs = workload.runs_per_pass(method, group), len(method.hyperparameters)
    steps_of_all = sum(step_seconds(workload, method, group, shared) for shared in passes)
    written = runs * checkpoint_bytes(workload, method) / shard_count(method, group)
    in_training = training_benchmark_workloads(workload.study, workload.task_workloads)
    return {
        "start": STARTUP_SECONDS[workload.device.is_gpu],
        "load": len(passes) * load_seconds(workload),
        "training": steps * steps_of_all,
        "probes": runs * evaluations * evaluation_seconds(workload, group),
        # Each process evaluates all of them.
        "benchmarks": runs * evaluations * benchmark_seconds(workload, in_training),
        "checkpoints": (evaluations + stored) * written / STORAGE,
    }


def benchmark_seconds(workload: Workload, tasks: Mapping[str, TaskWorkload] | None = None) -> float:
    """Return the seconds to run tasks, by default all of the study, on one model."""
    size, device, total = workload.model_size, workload.device, 0.0
    batch = workload.study.benchmarks.batch_size
    for task in (workload.task_workloads if tasks is None else tasks).values():
        if task.generated:
            # Most answers end at half of the limit, a batch with its longest one.
            count, tokens = task.items * task.samples, 0.75 * task.generated
            total += generation_seconds(workload, count, batch, task.prompt, tokens)
            continue
        tokens = task.prompt + task.choices
        flops = task.items * tokens * size.forward(tokens, task.choices / tokens)
        passes = math.ceil(task.items * tokens / (64 * batch))
        total += max(device.scoring_seconds(flops), passes * size.blocks * device.forward)
    return total


def pretraining_seconds(workload: Workload, size: ModelSize, tokens: float) -> float:
    """Return the seconds to pretrain a small model on `tokens` tokens."""
    config = workload.study.base.pretrain
    assert config
    steps = config.epochs * tokens / config.batch_tokens
    flops = 3.0 * size.forward(config.block_size, 1.0) * config.batch_tokens
    arithmetic = workload.device.training_seconds(flops)
    update = 44.0 * size.parameters / workload.device.bandwidth
    return steps * (max(arithmetic, size.blocks * workload.device.backward) + update)
