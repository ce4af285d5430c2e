"""Several LoRA runs in one forward and backward pass over the base that they share.

Their batches, as many rows of each run, stand one below the other: the frozen matrices multiply all
rows at once, and each run's A and B multiply the rows of that run. Every run keeps weights of its
own, which are slices of what is stacked here, so that its optimizer, its checkpoints and its
evaluation are those of a run that is alone.

Runs may differ in rank and scale: those that are alike and side by side share a product.

Which runs of a run group are trained in one pass: what the model and the machine tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
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
"""peft's name of the adapter, in every run."""


@dataclass(frozen=True)
class AdapterState:
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
    def of(cls, model: Model) -> AdapterState:
        """What the model is trained by now."""
        config = model.peft_config[ADAPTER_NAME] if isinstance(model, PeftModel) else None
        scales = {name: layer.scaling[ADAPTER_NAME] for name, layer in _adapted_layers(model)}
        return cls(trained_weights(model), config, scales)

    def copy(self) -> AdapterState:
        """The same with weights for another run."""
        weights = {name: nn.Parameter(w.detach().clone()) for name, w in self.weights.items()}
        return AdapterState(weights, self.config, self.scales)

    def install(self, model: Model) -> None:
        """Make `model` the model of this run."""
        for name, weight in self.weights.items():
            module, _, attribute = name.rpartition(".")
            owner = model.get_submodule(module)
            if getattr(owner, attribute) is not weight:
                setattr(owner, attribute, weight)
        for name, layer in _adapted_layers(model):
            layer.scaling[ADAPTER_NAME] = self.scales[name]
        if self.config:
            model.peft_config[ADAPTER_NAME] = self.config

    def detach(self) -> None:
        """Take the weights of a run that goes on alone, or has ended, out of the stack."""
        for weight in self.weights.values():
            weight.data, weight.grad = weight.data.clone(), None


def trained_weights(model: Model) -> dict[str, nn.Parameter]:
    """The parameters of the model that are trained."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _adapted_layers(model: Model) -> Iterator[tuple[str, Any]]:
    """The layers beside which an adapter stands, by name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer))


class BatchedAdapters:
    """The adapters of some runs, stacked per layer: A as (runs, rank, in), B as (runs, out, rank),
    with a stack for each rank and scale.

    From its making on, the weights of the runs are slices of the stack, and their gradients slices
    of its gradient.
    """

    def __init__(self, model: Model, members: Sequence[AdapterState]) -> None:
        self.size = len(members)
        self._tensors: list[Tensor] = []
        self._forwards: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
        for name, layer in _adapted_layers(model):
            parts = [
                (self._gather(f"{name}.lora_A", same), self._gather(f"{name}.lora_B", same), scale)
                for scale, same in _same_adapters(name, members)
            ]
            dropout = layer.lora_dropout[ADAPTER_NAME]
            self._forwards.append((layer, _batched_forward(layer.get_base_layer(), dropout, parts)))

    def _gather(self, module: str, members: Sequence[AdapterState]) -> Tensor:
        weights = [member.weights[f"{module}.{ADAPTER_NAME}.weight"] for member in members]
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


def _same_adapters(
    layer: str, members: Sequence[AdapterState]
) -> list[tuple[float, list[AdapterState]]]:
    """The runs that stand side by side with the same rank and scale at a layer; the scale first."""

    def form(member: AdapterState) -> tuple[float, int]:
        return member.scales[layer], len(member.weights[f"{layer}.lora_A.{ADAPTER_NAME}.weight"])

    return [(scale, list(same)) for (scale, _), same in groupby(members, form)]


BatchSlice = tuple[Tensor, Tensor, float]
"""A, B and scale of runs that stand side by side."""


def _batched_forward(
    base: nn.Module, dropout: nn.Module, parts: Sequence[BatchSlice]
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


def supports_batching(model: Model) -> bool:
    """Does each row of a batch go its own way through this model, by plain adapters of LoRA?

    Not with one beside the head, which is asked for predicted places alone: of runs that read other
    rows, these are not equally many.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return (
        isinstance(model, PeftModel)
        and rows_are_independent(text_config(model).to_dict())
        and all(_is_plain_lora_model(layer) for layer in layers)
        and not isinstance(model.get_output_embeddings(), LoraLayer)
    )


def _is_plain_lora_model(layer: Any) -> bool:
    return (
        type(layer) is LoraLinear
        and type(layer.get_base_layer()) is nn.Linear
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
    )


def meta_model(base: Path, tuning: Method) -> Model:
    """The model of a run without its numbers, to tell what it is made of and how large it is."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        # PiSSA's start is taken from the numbers; its shape is that of any adapter.
        return attach_adapter(model, tuning.model_copy(update={"variant": "lora"}), seed=0)


def batchable_groups(
    runs: Sequence[Method],
    base: Path,
    training: TrainingConfig,
    tokens: float,
    device: torch.device,
) -> list[list[int]]:
    """Which runs share a pass, by their numbers; every run is in one of the parts.

    None share one where a step has more tokens than `MAX_BATCHED_TOKENS` allows.

    Args:
        runs: the method of each.
        tokens: of a step of one run.
    """
    alone = [[number] for number in range(len(runs))]
    if tokens > MAX_BATCHED_TOKENS[device.type] or not all(
        may_batch(run, training) for run in runs
    ):
        return alone
    methods = {run.name: run for run in runs}
    outlines = {name: meta_model(base, run) for name, run in methods.items()}
    if not all(supports_batching(model) for model in outlines.values()):
        return alone
    sizes = [sum(w.numel() for w in trained_weights(outlines[run.name]).values()) for run in runs]
    whole = outlines[runs[0].name]
    frozen = sum(weight.numel() for weight in whole.parameters() if not weight.requires_grad)
    memory = None
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    return partition_runs(
        [1] * len(runs), sizes, training.micro_batch_size, memory_limit(frozen, memory)
    )
