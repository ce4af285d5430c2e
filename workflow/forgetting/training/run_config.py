"""The configuration of a run, and the examples of each of its steps.

All randomness (order of the data, dropout) is a function of the seed and the step. A run that is
killed and resumed therefore ends with the same numbers.
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
    """Everything that determines the weights of a run, except its data and its model.

    Attributes:
        hyperparameters: learning rate and weight decay.
        seed: seed of the order of the data and of dropout.
        training: training section of the study.
        schedule: steps, evaluations and learning-rate schedule.
        base_value: value of the selection metric for the base model.
        threshold: value of the selection metric at which a run counts as having learned.
        stop_after_evaluations: evaluations after the threshold at which the run ends, if any.
        precision: type in which matrices are multiplied.
        pad: id of the padding token.
        lr_ratios: factors on the learning rate of single weights, by name.
        until: step at which the first of two stages ends, if there are two.
        mitigations: penalties and replayed examples.
        process_group: processes that train the run.
    """

    hyperparameters: Hyperparameters
    seed: int
    training: TrainingConfig
    schedule: LrSchedule
    base_value: float
    threshold: float
    stop_after_evaluations: int | None
    precision: torch.dtype
    pad: int
    lr_ratios: Mapping[str, float] = field(default_factory=dict)
    until: int | None = None
    mitigations: Mitigations = field(default_factory=Mitigations)
    process_group: ProcessGroup = SINGLE_PROCESS


def batch_indices(examples: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Return the indices of the examples of a step; each epoch has its own permutation."""
    per_epoch = math.ceil(examples / batch_size)
    epoch, position = divmod(step, per_epoch)
    order = shuffled(examples, seed * 1_000_003 + epoch)
    return order[position * batch_size : (position + 1) * batch_size].tolist()


LossGroup: TypeAlias = tuple[list[Example], TokenPenalty | None]
"""Examples of a step, and the penalty on the predictions of their targets."""


def loss_groups(examples: Sequence[Example], config: RunConfig, step: int) -> list[LossGroup]:
    """Return two groups for a step: its new examples, and the examples that are replayed."""
    training = config.training
    indices = batch_indices(len(examples), training.batch_size, config.seed, step)
    new = [examples[index] for index in indices]
    epoch, position = divmod(step, config.schedule.steps_per_epoch)
    seen = epoch * len(examples) + position * training.batch_size
    replayed = config.mitigations.replayed(config.seed, seen, seen + len(new))
    return [
        (new, config.mitigations.new_token_penalty),
        (replayed, config.mitigations.replay_token_penalty),
    ]
