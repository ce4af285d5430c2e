"""What a run is trained by, and what each of its steps is trained on.

Everything random is a function of the seed and the step alone (data order, dropout), so that a run
that was killed and started again goes on with the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from forgetting.encoding.encode import Example
from forgetting.encoding.examples import shuffled
from forgetting.sections.method import Setting
from forgetting.sections.training import Training
from forgetting.training.mitigate import Safeguards, TokenPenalty
from forgetting.training.schedule import Schedule
from forgetting.training.team import ALONE, Team


@dataclass(frozen=True)
class Recipe:
    """All that determines the weights of a run but its data and its model."""

    setting: Setting
    seed: int
    training: Training
    schedule: Schedule
    threshold: float
    stop_after: int | None
    precision: torch.dtype
    pad: int
    lora_plus_ratio: float | None = None
    rate_ratios: Mapping[str, float] = field(default_factory=dict)
    """Weights by name whose learning rate is another multiple of the setting's than 1."""
    until: int | None = None
    """The step at which the run is handed on to its next part, if it has one."""
    safeguards: Safeguards = field(default_factory=Safeguards)
    team: Team = ALONE


def batch_indices(examples: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the examples of a step: each epoch is a permutation of its own."""
    per_epoch = math.ceil(examples / batch_size)
    epoch, position = divmod(step, per_epoch)
    order = shuffled(examples, seed * 1_000_003 + epoch)
    return order[position * batch_size : (position + 1) * batch_size].tolist()


Group: TypeAlias = tuple[list[Example], TokenPenalty | None]
"""Examples of a step, with the penalty on the predictions of their targets."""


def groups_of_step(examples: Sequence[Example], recipe: Recipe, step: int) -> list[Group]:
    """The new examples of a step, then the replayed ones."""
    training = recipe.training
    indices = batch_indices(len(examples), training.batch_size, recipe.seed, step)
    new = [examples[index] for index in indices]
    epoch, position = divmod(step, recipe.schedule.steps_per_epoch)
    seen = epoch * len(examples) + position * training.batch_size
    old = recipe.safeguards.replayed(recipe.seed, seen, seen + len(new))
    return [(new, recipe.safeguards.on_new), (old, recipe.safeguards.on_replayed)]
