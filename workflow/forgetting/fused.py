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
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from forgetting.forward import Batch
from forgetting.models import Model, attach
from forgetting.plan import Tuning
from forgetting.study import Training

Weights = Mapping[str, nn.Parameter]
"""What a run trains, by the names that it has in the model."""

CPU_TOKENS = 1024
"""On a CPU, a step of more tokens than this keeps the cores busy by itself."""

CPU_BYTES = 2 * 2**30
"""So much memory may the weights, gradients and moments of a group take on a CPU."""


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


def asks_for_plain_adapters(tuning: Tuning) -> bool:
    """Is the method's loss that of its batch, and its update s B A on a frozen matrix?

    Replay only adds rows. What penalizes predictions or weights is a sum over a single run.
    """
    penalties = tuning.mitigation and (
        tuning.mitigation.kl or tuning.mitigation.ewc or tuning.mitigation.l2_sp
    )
    return tuning.variant in ("lora", "rslora", "pissa") and tuning.kind == "lora" and not penalties


def can_fuse(model: Model) -> bool:
    """Does each row of a batch go its own way through this model, by plain adapters of LoRA?

    Not with dropout of the base's own, whose masks would be other ones, nor with experts, to which
    rows are sent in another order.
    """
    settings = model.config.to_dict()
    own_dropout = any(
        isinstance(value, float) and value > 0 for name, value in settings.items() if "drop" in name
    )
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return (
        isinstance(model, PeftModel)
        and not own_dropout
        and not any("expert" in name for name in settings)
        and all(_is_plain(layer) for layer in layers)
    )


def outline(base: Path, tuning: Tuning) -> Model:
    """The model of a run without its numbers, to tell what it is made of and how large it is."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        # PiSSA's start is taken from the numbers; its shape is that of any adapter.
        return attach(model, tuning.model_copy(update={"variant": "lora"}), seed=0)


def runs_in_a_step(model: Model, training: Training, tokens: float, device: torch.device) -> int:
    """How many runs of a cohort are fused at most; 1 if none are.

    A GPU waits for launches in any case; a CPU only where a step is small. A pass over one example
    of each run takes no more memory than what a run alone may take, and what the runs train stays
    small beside the rest.

    Args:
        model: of one run; its numbers are not looked at.
        tokens: of a step of one run.
    """
    if not can_fuse(model) or (device.type == "cpu" and tokens > CPU_TOKENS):
        return 1
    trained = sum(weight.numel() for weight in trained_weights(model).values())
    room = CPU_BYTES
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        room = (whole - 4 * sum(weight.numel() for weight in model.parameters())) // 2
    # float32: the weight, its gradient, two moments of the optimizer.
    return max(1, min(training.micro_batch_size, room // (16 * trained)))


def _is_plain(layer: Any) -> bool:
    return (
        type(layer) is LoraLinear
        and type(layer.get_base_layer()) is nn.Linear
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
    )


class Stack:
    """The adapters of some runs, stacked per layer: A as (runs, rank, in), B as (runs, out, rank).

    From its making on, the weights of the runs are slices of the stack, and their gradients slices
    of its gradient.
    """

    def __init__(self, model: PeftModel, members: Sequence[Weights]) -> None:
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


def leave(weights: Weights) -> None:
    """Give a run that goes on alone its weights for itself."""
    for weight in weights.values():
        weight.data, weight.grad = weight.data.clone(), None


def copies(batch: Batch, count: int) -> Batch:
    """The same rows for each of so many runs, run after run."""
    ids, mask, labels = (t.repeat(count, 1) for t in (batch.ids, batch.mask, batch.labels))
    return replace(batch, ids=ids, mask=mask, labels=labels)


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
