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

from forgetting.config.methods import Hyperparameters
from forgetting.config.training import TrainingConfig
from forgetting.data.dataset import shuffled
from forgetting.data.tokenize import Example
from forgetting.schedule import LrSchedule
from forgetting.training.distributed import SINGLE_PROCESS, ProcessGroup
from forgetting.training.mitigations import Mitigations, TokenPenalty


@dataclass(frozen=True)
class RunConfig:
    """All that determines the weights of a run but its data and its model."""

    hyperparameters: Hyperparameters
    seed: int
    training: TrainingConfig
    schedule: LrSchedule
    threshold: float
    stop_after_evaluations: int | None
    precision: torch.dtype
    pad: int
    loraplus_lr_ratio: float | None = None
    lr_ratios: Mapping[str, float] = field(default_factory=dict)
    """Weights by name whose learning rate is another multiple of the setting's than 1."""
    until: int | None = None
    """The step at which the run is handed on to its next part, if it has one."""
    mitigations: Mitigations = field(default_factory=Mitigations)
    process_group: ProcessGroup = SINGLE_PROCESS


def batch_indices(examples: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the examples of a step: each epoch is a permutation of its own."""
    per_epoch = math.ceil(examples / batch_size)
    epoch, position = divmod(step, per_epoch)
    order = shuffled(examples, seed * 1_000_003 + epoch)
    return order[position * batch_size : (position + 1) * batch_size].tolist()


LossGroup: TypeAlias = tuple[list[Example], TokenPenalty | None]
"""Examples of a step, with the penalty on the predictions of their targets."""


def loss_groups(examples: Sequence[Example], recipe: RunConfig, step: int) -> list[LossGroup]:
    """The new examples of a step, then the replayed ones."""
    training = recipe.training
    indices = batch_indices(len(examples), training.batch_size, recipe.seed, step)
    new = [examples[index] for index in indices]
    epoch, position = divmod(step, recipe.schedule.steps_per_epoch)
    seen = epoch * len(examples) + position * training.batch_size
    old = recipe.mitigations.replayed(recipe.seed, seen, seen + len(new))
    return [
        (new, recipe.mitigations.new_token_penalty),
        (old, recipe.mitigations.replay_token_penalty),
    ]
