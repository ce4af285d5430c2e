"""Mitigations of forgetting: what a run adds to its loss or its batches, built once per run.

The loop of training only sums what stands in `Safeguards`. Penalties on the weights do not depend
on the batch, and are added once per step; penalties on predictions are sums over target tokens, and
the loop divides by their number in the whole step, so that no gradient depends on how a batch is
split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from forgetting.models import Model
from forgetting.study import Mitigation

WeightPenalty = Callable[[Model], Tensor]
"""What is added to the loss of a step for where the weights are."""


@dataclass(frozen=True)
class Safeguards:
    """All that a run does against forgetting."""

    on_weights: tuple[WeightPenalty, ...] = ()


def build_safeguards(model: Model, mitigation: Mitigation | None) -> Safeguards:
    """What the method asks for; `model` must still compute what the base does."""
    on_weights: list[WeightPenalty] = []
    if mitigation and mitigation.l2_sp:
        on_weights.append(l2_sp(model, mitigation.l2_sp.weight))
    return Safeguards(tuple(on_weights))


def l2_sp(model: Model, weight: float) -> WeightPenalty:
    """weight/2 * ||theta - theta0||^2 over all that is trained (Li et al. 2018, section 3.2).

    With adapters, over the updates scale*B*A of the matrices that they stand beside. Weight decay
    of an adapter is another thing: it shrinks A and B, whatever their product.
    """
    if isinstance(model, PeftModel):
        return lambda model: (
            weight
            / 2
            * torch.stack([squared_update(layer) for layer in adapted_layers(model)]).sum()
        )
    start = trained_weights(model)

    def penalty(model: Model) -> Tensor:
        distances = [
            (parameter - start[name]).square().sum()
            for name, parameter in model.named_parameters()
            if name in start
        ]
        return weight / 2 * torch.stack(distances).sum()

    return penalty


def adapted_layers(model: Model) -> list[Any]:
    """The layers that have an adapter, in the order of the model."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def squared_update(layer: Any) -> Tensor:
    """||scale * B A||_F^2 of one adapter, without forming B A.

    ||B A||_F^2 = tr(A^T B^T B A) = tr((B^T B) (A A^T)): two Gram matrices of the size of the rank.
    Both are symmetric, so that the trace is the sum of their elementwise product.
    """
    (adapter,) = layer.active_adapters
    if adapter in layer.lora_A:
        first, second = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    else:
        first, second = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    product: Tensor = (second.T @ second) * (first @ first.T)
    return product.sum() * float(layer.scaling[adapter]) ** 2


def trained_weights(model: Model) -> dict[str, Tensor]:
    """A copy of all parameters that are trained."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
