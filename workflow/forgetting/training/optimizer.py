"""How weights are updated: the optimizers that a study can name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Adafactor

from forgetting.config.methods import Hyperparameters
from forgetting.config.training import TrainingConfig


def make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter],
    training: TrainingConfig,
    setting: Hyperparameters,
    loraplus_lr_ratio: float | None = None,
    ratios: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """The study's optimizer over trained weights by name; the loop sets the rate of every step.

    With `loraplus_lr_ratio` the B of every adapter is a group whose rate is that multiple (LoRA+,
    Hayou et al. 2024, arXiv 2402.12354); `ratios` gives other weights multiples of their own. Each
    group has its multiple under `ratio`.

    Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) is transformers', with a given learning rate
    as in `TrainingArguments(optim="adafactor")`. torch's own always multiplies the step by
    max(1e-3, RMS(weight)), which is 1e-3 for LoRA's B: B starts at 0 and hardly moves.

    Norms and biases are not decayed, as in transformers' Trainer and thus in TOFU's script, unless
    the study says `decay_norms_and_biases`, as in LLM Foundry's.
    """
    rate, decay = setting.learning_rate, setting.weight_decay
    members: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        ratio = (ratios or {}).get(name, 1.0)
        if loraplus_lr_ratio is not None and ".lora_B." in name:
            ratio = loraplus_lr_ratio
        decayed = training.decay_norms_and_biases or not _is_norm_or_bias(name, parameter)
        members.setdefault((ratio, decay if decayed else 0.0), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": weights, "ratio": ratio, "lr": ratio * rate, "weight_decay": own}
        for (ratio, own), weights in members.items()
    ]
    if training.optimizer == "adafactor":
        adafactor: torch.optim.Optimizer = Adafactor(
            groups,
            lr=rate,
            weight_decay=decay,
            scale_parameter=training.scale_parameter,
            relative_step=False,
        )
        return adafactor
    if training.optimizer == "lionw":
        return LionW(groups, rate, training.resolved_betas, decay)
    fused = uses_fused_kernel(training, parameters.values())
    return torch.optim.AdamW(groups, betas=training.resolved_betas, weight_decay=decay, fused=fused)


def uses_fused_kernel(training: TrainingConfig, parameters: Iterable[Tensor]) -> bool:
    """Return whether the study's optimizer updates these weights in torch's fused kernel.

    Only AdamW has one, on a CPU and with CUDA. On one thread of a CPU a step takes half of the time
    of torch's default for all weights of a small model, and a quarter for adapters. The results
    differ by rounding.
    """
    return training.optimizer == "adamw" and all(
        parameter.device.type in ("cpu", "cuda") for parameter in parameters
    )


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
