"""Make a base model trainable: all of its weights, or an adapter of one of the variants.

The first part covers AdaLoRA: adapters P diag(E) Q whose ranks share a budget (Zhang et al. 2023,
arXiv 2303.10512). peft provides the layers and the allocation. This module adds what peft leaves to
the training loop: the rank schedule, the call after every update, the penalty, and the state that a
run needs to resume.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from forgetting.config.expand import Method
from forgetting.config.methods import RankBudgetConfig
from forgetting.config.variants import VARIANTS
from forgetting.errors import InputError
from forgetting.models.architecture import write_layers
from forgetting.models.layers import (
    Kind,
    Layer,
    UnsupportedLayer,
    layers_to_adapt,
    mark_expert_layers,
)
from forgetting.models.loading import Model, freeze_non_text, load_meta_model, text_modules


def is_adalora(model: Model) -> bool:
    """Return whether the model has an AdaLoRA adapter."""
    return isinstance(model, PeftModel) and isinstance(model.base_model, AdaLoraModel)


def set_rank_schedule(model: Model, rank_budget: RankBudgetConfig, steps: int) -> None:
    """Set the schedule of the total rank for a run of `steps` steps; fractions are rounded down."""
    config = model.peft_config["default"]
    config.total_step, config.deltaT = steps, rank_budget.delta_t
    config.tinit, config.tfinal = int(rank_budget.tinit * steps), int(rank_budget.tfinal * steps)


def update_rank_allocation(model: Model, step: int) -> None:
    """Reallocate the rank budget after update number `step`, which counts from 1.

    The gradients of the update must still exist. peft updates the importance of each weight and
    zeroes the singular values that exceed the budget of this step. Models without an AdaLoRA
    adapter are left unchanged.
    """
    if is_adalora(model):
        model.base_model.update_and_allocate(step)


def orthogonality_penalty(model: Model, weight: float) -> Tensor:
    """Return weight * mean of ||A A^T - I||_F and ||B^T B - I||_F over all adapters.

    This is peft's form of the paper's equation 4. peft adds it only when it computes the loss
    itself.
    """
    deviations = []
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            product = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
            identity = torch.eye(len(product), dtype=product.dtype, device=product.device)
            deviations.append(torch.linalg.matrix_norm(product - identity))
    return weight * torch.stack(deviations).mean()


def pruned_state_dict(model: Model) -> tuple[dict[str, Tensor], AdaLoraConfig]:
    """Return tensors and configuration of the adapter in peft's format, without pruned ranks.

    A pruned singular value may become nonzero between two allocations. It is kept then, so that the
    loaded adapter equals the evaluated one.
    """
    config = model.peft_config["default"]
    masks = config.rank_pattern
    config.rank_pattern = None  # Otherwise peft prunes by the mask alone.
    tensors = dict(get_peft_model_state_dict(model))
    config.rank_pattern = masks
    if masks is None:
        return tensors, config
    pattern = {}
    for name, mask in masks.items():
        short = name.removesuffix(".default")
        prefix = "base_model.model." + short.removesuffix("lora_E")
        kept = torch.tensor(mask) | (tensors[prefix + "lora_E"].cpu() != 0).flatten()
        pattern[short] = kept.tolist()
        for matrix, axis in (("lora_E", 0), ("lora_A", 0), ("lora_B", 1)):
            indices = kept.nonzero().flatten().to(tensors[prefix + matrix].device)
            tensors[prefix + matrix] = tensors[prefix + matrix].index_select(axis, indices)
    return tensors, replace(config, rank_pattern=pattern)


def adalora_training_state(model: Model) -> dict[str, Tensor]:
    """Return the state that a run needs to resume and that the adapter on disk lacks, by name.

    It holds all trained weights, including pruned ones, which may become nonzero again; the running
    averages of importance and uncertainty; and the masks of the last allocation. It is empty for
    models without an AdaLoRA adapter.
    """
    if not is_adalora(model):
        return {}
    allocator = model.base_model.rankallocator
    state: dict[str, dict[str, Any]] = {
        "weight": {name: p.detach() for name, p in _trainable_parameters(model)},
        "importance": allocator.exp_avg_ipt,
        "uncertainty": allocator.exp_avg_unc,
        "mask": {
            name: torch.tensor(mask)
            for name, mask in (model.peft_config["default"].rank_pattern or {}).items()
        },
    }
    return {
        f"{kind}/{name}": tensor.cpu().contiguous()
        for kind, tensors in state.items()
        for name, tensor in tensors.items()
    }


def load_adalora_training_state(model: Model, state: dict[str, Tensor]) -> None:
    """Restore the state that `adalora_training_state` returned."""
    if not is_adalora(model):
        return
    by_kind: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        kind, name = key.split("/", 1)
        by_kind.setdefault(kind, {})[name] = tensor.to(model.device)
    with torch.no_grad():
        for name, parameter in _trainable_parameters(model):
            parameter.copy_(by_kind["weight"][name])
    allocator = model.base_model.rankallocator
    allocator.exp_avg_ipt = by_kind.get("importance", {})
    allocator.exp_avg_unc = by_kind.get("uncertainty", {})
    # peft recomputes the values before it uses them, but takes the names of the averages from here.
    allocator.ipt = {name: torch.zeros_like(t) for name, t in allocator.exp_avg_ipt.items()}
    masks = {name: mask.tolist() for name, mask in by_kind.get("mask", {}).items()}
    model.peft_config["default"].rank_pattern = masks or None


def _trainable_parameters(model: Model) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


GATE_UP_PROJ = "gate_up_proj"
"""Tensor of the experts that holds two matrices. Each gets an adapter of the method's rank."""


def attach_adapter(model: PreTrainedModel, method: Method, seed: int) -> Model:
    """Make `model` trainable as the method says: all of it, or a new adapter on it.

    The random initialization of the adapter depends on the seed alone, so that all hyperparameters
    of a sweep start from the same weights.

    Raises:
        InputError: the model does not support the method's adapter.
    """
    if method.kind == "full":
        model.requires_grad_(True)
        for embedding in _embedding_modules(model).values():
            embedding.requires_grad_(method.trains_embeddings)
        freeze_non_text(model)
        return model
    torch.manual_seed(seed)
    try:
        adapted = get_peft_model(model, _config(model, method))
    except (TypeError, ValueError) as error:
        raise InputError(f"methods: {method.name}: target_modules: {error}") from None
    if method.variant == "pissa":
        adapted.pissa_init = {
            name: tensor.clone()
            for name, tensor in get_peft_model_state_dict(adapted).items()
            if ".lora_" in name
        }
    return adapted


def _config(model: PreTrainedModel, method: Method) -> LoraConfig:
    embeddings = list(_embedding_modules(model)) if method.trains_embeddings else None
    try:
        layers = layers_to_adapt(model_layers(model), method)
    except UnsupportedLayer as error:
        raise InputError(f"methods: {method.name}: {error.key}: {error}") from None
    shared: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "lora_alpha": method.alpha,
        "lora_dropout": method.dropout,
        "target_modules": [layer.name for layer in layers if layer.kind != "tensor"],
        "modules_to_save": embeddings,
        # Otherwise peft trains one copy for the input and another one for the head.
        "ensure_weight_tying": embeddings is not None and _tied_weight(model) is not None,
        "bias": "none",
    }
    if method.rank_budget:
        # `set_rank_schedule` sets the number of steps, which is not known yet.
        return AdaLoraConfig(
            target_r=method.rank,
            init_r=method.initial_rank,
            total_step=1,
            orth_reg_weight=method.rank_budget.orth_reg_weight,
            **shared,
        )
    tensors = [layer for layer in layers if layer.kind == "tensor"]
    if any(layer.parameter == GATE_UP_PROJ for layer in tensors):
        pattern = rf".*\.{GATE_UP_PROJ}"
        shared["rank_pattern"] = {pattern: 2 * (method.rank or 0)}
        # Keeps the scale, which is alpha / rank, or alpha / sqrt(rank) for rslora.
        factor = math.sqrt(2) if VARIANTS[method.variant].root_scale else 2
        shared["alpha_pattern"] = {pattern: factor * (method.alpha or 0)}
    return LoraConfig(
        r=method.rank,
        **VARIANTS[method.variant].peft_options,
        target_parameters=[layer.path for layer in tensors] or None,
        **shared,
    )


def model_layers(model: PreTrainedModel) -> list[Layer]:
    """Return the weights of a model, each with how it can be adapted."""
    reachable = text_modules(model)
    return mark_expert_layers(
        [
            Layer(
                name,
                tuple(weight.shape),
                _layer_kind(model, module, weight),
                key,
                module in reachable,
            )
            for name, module in model.named_modules()
            for key, weight in module.named_parameters(recurse=False)
        ]
    )


def record_layers(folder: Path, path: Path) -> PreTrainedModel:
    """Write the layers of the model in a folder as JSON, and return it without values of weights.

    Raises:
        InputError: the weights do not belong to config.json; names the folder and the fault.
    """
    model = load_meta_model(folder)
    write_layers(path, folder, model_layers(model), model.num_parameters())
    return model


def _layer_kind(model: PreTrainedModel, module: nn.Module, weight: nn.Parameter) -> Kind:
    if weight is getattr(module, "weight", None) and isinstance(module, (nn.Linear, Conv1D)):
        if module is not model.get_output_embeddings():
            return "linear"
        return "tied head" if weight is _tied_weight(model) else "head"
    if isinstance(module, nn.Embedding):
        return "embedding"
    name = type(module).__name__
    experts = weight.dim() == 3 and "expert" in name.lower()
    return "tensor" if experts or (weight.dim() == 2 and name.endswith("Router")) else "other"


def _embedding_modules(model: Model) -> dict[str, nn.Module]:
    """Return the input embedding and the LM head, by name."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: m for name, m in model.named_modules() if any(m is end for end in ends)}


def embedding_weights(model: Model) -> set[str]:
    """Return the names of the weights, or trained copies, of input embedding and LM head."""
    weights = [module.weight for module in _embedding_modules(model).values()]
    return {name for name, p in model.named_parameters() if any(p is weight for weight in weights)}


def pissa_as_lora(
    initial: dict[str, torch.Tensor], trained: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return a LoRA adapter of twice the rank that is equivalent to a PiSSA adapter.

    PiSSA (Meng et al. 2024, arXiv 2404.02948) replaces W by W - s B0 A0, so that the update of W is
    s (B A - B0 A0) = s [B, -B0] [A; A0]. The first half of the rank is the trained one, from which
    a run resumes.

    Args:
        initial: the adapter's tensors before training.
        trained: the adapter's tensors now, in peft's names.
    """
    converted = {}
    for name, tensor in trained.items():
        if ".lora_A." in name:
            converted[name] = torch.cat([tensor, initial[name]], dim=0)
        elif ".lora_B." in name:
            converted[name] = torch.cat([tensor, -initial[name]], dim=1)
        else:
            converted[name] = tensor
    return converted


def trainable_half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the trained half of a tensor that `pissa_as_lora` converted."""
    if ".lora_" not in name:
        return tensor
    return tensor.chunk(2, dim=0 if ".lora_A." in name else 1)[0].contiguous()


def cast_frozen_weights(model: Model, precision: torch.dtype) -> None:
    """Store the frozen matrices under LoRA in the precision of the arithmetic.

    The results are bit-identical to autocast, which rounds these matrices at every forward pass
    after peft has cast every input to float32. Casting once saves the copies and half the memory.
    Trained weights, embeddings (also as a tied LM head) and norms stay float32. DoRA is excluded,
    because it computes norms of the frozen weights.
    """
    if precision == torch.float32 or not isinstance(model, PeftModel):
        return
    for module in model.modules():
        plain = type(module) is LoraLinear and not any(module.use_dora.values())
        if (plain or type(module) is SVDLinear) and not is_tied(model, module):
            module.cast_input_dtype_enabled = False
            base = module.get_base_layer()
            base.weight.data = base.weight.data.to(precision)


def adapter_layers(model: Model) -> list[Any]:
    """Return peft's layers that hold an adapter."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapted_weight(layer: Any) -> torch.Tensor:
    """Return the weight that an adapter updates: a matrix, or a tensor of experts."""
    weight: torch.Tensor = (
        layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
    )
    return weight


def is_tied(model: Model, layer: Any) -> bool:
    """Return whether the input embedding and the LM head share the weight of an adapted layer."""
    return adapted_weight(layer) is _tied_weight(model)


def _tied_weight(model: Model) -> torch.Tensor | None:
    """Return the weight that the input embedding and the LM head share, or None."""
    first, last = (
        end.get_base_layer().weight
        if isinstance(end, BaseTunerLayer)
        else getattr(end, "weight", None)
        for end in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    return first if first is last else None
