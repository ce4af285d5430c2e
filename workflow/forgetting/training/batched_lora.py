"""Batched LoRA: several runs of one method in one forward and backward pass over a shared base.

Every run reads the same batch, which is repeated along the rows once for each run. The frozen
matrices multiply all rows at once, and the matrices A and B of a run multiply its own rows. The
weights of a run are slices of stacked tensors, so a run keeps its own optimizer, checkpoints and
evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from forgetting.config.expand import Method
from forgetting.config.training import TrainingConfig
from forgetting.models.adapters import attach_adapter
from forgetting.models.architecture import rows_are_independent
from forgetting.models.loading import Model, text_config
from forgetting.study.run_groups import MAX_BATCHED_TOKENS, may_batch, memory_limit, partition_runs

ADAPTER_NAME = "default"
"""Name that peft gives the adapter in every run."""


@dataclass(frozen=True)
class AdapterState:
    """The weights that one run trains in a model that several runs share.

    Attributes:
        weights: trained parameters, by their names in the model.
    """

    weights: Mapping[str, nn.Parameter]

    @classmethod
    def of(cls, model: Model) -> AdapterState:
        """Return the parameters that `model` trains now."""
        return cls(trained_weights(model))

    def copy(self) -> AdapterState:
        """Return a copy with new parameters, for another run."""
        return AdapterState(
            {name: nn.Parameter(w.detach().clone()) for name, w in self.weights.items()}
        )

    def install(self, model: Model) -> None:
        """Make the weights of this run the parameters of `model`."""
        for name, weight in self.weights.items():
            module, _, attribute = name.rpartition(".")
            owner = model.get_submodule(module)
            if getattr(owner, attribute) is not weight:
                setattr(owner, attribute, weight)

    def detach(self) -> None:
        """Copy the weights out of the stacked tensors, which can then be freed."""
        for weight in self.weights.values():
            weight.data, weight.grad = weight.data.clone(), None


def trained_weights(model: Model) -> dict[str, nn.Parameter]:
    """Return the parameters of the model that require gradients, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _adapted_layers(model: Model) -> Iterator[tuple[str, Any]]:
    """Yield the layers that have an adapter, by name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer))


class BatchedAdapters:
    """The adapters of several runs, stacked per layer.

    A has the shape (runs, rank, in) and B (runs, out, rank). The parameters of the runs become
    slices of these tensors, and their gradients slices of the gradients.

    Attributes:
        size: number of runs.
    """

    def __init__(self, model: Model, adapters: Sequence[AdapterState]) -> None:
        self.size = len(adapters)
        self._stacked: list[Tensor] = []
        self._forwards: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
        for name, layer in _adapted_layers(model):
            forward = _batched_forward(
                layer.get_base_layer(),
                layer.lora_dropout[ADAPTER_NAME],
                self._stack(f"{name}.lora_A", adapters),
                self._stack(f"{name}.lora_B", adapters),
                layer.scaling[ADAPTER_NAME],
            )
            self._forwards.append((layer, forward))

    def _stack(self, module: str, adapters: Sequence[AdapterState]) -> Tensor:
        weights = [adapter.weights[f"{module}.{ADAPTER_NAME}.weight"] for adapter in adapters]
        stacked = torch.stack([weight.detach() for weight in weights]).requires_grad_()
        stacked.grad = torch.zeros_like(stacked)
        for index, weight in enumerate(weights):
            weight.data, weight.grad = stacked.detach()[index], stacked.grad[index]
        self._stacked.append(stacked)
        return stacked

    def zero_grad(self) -> None:
        """Set the gradients of all runs to zero."""
        for tensor in self._stacked:
            assert tensor.grad is not None
            tensor.grad.zero_()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make every adapted layer process the rows of all runs, in the order of the stack."""
        for layer, forward in self._forwards:
            layer.forward = forward
        try:
            yield
        finally:
            for layer, _ in self._forwards:
                del layer.forward


def _batched_forward(
    base: nn.Module, dropout: nn.Module, a: Tensor, b: Tensor, scale: float
) -> Callable[[Tensor], Tensor]:
    """Return the forward function y = W x + s B_k A_k x, for the rows x of run k.

    The output includes the bias of the base layer. One dropout mask serves all runs, because every
    run trained singly would draw the same mask.
    """
    runs = len(a)

    def forward(inputs: Tensor) -> Tensor:
        outputs: Tensor = base(inputs)
        rows = inputs.view(runs, -1, inputs.shape[-1])
        if isinstance(dropout, nn.Dropout):
            mask = dropout(inputs.new_ones(len(inputs) // runs, *inputs.shape[1:]))
            rows = rows * mask.view_as(rows[0])
        frozen = outputs.view(runs, -1, outputs.shape[-1])
        return torch.baddbmm(frozen, torch.bmm(rows, a.mT), b.mT, alpha=scale).view_as(outputs)

    return forward


def supports_batching(model: Model) -> bool:
    """Return whether the rows of a batch are independent and all adapters are plain LoRA."""
    layers = [layer for _, layer in _adapted_layers(model)]
    return (
        isinstance(model, PeftModel)
        and rows_are_independent(text_config(model).to_dict())
        and all(_is_plain_lora_layer(layer) for layer in layers)
    )


def _is_plain_lora_layer(layer: Any) -> bool:
    return (
        type(layer) is LoraLinear
        and type(layer.get_base_layer()) is nn.Linear
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
    )


def meta_model(base: Path, method: Method) -> Model:
    """Return the model of a run on the meta device: layers and shapes without values."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        # PiSSA initializes the adapter from the values of the base; its shapes are those of LoRA.
        return attach_adapter(model, method.model_copy(update={"variant": "lora"}), seed=0)


def runs_per_pass(
    method: Method,
    runs: int,
    base: Path,
    training: TrainingConfig,
    tokens: float,
    device: torch.device,
) -> list[int]:
    """Return the number of runs of a run group that share each forward pass.

    Args:
        method: method of all runs.
        runs: number of runs.
        base: folder of the base model.
        training: training section of the study.
        tokens: tokens of an optimizer step of one run.
        device: device that trains.
    """
    if tokens > MAX_BATCHED_TOKENS[device.type] or not may_batch(method, training):
        return [1] * runs
    model = meta_model(base, method)
    if not supports_batching(model):
        return [1] * runs
    trained = sum(weight.numel() for weight in trained_weights(model).values())
    frozen = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    memory = None
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    return partition_runs(runs, trained, training.micro_batch_size, memory_limit(frozen, memory))
