"""Several LoRA runs in one forward and backward pass over the base that they share.

The runs of a cohort see the same examples at the same step. Their copies of a batch stand one
below the other: the frozen matrices multiply all rows at once, and each run's A and B multiply the
rows of that run. Every run keeps weights of its own, which are slices of what is stacked here, so
that its optimizer, its checkpoints and its evaluation are those of a run that is alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from forgetting.models.loading import Model
from forgetting.scoring.forward import Batch

Weights = Mapping[str, nn.Parameter]
"""What a run trains, by the names that it has in the model."""


def trained_weights(model: Model) -> dict[str, nn.Parameter]:
    """The parameters of the model that are trained."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def seat(model: Model, weights: Weights) -> None:
    """Make `model` the model of the run that these weights belong to."""
    for name, weight in weights.items():
        module, _, attribute = name.rpartition(".")
        owner = model.get_submodule(module)
        if getattr(owner, attribute) is not weight:
            setattr(owner, attribute, weight)


def leave(weights: Weights) -> None:
    """Give a run that goes on alone its weights for itself."""
    for weight in weights.values():
        weight.data, weight.grad = weight.data.clone(), None


class Stack:
    """The adapters of some runs, stacked per layer: A as (runs, rank, in), B as (runs, out, rank).

    From its making on, the weights of the runs are slices of the stack, and their gradients slices
    of its gradient.
    """

    def __init__(self, model: Model, members: Sequence[Weights]) -> None:
        self.size = len(members)
        self._tensors: list[Tensor] = []
        self._forwards: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
        self.has_dropout = False
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                (adapter,) = layer.active_adapters
                first, second = (
                    self._gather(
                        [weights[f"{name}.{part}.{adapter}.weight"] for weights in members]
                    )
                    for part in ("lora_A", "lora_B")
                )
                self._forwards.append((layer, _fused_forward(layer, adapter, first, second)))
                self.has_dropout |= isinstance(layer.lora_dropout[adapter], nn.Dropout)

    def _gather(self, weights: Sequence[nn.Parameter]) -> Tensor:
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


def repeated(batch: Batch, count: int) -> Batch:
    """The same rows for each of so many runs, run after run."""

    def repeat(tensor: Tensor) -> Tensor:
        return tensor.repeat(count, *[1] * (tensor.ndim - 1))

    return replace(
        batch,
        ids=repeat(batch.ids),
        mask=repeat(batch.mask),
        labels=repeat(batch.labels),
        positions=None if batch.positions is None else repeat(batch.positions),
    )


def _fused_forward(
    layer: Any, adapter: str, first: Tensor, second: Tensor
) -> Callable[[Tensor], Tensor]:
    """y = W x + s B_k A_k x for the rows x of run k, the layer's bias included.

    Alone, every run would draw the same mask of dropout: one is drawn, as it would, for all.
    """
    runs, scale, dropout = len(first), layer.scaling[adapter], layer.lora_dropout[adapter]

    def forward(inputs: Tensor) -> Tensor:
        outputs: Tensor = layer.get_base_layer()(inputs)
        rows = inputs.view(runs, -1, *inputs.shape[1:])
        if isinstance(dropout, nn.Dropout):
            rows = rows * dropout(torch.ones_like(rows[0]))
        inner = torch.bmm(rows.flatten(1, -2), first.transpose(1, 2))
        frozen = outputs.view(runs, -1, outputs.shape[-1])
        return torch.baddbmm(frozen, inner, second.transpose(1, 2), alpha=scale).view_as(outputs)

    return forward
