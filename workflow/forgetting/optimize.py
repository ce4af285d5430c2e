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

    @classmethod
    def plan(cls, examples: int, training: Training, every_epochs: float) -> Schedule:
        """Steps per epoch are ceil(examples / batch size); the last step is always evaluated."""
        per_epoch = math.ceil(examples / training.batch_size)
        steps = max(1, round(training.epochs * per_epoch))
        every = max(1, round(every_epochs * per_epoch))
        warmup = min(round(training.warmup_epochs * per_epoch), steps)
        return cls(steps, per_epoch, warmup, frozenset([*range(every, steps, every), steps]))


def learning_rate(step: int, peak: float, training: Training, schedule: Schedule) -> float:
    """Learning rate of the step after `step` updates.

    Linear warm-up from 0 (the first update of a run with warm-up has rate 0), then, with t the
    share of the remaining steps that is done and f the floor, peak times

    - constant: 1
    - linear: f + (1 - f) (1 - t)
    - cosine: f + (1 - f) (1 + cos(pi t)) / 2
    - inverse_sqrt: sqrt(w / step), w the steps of warm-up (at least 1)
    - trapezoid: 1

    of which the last two end in a cooldown over the last share of all steps, linear from where it
    begins to f. Constant, linear, cosine with floor 0, and inverse_sqrt without cooldown are what
    transformers' schedulers give. The trapezoid is the schedule of continued pretraining in
    Biderman et al. 2024 (warm-up, flat, 20 % cooldown to 0), the cosine with f = 0.01 that of
    their instruction tuning (appendix on training).

    After a restart, the rate rises to that course in a linear warm-up as long as the first: the
    optimizer's moments are empty again.
    """
    since = step - schedule.restart
    if schedule.restart and since < schedule.warmup:
        peak *= since / schedule.warmup
    if step < schedule.warmup:
        return peak * step / schedule.warmup
    cooldown = round(training.cooldown_share * schedule.steps)
    begin = max(schedule.warmup, schedule.steps - cooldown)
    factor = _factor(min(step, begin) if cooldown else step, training, schedule)
    if cooldown and step > begin:
        left = (schedule.steps - step) / (schedule.steps - begin)
        factor = training.floor + (factor - training.floor) * max(0.0, left)
    return peak * factor


def _factor(step: int, training: Training, schedule: Schedule) -> float:
    done = min(1.0, (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup))
    falling = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        "trapezoid": 1.0,
        "inverse_sqrt": math.sqrt(max(1, schedule.warmup) / max(1, schedule.warmup, step)),
    }[training.schedule]
    if training.schedule in ("linear", "cosine"):
        return training.floor + (1.0 - training.floor) * falling
    return falling


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
    """
    rate, decay = setting.learning_rate, setting.weight_decay
    by_ratio: dict[float, list[torch.nn.Parameter]] = {1.0: []}
    for name, parameter in parameters.items():
        ratio = (ratios or {}).get(name, 1.0)
        if lora_plus_ratio is not None and ".lora_B." in name:
            ratio = lora_plus_ratio
        by_ratio.setdefault(ratio, []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": weights, "ratio": ratio, "lr": ratio * rate}
        for ratio, weights in by_ratio.items()
        if weights
    ]
    if training.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, weight_decay=decay)
    if training.optimizer == "lionw":
        return LionW(groups, rate, training.decay_rates, decay)
    return torch.optim.AdamW(groups, betas=training.decay_rates, weight_decay=decay)


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
