"""The optimizers of a study, with parameter groups for weight decay and learning-rate ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Adafactor

from forgetting.config.expand import Method
from forgetting.config.methods import Hyperparameters
from forgetting.config.training import TrainingConfig
from forgetting.models.adapters import embedding_weights
from forgetting.models.loading import Model


def make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter],
    training: TrainingConfig,
    hyperparameters: Hyperparameters,
    lr_ratios: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """Return the optimizer of a study over trained weights by name.

    The training loop sets the learning rate of every step: that of the schedule times the `ratio`
    of the parameter group.

    Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) is transformers' implementation with a given
    learning rate, as in `TrainingArguments(optim="adafactor")`. torch's always multiplies the step
    by max(1e-3, RMS(weight)), which is 1e-3 for LoRA's B: B starts at 0 and hardly moves.

    Norms and biases are not decayed, as in transformers' Trainer and in TOFU's script, unless
    `training.decay_norms_and_biases` is set, as in LLM Foundry.

    Args:
        parameters: trained weights by name.
        lr_ratios: factors on the learning rate of single weights, by name.
    """
    rate, decay = hyperparameters.learning_rate, hyperparameters.weight_decay
    members: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        ratio = (lr_ratios or {}).get(name, 1.0)
        decayed = training.decay_norms_and_biases or not _is_norm_or_bias(name, parameter)
        members.setdefault((ratio, decay if decayed else 0.0), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": weights, "ratio": ratio, "lr": ratio * rate, "weight_decay": group_decay}
        for (ratio, group_decay), weights in members.items()
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


def learning_rate_ratios(model: Model, method: Method) -> dict[str, float]:
    """Return the factors of a method on the learning rate of single weights, by name.

    They are those of embeddings, and of the matrices B of adapters with LoRA+ (Hayou et al. 2024,
    arXiv 2402.12354).
    """
    ratios: dict[str, float] = {}
    if method.embedding_lr_ratio is not None:
        ratios |= dict.fromkeys(embedding_weights(model), method.embedding_lr_ratio)
    if method.loraplus_lr_ratio is not None:
        names = [name for name, _ in model.named_parameters() if ".lora_B." in name]
        ratios |= dict.fromkeys(names, method.loraplus_lr_ratio)
    return ratios


def uses_fused_kernel(training: TrainingConfig, parameters: Iterable[Tensor]) -> bool:
    """Return whether the optimizer updates these weights in torch's fused kernel.

    Only AdamW has one, on a CPU and with CUDA. On one CPU thread, a step takes half of the default
    implementation's time for a small model, and a quarter for adapters. Results differ by rounding.
    """
    return training.optimizer == "adamw" and all(
        parameter.device.type in ("cpu", "cuda") for parameter in parameters
    )


def _is_norm_or_bias(name: str, parameter: torch.nn.Parameter) -> bool:
    # DoRA's magnitudes are vectors too, but all weights of an adapter are decayed.
    return parameter.ndim < 2 and ".lora_" not in name


class LionW(torch.optim.Optimizer):
    """Lion with decoupled weight decay (Chen et al. 2023, arXiv 2302.06675; Biderman et al. 2024).

    With gradient g, momentum m and peak rate lr0:

        p <- p (1 - lr/lr0 * weight_decay)
        p <- p - lr * sign(beta1 m + (1 - beta1) g)
        m <- beta2 m + (1 - beta2) g

    Unlike AdamW's, the decay follows the schedule but not the peak rate: a weight decay of 1e-4
    removes 1e-4 of a weight per step at the peak.
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
            beta1, beta2 = group["betas"]
            shrink = 1.0 - group["lr"] / group["peak"] * group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum: Tensor = self.state[parameter].setdefault(
                    "momentum", torch.zeros_like(parameter)
                )
                direction = torch.lerp(parameter.grad, momentum, beta1).sign_()
                parameter.mul_(shrink).add_(direction, alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1.0 - beta2)
