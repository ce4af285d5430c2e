"""What the costs of a study's jobs are computed from: its model, its data, a device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from forgetting.costs.benches import Bench, benches
from forgetting.costs.hardware import Device
from forgetting.costs.shape import Shape, folder_shape, known_shape, small_shape
from forgetting.costs.volumes import Questions, Sequences, questions, training_sequences
from forgetting.sections.base import Base
from forgetting.settings.load import is_local
from forgetting.settings.plan import Tuning
from forgetting.settings.study import Study
from forgetting.training.fusing import TOKENS, evenly, may_fuse, most_runs
from forgetting.training.schedule import Schedule


@dataclass(frozen=True)
class Team:
    """Processes that train a run together, and the machines over which they are spread."""

    processes: int = 1
    nodes: int = 1

    @property
    def here(self) -> int:
        """Processes on a machine."""
        return self.processes // self.nodes


@dataclass(frozen=True)
class Case:
    """A study on a device.

    Attributes:
        cores: of the processor, beside each device.
    """

    study: Study
    device: Device
    cores: int = 8

    @cached_property
    def shape(self) -> Shape:
        """The base in numbers."""
        return base_shape(self.study.base)

    @cached_property
    def trained_on(self) -> Sequences:
        """The new knowledge, in tokens."""
        return training_sequences(self.study, self.shape.vocabulary)

    @cached_property
    def asked(self) -> Questions:
        """The probes and the general text, in tokens."""
        return questions(self.study, self.shape.vocabulary)

    @cached_property
    def benches(self) -> dict[str, Bench]:
        """The benchmarks, in tokens."""
        return benches(self.study, self.shape.vocabulary)

    @property
    def half(self) -> bool:
        """Is arithmetic in bfloat16?"""
        return self.study.precision == "bfloat16" or (
            self.study.precision == "auto" and self.device.half
        )

    @cached_property
    def schedule(self) -> Schedule:
        """Steps of a run; with budgets, of the trunk."""
        study = self.study
        every = study.measurement.every_epochs
        return Schedule.plan(self.trained_on.count, study.training, every)

    def branch(self, budget: float) -> Schedule:
        """Steps of the run that is trained for one budget; it begins where it leaves the trunk."""
        alone = self.study.training.model_copy(update={"epochs": budget, "budgets": []})
        return Schedule.plan(self.trained_on.count, alone, self.study.measurement.every_epochs)

    def groups(self, tuning: Tuning, team: Team) -> list[int]:
        """Numbers of runs that share each fused pass of a cohort; ones where none do."""
        runs, training = len(tuning.settings), self.study.training
        tokens = self.trained_on.tokens * training.batch_size
        kind = "cuda" if self.device.is_gpu else "cpu"
        if team.processes > 1 or not may_fuse([tuning], training) or tokens > TOKENS[kind]:
            return [1] * runs
        room = 2 * 2**30
        if self.device.is_gpu:
            room = int(self.device.memory - 4 * self.shape.parameters) // 2
        most = most_runs(training, self.shape.trained(tuning), max(0, room))
        return [len(part) for part in evenly(tuning.settings, most)]

    def rows(self, team: Team) -> int:
        """Sequences in a forward pass of one process."""
        training = self.study.training
        return min(training.micro_batch_size, math.ceil(training.batch_size / team.processes))


def base_shape(base: Base) -> Shape:
    """The base of a study in numbers, before it is trained or downloaded."""
    if base.pretrain:
        return small_shape(base.pretrain)
    assert base.model
    if is_local(base.model):
        return folder_shape(Path(base.model).expanduser())
    return known_shape(base.model)
