"""How much the benchmarks of a study read and write, and what a study fetches from the hub.

What the costs of a study's jobs are computed from: its model, its data, a device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from forgetting.benchmarks.registry import benchmark, task_with_same_dataset
from forgetting.config.data import TableRef
from forgetting.config.expand import Method
from forgetting.config.study import StudyConfig
from forgetting.data.hub_datasets import BENCHMARK_SIZES
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
    """A benchmark in numbers, from its published rows: means in bytes.

    Attributes:
        count: items that are evaluated.
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
    """A benchmark in numbers; of one that is not known, those of a task with the same rows."""
    known = TASK_SIZES.get(task) or TASK_SIZES.get(task_with_same_dataset(task) or "")
    if known:
        return known
    generates = benchmark(task).max_gen_toks is not None
    return replace(OTHER_TASK_SIZE, choices=0, choice=0.0) if generates else OTHER_TASK_SIZE


@dataclass(frozen=True)
class TaskWorkload:
    """What one benchmark asks of a model, in tokens.

    Attributes:
        items: that are evaluated.
        prompt: tokens of a prompt with its examples.
        choices: tokens of all choices of an item; 0 where answers are generated.
        most: longest generated answer; 0 where choices are scored.
        samples: answers that are generated to an item.
        programs: are the answers programs, to be run?
    """

    items: int
    prompt: float
    choices: float
    most: int
    samples: int = 1
    programs: bool = False


def task_workloads(study: StudyConfig, vocabulary: int) -> dict[str, TaskWorkload]:
    """Every benchmark of a study; prompts that should be refused are one of them."""
    per_token = bytes_per_token(vocabulary)
    found: dict[str, TaskWorkload] = {}
    dataset = study.benchmark_dataset
    for name, task in study.benchmarks.tasks.items():
        items, known = task_size(name), benchmark(name)
        if (
            dataset and dataset.origin == "generated"
        ):  # the micro-world has some 80 items of each, a third as long
            items = TaskSize(
                80, items.prompt / 3, items.example / 3, items.choices, items.choice / 3, 0.0
            )
        shots = known.num_fewshot if task.num_fewshot is None else task.num_fewshot
        found[name] = TaskWorkload(
            items=min(items.count, task.limit or items.count),
            prompt=(items.prompt + shots * items.example) / per_token,
            choices=items.choices * items.choice / per_token,
            most=(task.max_new_tokens or known.max_gen_toks or 0) if not items.choices else 0,
            samples=task.samples or 1,
            programs=known.generates_code,
        )
    if refusals := study.benchmarks.refusals:
        table = table_size(study, refusals.table)
        count = min(table.rows, refusals.limit or table.rows)
        found["refusals"] = TaskWorkload(
            count, table.question / per_token, 0.0, refusals.max_new_tokens
        )
    return found


def training_benchmark_workloads(
    study: StudyConfig, found: Mapping[str, TaskWorkload]
) -> dict[str, TaskWorkload]:
    """What a training asks of them at every evaluation."""
    return {
        name: replace(found[name], items=min(count, found[name].items))
        for name, count in study.benchmarks.during_training.items()
    }


def downloaded_bytes(study: StudyConfig, weights: int) -> dict[str, float]:
    """Bytes that are fetched from the hub, of each thing once; 2 for each weight of a model."""
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
    """Processes that train a run together, and the machines over which they are spread."""

    processes: int = 1
    nodes: int = 1

    @property
    def per_node(self) -> int:
        """Processes on a machine."""
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
        """The base in numbers."""
        return base_size(self.study.base)

    @cached_property
    def training_sequences(self) -> TrainingSequences:
        """The new knowledge, in tokens."""
        return training_sequences(self.study, self.model_size.vocab_size)

    @cached_property
    def probe_workloads(self) -> ProbeWorkload:
        """The probes and the general text, in tokens."""
        return probe_workload(self.study, self.model_size.vocab_size)

    @cached_property
    def task_workloads(self) -> dict[str, TaskWorkload]:
        """The benchmarks, in tokens."""
        return task_workloads(self.study, self.model_size.vocab_size)

    @property
    def half(self) -> bool:
        """Return whether arithmetic is in bfloat16."""
        return self.study.precision == "bfloat16" or (
            self.study.precision == "auto" and self.device.half
        )

    @cached_property
    def schedule(self) -> LrSchedule:
        """Steps of a run; with durations, of the trunk."""
        study = self.study
        every = study.evaluation.every_epochs
        return LrSchedule.plan(self.training_sequences.count, study.training, every)

    def branch(self, duration: float) -> LrSchedule:
        """Steps of the run that is trained for one duration; it begins where it leaves the "
        "trunk."""
        alone = self.study.training.model_copy(update={"epochs": duration, "durations": []})
        return LrSchedule.plan(
            self.training_sequences.count, alone, self.study.evaluation.every_epochs
        )

    def microbatches(self, run_group: Sequence[Method], team: ProcessCount) -> list[list[int]]:
        """Of each pass of a run group, whose runs share it: members by number, for every run one.

        Args:
            run_group: the method of each member.
        """
        owners = [number for number, tuning in enumerate(run_group) for _ in tuning.hyperparameters]
        training = self.study.training
        tokens = self.training_sequences.tokens * training.batch_size
        fusible = self.model_size.batchable_rows and all(may_batch(t, training) for t in run_group)
        if team.processes > 1 or tokens > MAX_BATCHED_TOKENS[self.device.kind] or not fusible:
            return [[owner] for owner in owners]
        memory = self.device.memory if self.device.is_gpu else None
        size = self.model_size.trained(run_group[0])
        most, space = training.micro_batch_size, memory_limit(self.model_size.parameters, memory)
        parts = partition_runs(len(owners), size, most, space)
        return [[owners[run] for run in part] for part in parts]

    def rows(self, team: ProcessCount) -> int:
        """Sequences in a forward pass of one process."""
        training = self.study.training
        return min(training.micro_batch_size, math.ceil(training.batch_size / team.processes))
