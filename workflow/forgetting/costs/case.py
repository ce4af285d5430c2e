"""What the costs of a study's jobs are computed from: its model, its data, a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from forgetting.costs.benches import Bench, benches
from forgetting.costs.hardware import Device
from forgetting.costs.shape import Shape, base_shape
from forgetting.costs.volumes import Questions, Sequences, questions, training_sequences
from forgetting.settings.plan import Tuning
from forgetting.settings.study import Study
from forgetting.training.fusing import TOKENS, allows_fusing, packed, room
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

    def passes(self, cohort: Sequence[Tuning], team: Team) -> list[list[int]]:
        """Of each pass of a cohort, whose runs share it: members by number, for every run one.

        Args:
            cohort: the method of each member.
        """
        owners = [number for number, tuning in enumerate(cohort) for _ in tuning.settings]
        training = self.study.training
        tokens = self.trained_on.tokens * training.batch_size
        fusible = self.shape.rows_are_apart and all(allows_fusing(t, training) for t in cohort)
        if team.processes > 1 or tokens > TOKENS[self.device.kind] or not fusible:
            return [[owner] for owner in owners]
        memory = self.device.memory if self.device.is_gpu else None
        sizes = [self.shape.trained(cohort[owner]) for owner in owners]
        most, space = training.micro_batch_size, room(self.shape.parameters, memory)
        parts = packed([1] * len(owners), sizes, most, space)
        return [[owners[run] for run in part] for part in parts]

    def rows(self, team: Team) -> int:
        """Sequences in a forward pass of one process."""
        training = self.study.training
        return min(training.micro_batch_size, math.ceil(training.batch_size / team.processes))
