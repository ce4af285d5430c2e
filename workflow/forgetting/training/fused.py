"""Several LoRA runs in one forward and backward pass over the base that they share.

Their batches, as many rows of each run, stand one below the other: the frozen matrices multiply all
rows at once, and each run's A and B multiply the rows of that run. Every run keeps weights of its
own, which are slices of what is stacked here, so that its optimizer, its checkpoints and its
evaluation are those of a run that is alone.

Runs may differ in rank and scale: those that are alike and side by side share a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from forgetting.models.loading import Model

NAME = "default"
"""peft's name of the adapter, in every run."""


@dataclass(frozen=True)
class Own:
    """What a run has of its own in the model that several share.

    Attributes:
        weights: what it trains, by the names that they have in the model.
        config: of its adapter, if it has one.
        scales: what multiplies B A, by layer.
    """

    weights: Mapping[str, nn.Parameter]
    config: PeftConfig | None = None
    scales: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model) -> Own:
        """What the model is trained by now."""
        config = model.peft_config[NAME] if isinstance(model, PeftModel) else None
        scales = {name: layer.scaling[NAME] for name, layer in _adapted(model)}
        return cls(trained_weights(model), config, scales)

    def copy(self) -> Own:
        """The same with weights for another run."""
        weights = {name: nn.Parameter(w.detach().clone()) for name, w in self.weights.items()}
        return Own(weights, self.config, self.scales)

    def seat(self, model: Model) -> None:
        """Make `model` the model of this run."""
        for name, weight in self.weights.items():
            module, _, attribute = name.rpartition(".")
            owner = model.get_submodule(module)
            if getattr(owner, attribute) is not weight:
                setattr(owner, attribute, weight)
        for name, layer in _adapted(model):
            layer.scaling[NAME] = self.scales[name]
        if self.config:
            model.peft_config[NAME] = self.config

    def leave(self) -> None:
        """Take the weights of a run that goes on alone, or has ended, out of the stack."""
        for weight in self.weights.values():
            weight.data, weight.grad = weight.data.clone(), None


def trained_weights(model: Model) -> dict[str, nn.Parameter]:
    """The parameters of the model that are trained."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _adapted(model: Model) -> Iterator[tuple[str, Any]]:
    """The layers beside which an adapter stands, by name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer))


class Stack:
    """The adapters of some runs, stacked per layer: A as (runs, rank, in), B as (runs, out, rank),
    with a stack for each rank and scale.

    From its making on, the weights of the runs are slices of the stack, and their gradients slices
    of its gradient.
    """

    def __init__(self, model: Model, members: Sequence[Own]) -> None:
        self.size = len(members)
        self._tensors: list[Tensor] = []
        self._forwards: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
        for name, layer in _adapted(model):
            parts = [
                (self._gather(f"{name}.lora_A", same), self._gather(f"{name}.lora_B", same), scale)
                for scale, same in _alike(name, members)
            ]
            dropout = layer.lora_dropout[NAME]
            self._forwards.append((layer, _fused_forward(layer.get_base_layer(), dropout, parts)))

    def _gather(self, module: str, members: Sequence[Own]) -> Tensor:
        weights = [member.weights[f"{module}.{NAME}.weight"] for member in members]
        stacked = torch.stack([weight.detach() for weight in weights]).requires_grad_()
        stacked.grad = torch.zeros_like(stacked)
        for index, weight in enumerate(weights):
            weight.data, weight.grad = stacked.detach()[index], stacked.grad[index]
        self._tensors.append(stacked)
        return stacked

    def zero_grad(self) -> None:
        """Forget the gradients of the step before."""
        for tensor in self._tensors:
            assert tensor.grad is not None
            tensor.grad.zero_()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let every layer take the rows of all runs, in the order of the stack."""
        for layer, forward in self._forwards:
            layer.forward = forward
        try:
            yield
        finally:
            for layer, _ in self._forwards:
                del layer.forward


def _alike(layer: str, members: Sequence[Own]) -> list[tuple[float, list[Own]]]:
    """The runs that stand side by side with the same rank and scale at a layer; the scale first."""

    def form(member: Own) -> tuple[float, int]:
        return member.scales[layer], len(member.weights[f"{layer}.lora_A.{NAME}.weight"])

    return [(scale, list(same)) for (scale, _), same in groupby(members, form)]


Part = tuple[Tensor, Tensor, float]
"""A, B and scale of runs that stand side by side."""


def _fused_forward(
    base: nn.Module, dropout: nn.Module, parts: Sequence[Part]
) -> Callable[[Tensor], Tensor]:
    """y = W x + s_k B_k A_k x for the rows x of run k, the layer's bias included.

    Alone, every run would draw the same mask of dropout: one is drawn, as it would, for all.
    """
    sizes = [len(first) for first, _, _ in parts]

    def forward(inputs: Tensor) -> Tensor:
        outputs: Tensor = base(inputs)
        rows = inputs.view(sum(sizes), -1, inputs.shape[-1])
        if isinstance(dropout, nn.Dropout):
            mask = dropout(inputs.new_ones(len(inputs) // sum(sizes), *inputs.shape[1:]))
            rows = rows * mask.view_as(rows[0])
        frozen = outputs.view(sum(sizes), -1, outputs.shape[-1])
        places = zip(parts, torch.split(rows, sizes), torch.split(frozen, sizes), strict=True)
        sums = [
            torch.baddbmm(out, torch.bmm(x, first.mT), second.mT, alpha=scale)
            for (first, second, scale), x, out in places
        ]
        return (sums[0] if len(sums) == 1 else torch.cat(sums)).view_as(outputs)

    return forward
