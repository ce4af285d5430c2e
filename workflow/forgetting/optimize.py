"""How weights are updated: the steps of a run, the course of its learning rate, the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forgetting.study import Setting, Training


@dataclass(frozen=True)
class Schedule:
    """Steps of a run, derived from the number of examples."""

    steps: int
    steps_per_epoch: int
    warmup: int
    evaluations: frozenset[int]
    restart: int = 0
    """The step at which a second part of the run begins, with an optimizer of its own."""
    starts: frozenset[int] = frozenset()
    """Of a trunk: the steps at which a branch leaves it, and its state is stored."""

    @classmethod
    def plan(cls, examples: int, training: Training, every_epochs: float) -> Schedule:
        """Steps per epoch are ceil(examples / batch size); the last step is always evaluated.

        With `budgets` it is the plan of their trunk, which ends where the last branch leaves it and
        is evaluated where the longest run would be.
        """
        per_epoch = math.ceil(examples / training.batch_size)
        steps = steps_of(training.epochs, per_epoch)
        every = max(1, round(every_epochs * per_epoch))
        warmup = _warmup(training, steps, per_epoch)
        if training.budgets:
            starts = {branch_start(training, budget, per_epoch) for budget in training.budgets}
            last = max(starts)
            evaluations = frozenset(range(every, last + 1, every))
            return cls(last, per_epoch, warmup, evaluations, starts=frozenset(starts))
        return cls(steps, per_epoch, warmup, frozenset([*range(every, steps, every), steps]))


def steps_of(epochs: float, steps_per_epoch: int) -> int:
    """Steps of so many epochs, which may be less than one; at least one step."""
    return max(1, round(epochs * steps_per_epoch))


def _warmup(training: Training, steps: int, steps_per_epoch: int) -> int:
    """Steps of warm-up, which may be more than the run has."""
    if training.warmup_steps is not None:
        return training.warmup_steps
    if training.warmup_share is not None:
        return round(training.warmup_share * steps)
    epochs = 1.0 if training.warmup_epochs is None else training.warmup_epochs
    return round(epochs * steps_per_epoch)


def cooldown_start(training: Training, steps: int) -> int:
    """Updates before the cooldown of a run of so many steps; all of them, if it has none.

    The cooldown takes its share of the steps, rounded, and at least one step.
    """
    share = training.cooldown_share
    return steps - max(1, round(share * steps)) if share else steps


def branch_start(training: Training, budget: float, steps_per_epoch: int) -> int:
    """The step of the trunk at which the branch of a budget, in epochs, leaves it."""
    return cooldown_start(training, steps_of(budget, steps_per_epoch))


def learning_rate(step: int, peak: float, training: Training, schedule: Schedule) -> float:
    """Learning rate of the step after `step` updates.

    Linear warm-up from 0 over w steps (the first update of a run with warm-up has rate 0), then,
    with t the share of the remaining steps that is done and f the floor, peak times

    - constant: 1
    - linear: f + (1 - f) (1 - t)
    - cosine: f + (1 - f) (1 + cos(pi t)) / 2
    - inverse_sqrt: d + (1 - d) / sqrt((step - w + s) / s), d `decay_floor`, s `decay_steps` or w
    - trapezoid: 1

    of which the last two end in a cooldown over the last share of all steps, linear from where it
    begins, be it in the warm-up, to f. A trunk has none: its branches do.

    Constant, linear, cosine with floor 0, and inverse_sqrt without cooldown are what transformers'
    schedulers give. Biderman et al. 2024 (appendix on training) took the cosine with f = 0.01 for
    instruction tuning, and for continued pretraining inverse_sqrt with w = s = 1000 and d = 1,
    which is the trapezoid, with a cooldown of 0.2 to f = 0. Where a cooldown would begin in the
    warm-up, their scheduler warms up to the end; here every run has its cooldown.

    After a restart, the rate rises to that course in a linear warm-up as long as the first: the
    optimizer's moments are empty again.
    """
    since = step - schedule.restart
    if schedule.restart and since < schedule.warmup:
        peak *= since / schedule.warmup
    begin = schedule.steps if training.budgets else cooldown_start(training, schedule.steps)
    factor = _factor(min(step, begin), training, schedule)
    if step > begin:
        left = max(0.0, (schedule.steps - step) / (schedule.steps - begin))
        factor = training.floor + (factor - training.floor) * left
    return peak * factor


def _factor(step: int, training: Training, schedule: Schedule) -> float:
    """What multiplies the peak before the cooldown."""
    warmup, floor = schedule.warmup, training.floor
    if step < warmup:
        return step / warmup
    done = min(1.0, (step - warmup) / max(1, schedule.steps - warmup))
    if training.schedule == "linear":
        return floor + (1.0 - floor) * (1.0 - done)
    if training.schedule == "cosine":
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
    if training.schedule == "inverse_sqrt":
        scale = training.decay_steps or max(1, warmup)
        fallen = 1.0 / math.sqrt((step - warmup + scale) / scale)
        return training.decay_floor + (1.0 - training.decay_floor) * fallen
    return 1.0


def make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter],
    training: Training,
    setting: Setting,
    lora_plus_ratio: float | None = None,
    ratios: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """The study's optimizer over trained weights by name; the loop sets the rate of every step.

    With `lora_plus_ratio` the B of every adapter is a group whose rate is that multiple (LoRA+,
    Hayou et al. 2024, arXiv 2402.12354); `ratios` gives other weights multiples of their own. Each
    group has its multiple under `ratio`.

    Adafactor is torch's own (Shazeer & Stern 2018, arXiv 1804.04235), whose whole state is tensors,
    so that it is saved and restored exactly; its step is relative to the size of the weights.

    Norms and biases are not decayed, as in transformers' Trainer and thus in TOFU's script, unless
    the study says `decay_vectors`, as in LLM Foundry's.
    """
    rate, decay = setting.learning_rate, setting.weight_decay
    members: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        ratio = (ratios or {}).get(name, 1.0)
        if lora_plus_ratio is not None and ".lora_B." in name:
            ratio = lora_plus_ratio
        decayed = training.decay_vectors or not _is_norm_or_bias(name, parameter)
        members.setdefault((ratio, decay if decayed else 0.0), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": weights, "ratio": ratio, "lr": ratio * rate, "weight_decay": own}
        for (ratio, own), weights in members.items()
    ]
    if training.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, weight_decay=decay)
    if training.optimizer == "lionw":
        return LionW(groups, rate, training.decay_rates, decay)
    return torch.optim.AdamW(groups, betas=training.decay_rates, weight_decay=decay)


def _is_norm_or_bias(name: str, parameter: torch.nn.Parameter) -> bool:
    """The magnitudes of DoRA are vectors too, but adapters are decayed whole."""
    return parameter.ndim < 2 and ".lora_" not in name


class LionW(torch.optim.Optimizer):
    """Lion with decoupled weight decay (Chen et al. 2023, arXiv 2302.06675; Biderman et al. 2024).

    With gradient g, momentum m and peak rate lr0:

        p <- p (1 - lr/lr0 * weight_decay)
        p <- p - lr * sign(beta1 m + (1 - beta1) g)
        m <- beta2 m + (1 - beta2) g

    The decay follows the schedule but not the peak rate, unlike AdamW's: 1e-4 here takes 1e-4 of a
    weight per step at the peak.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter] | list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        for group in self.param_groups:
            group["peak"] = group["lr"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            first, second = group["betas"]
            shrink = 1.0 - group["lr"] / group["peak"] * group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum: Tensor = self.state[parameter].setdefault(
                    "momentum", torch.zeros_like(parameter)
                )
                direction = torch.lerp(parameter.grad, momentum, first).sign_()
                parameter.mul_(shrink).add_(direction, alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1.0 - second)
