"""Workload of a study on a device: model size, tokens of its data and benchmarks, downloads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from forgetting.benchmarks.registry import benchmark, task_with_same_dataset
from forgetting.config.data import TableRef
from forgetting.config.expand import Method
from forgetting.config.study import StudyConfig
from forgetting.data.hub import BENCHMARK_SIZES
from forgetting.data.table_sizes import (
    ProbeWorkload,
    TrainingSequences,
    bytes_per_token,
    probe_workload,
    table_size,
    training_sequences,
)
from forgetting.models.size import ModelSize, base_size
from forgetting.pipeline.resources.hardware import Device
from forgetting.schedule import LrSchedule
from forgetting.study.run_groups import MAX_BATCHED_TOKENS, may_batch, memory_limit, partition_runs


@dataclass(frozen=True)
class TaskSize:
    """Number of items of a benchmark, and their mean sizes in bytes, from the published rows.

    Attributes:
        count: number of evaluated items.
        prompt: bytes of an item's prompt.
        example: bytes of a solved example.
        choices: choices of an item.
        choice: bytes of a choice.
        download: bytes of its rows on the hub.
    """

    count: int
    prompt: float
    example: float
    choices: int
    choice: float
    download: float


TASK_SIZES = {task: TaskSize(**size) for task, size in BENCHMARK_SIZES.items()}
OTHER_TASK_SIZE = TaskSize(2000, 250, 300, 4, 40, 5e6)
"""A guess for every other task of the harness."""


def task_size(task: str) -> TaskSize:
    """Return the size of a task; for an unknown task, that of a task with the same rows."""
    known = TASK_SIZES.get(task) or TASK_SIZES.get(task_with_same_dataset(task) or "")
    if known:
        return known
    generates = benchmark(task).max_gen_toks is not None
    return replace(OTHER_TASK_SIZE, choices=0, choice=0.0) if generates else OTHER_TASK_SIZE


@dataclass(frozen=True)
class TaskWorkload:
    """Number of items of a benchmark, and their lengths in tokens.

    Attributes:
        items: number of evaluated items.
        prompt: tokens of a prompt with its examples.
        choices: tokens of all choices of an item; 0 if answers are generated.
        generated: tokens of the longest generated answer; 0 if choices are scored.
        samples: generated answers to an item.
        programs: whether the answers are programs, which are run.
    """

    items: int
    prompt: float
    choices: float
    generated: int
    samples: int = 1
    programs: bool = False


def task_workloads(study: StudyConfig, vocabulary: int) -> dict[str, TaskWorkload]:
    """Return the workload of every benchmark of a study, and of the prompts to refuse."""
    per_token = bytes_per_token(vocabulary)
    workloads: dict[str, TaskWorkload] = {}
    dataset = study.benchmark_dataset
    for name, task in study.benchmarks.tasks.items():
        items, known = task_size(name), benchmark(name)
        if dataset and dataset.origin == "generated":
            # The micro-world has some 80 items of each, a third as long.
            items = TaskSize(
                80, items.prompt / 3, items.example / 3, items.choices, items.choice / 3, 0.0
            )
        shots = known.num_fewshot if task.num_fewshot is None else task.num_fewshot
        workloads[name] = TaskWorkload(
            items=min(items.count, task.limit or items.count),
            prompt=(items.prompt + shots * items.example) / per_token,
            choices=items.choices * items.choice / per_token,
            generated=(task.max_new_tokens or known.max_gen_toks or 0) if not items.choices else 0,
            samples=task.samples or 1,
            programs=known.generates_code,
        )
    if refusals := study.benchmarks.refusals:
        table = table_size(study, refusals.table)
        count = min(table.rows, refusals.limit or table.rows)
        workloads["refusals"] = TaskWorkload(
            count, table.question / per_token, 0.0, refusals.max_new_tokens
        )
    return workloads


def training_benchmark_workloads(
    study: StudyConfig, workloads: Mapping[str, TaskWorkload]
) -> dict[str, TaskWorkload]:
    """Return the workload of the benchmarks of one evaluation during training."""
    return {
        name: replace(workloads[name], items=min(count, workloads[name].items))
        for name, count in study.benchmarks.during_training.items()
    }


def downloaded_bytes(study: StudyConfig, weights: int) -> dict[str, float]:
    """Return the bytes of every download: model (2 bytes a weight), tables and benchmarks."""
    found = {}
    if study.base.model and study.base.revision:
        found[study.base.model] = 2.0 * weights
    for table in dict.fromkeys(table for _, table in study.tables()):
        if TableRef.parse(table).origin(study) == "hub":
            found[table] = table_size(study, table).download
    if study.benchmark_dataset is None:
        found |= {name: task_size(name).download for name in study.benchmarks.tasks}
    return found


@dataclass(frozen=True)
class ProcessCount:
    """Number of processes that train a run together, and of the machines that they run on."""

    processes: int = 1
    nodes: int = 1

    @property
    def per_node(self) -> int:
        """Return the number of processes on each machine."""
        return self.processes // self.nodes


@dataclass(frozen=True)
class Workload:
    """A study on a device.

    Attributes:
        cores: processor cores for each device.
    """

    study: StudyConfig
    device: Device
    cores: int = 8

    @cached_property
    def model_size(self) -> ModelSize:
        """Return the size of the base model."""
        return base_size(self.study.base)

    @cached_property
    def training_sequences(self) -> TrainingSequences:
        """Return the size of the training data in tokens."""
        return training_sequences(self.study, self.model_size.vocab_size)

    @cached_property
    def probe_workloads(self) -> ProbeWorkload:
        """Return the sizes of the probes and of the general text in tokens."""
        return probe_workload(self.study, self.model_size.vocab_size)

    @cached_property
    def task_workloads(self) -> dict[str, TaskWorkload]:
        """Return the workloads of the benchmarks."""
        return task_workloads(self.study, self.model_size.vocab_size)

    @property
    def half(self) -> bool:
        """Return whether models compute in bfloat16."""
        return self.study.precision == "bfloat16" or (
            self.study.precision == "auto" and self.device.half
        )

    @cached_property
    def schedule(self) -> LrSchedule:
        """Return the schedule of a run; with durations, that of the trunk."""
        study = self.study
        every = study.evaluation.every_epochs
        return LrSchedule.plan(self.training_sequences.count, study.training, every)

    def branch(self, duration: float) -> LrSchedule:
        """Return the schedule of one duration, whose beginning is that of the trunk."""
        single = self.study.training.model_copy(update={"epochs": duration, "durations": []})
        every = self.study.evaluation.every_epochs
        return LrSchedule.plan(self.training_sequences.count, single, every)

    def runs_per_pass(self, method: Method, group: ProcessCount) -> list[int]:
        """Return the number of runs that share each forward pass of a run group."""
        training, runs = self.study.training, len(method.hyperparameters)
        tokens = self.training_sequences.tokens * training.batch_size
        batchable = self.model_size.batchable_rows and may_batch(method, training)
        is_large = tokens > MAX_BATCHED_TOKENS[self.device.kind]
        if group.processes > 1 or is_large or not batchable:
            return [1] * runs
        memory = self.device.memory if self.device.is_gpu else None
        max_bytes = memory_limit(self.model_size.parameters, memory)
        weights = self.model_size.trained(method)
        return partition_runs(runs, weights, training.micro_batch_size, max_bytes)

    def rows(self, group: ProcessCount) -> int:
        """Return the sequences of a forward pass of one process."""
        training = self.study.training
        return min(training.micro_batch_size, math.ceil(training.batch_size / group.processes))
