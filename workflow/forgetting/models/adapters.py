"""Make a base model trainable as a method says: all of it, or an adapter on it.

AdaLoRA: adapters P diag(E) Q whose ranks share a budget (Zhang et al. 2023, arXiv 2303.10512).

The layers and the allocation are peft's. What peft leaves to the loop is here: the course of the
budget, the call after every update, the penalty, and the state from which a killed run goes on.
"""

from __future__ import annotations

import math
from dataclasses import replace
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
from forgetting.models.layers import Kind, Layer, UnsupportedLayer, adapts_experts, layers_to_adapt
from forgetting.models.loading import Model, freeze_unread, language_model


def is_adalora(model: Model) -> bool:
    """Has the model an adapter of AdaLoRA's?"""
    return isinstance(model, PeftModel) and isinstance(model.base_model, AdaLoraModel)


def set_rank_schedule(model: Model, budget: RankBudgetConfig, steps: int) -> None:
    """Lay the course of the budget over the steps of a run, in whole steps, rounded down."""
    config = model.peft_config["default"]
    config.total_step, config.deltaT = steps, budget.delta_t
    config.tinit, config.tfinal = int(budget.tinit * steps), int(budget.tfinal * steps)


def update_rank_allocation(model: Model, step: int) -> None:
    """After update number `step` (from 1), while its gradients are there: spend the budget.

    peft notes how much each weight matters, and sets the singular values to 0 that the budget of
    this step does not reach. At other models nothing is done.
    """
    if is_adalora(model):
        model.base_model.update_and_allocate(step)


def orthogonality_penalty(model: Model, weight: float) -> Tensor:
    """weight * mean over the A and B of all adapters of ||A A^T - I||_F or ||B^T B - I||_F.

    peft's form of the paper's equation 4, which peft adds only where it computes the loss itself.
    """
    deviations = []
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            product = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
            identity = torch.eye(len(product), dtype=product.dtype, device=product.device)
            deviations.append(torch.linalg.matrix_norm(product - identity))
    return weight * torch.stack(deviations).mean()


def pruned_state_dict(model: Model) -> tuple[dict[str, Tensor], AdaLoraConfig]:
    """Tensors and configuration of the adapter as peft keeps it: what was pruned is left out.

    Between two allocations a pruned singular value may come back; it is kept then, so that what is
    loaded is what was measured.
    """
    config = model.peft_config["default"]
    masks = config.rank_pattern
    config.rank_pattern = None  # else peft itself would cut
    tensors = dict(get_peft_model_state_dict(model))
    config.rank_pattern = masks
    if masks is None:
        return tensors, config
    pattern = {}
    for name, mask in masks.items():
        short = name.removesuffix(".default")
        start = "base_model.model." + short.removesuffix("lora_E")
        kept = torch.tensor(mask) | (tensors[start + "lora_E"].cpu() != 0).flatten()
        pattern[short] = kept.tolist()
        for part, axis in (("lora_E", 0), ("lora_A", 0), ("lora_B", 1)):
            indices = kept.nonzero().flatten().to(tensors[start + part].device)
            tensors[start + part] = tensors[start + part].index_select(axis, indices)
    return tensors, replace(config, rank_pattern=pattern)


def adalora_training_state(model: Model) -> dict[str, Tensor]:
    """What a run needs to go on and the adapter on disk does not hold, by name; else nothing.

    All trained weights, pruned ones too, which may come back; the averages of how much each weight
    matters and of how sure that is; the masks of the last allocation.
    """
    if not is_adalora(model):
        return {}
    allocator = model.base_model.rankallocator
    kept: dict[str, dict[str, Any]] = {
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
        for kind, tensors in kept.items()
        for name, tensor in tensors.items()
    }


def load_adalora_training_state(model: Model, state: dict[str, Tensor]) -> None:
    """Put back what `adalora_training_state` told."""
    if not is_adalora(model):
        return
    kept: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        kind, name = key.split("/", 1)
        kept.setdefault(kind, {})[name] = tensor.to(model.device)
    with torch.no_grad():
        for name, parameter in _trainable_parameters(model):
            parameter.copy_(kept["weight"][name])
    allocator = model.base_model.rankallocator
    allocator.exp_avg_ipt = kept.get("importance", {})
    allocator.exp_avg_unc = kept.get("uncertainty", {})
    # Computed anew before it is used; its names say for which weights there are averages.
    allocator.ipt = {name: torch.zeros_like(t) for name, t in allocator.exp_avg_ipt.items()}
    masks = {name: mask.tolist() for name, mask in kept.get("mask", {}).items()}
    model.peft_config["default"].rank_pattern = masks or None


def _trainable_parameters(model: Model) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


LORA_MATRICES = "gate_up_proj"
"""Experts' tensor that holds two matrices. Each gets an adapter of the method's rank."""


def attach_adapter(model: PreTrainedModel, tuning: Method, seed: int) -> Model:
    """Make `model` trainable as the method says: all of it, or a new adapter on it.

    The adapter's random half depends on the seed alone, so that the learning rates of a sweep start
    from the same point.
    """
    if tuning.kind == "full":
        model.requires_grad_(True)
        for embedding in _embeddings(model).values():
            embedding.requires_grad_(tuning.trains_embeddings)
        freeze_unread(model)
        return model
    torch.manual_seed(seed)
    try:
        adapted = get_peft_model(model, _config(model, tuning))
    except (TypeError, ValueError) as error:
        raise InputError(f"methods: {tuning.name}: target_modules: {error}") from None
    if tuning.variant == "pissa":
        adapted.start = {
            name: tensor.clone()
            for name, tensor in get_peft_model_state_dict(adapted).items()
            if ".lora_" in name
        }
    return adapted


def _config(model: PreTrainedModel, tuning: Method) -> LoraConfig:
    embeddings = list(_embeddings(model)) if tuning.trains_embeddings else None
    try:
        layers = layers_to_adapt(model_layers(model), tuning)
    except UnsupportedLayer as error:
        raise InputError(f"methods: {tuning.name}: {error.key}: {error}") from None
    shared: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "lora_alpha": tuning.alpha,
        "lora_dropout": tuning.dropout,
        "target_modules": [layer.name for layer in layers if layer.kind != "tensor"],
        "modules_to_save": embeddings,
        # Else peft would train one copy for the input and another for the head.
        "ensure_weight_tying": embeddings is not None and _is_tied(model),
        "bias": "none",
    }
    if tuning.rank_budget:
        # The steps are known later, when `plan_budget` lays the budget over them.
        return AdaLoraConfig(
            target_r=tuning.rank,
            init_r=tuning.initial_rank,
            total_step=1,
            orth_reg_weight=tuning.rank_budget.orth_reg_weight,
            **shared,
        )
    tensors = [layer for layer in layers if layer.kind == "tensor"]
    if any(layer.parameter == LORA_MATRICES for layer in tensors):
        pattern = rf".*\.{LORA_MATRICES}"
        shared["rank_pattern"] = {pattern: 2 * (tuning.rank or 0)}
        # So that the scale stays: alpha / rank, or alpha / sqrt(rank).
        factor = math.sqrt(2) if VARIANTS[tuning.variant].root_scale else 2
        shared["alpha_pattern"] = {pattern: factor * (tuning.alpha or 0)}
    return LoraConfig(
        r=tuning.rank,
        **VARIANTS[tuning.variant].peft_options,
        target_parameters=[layer.path for layer in tensors] or None,
        **shared,
    )


def model_layers(model: PreTrainedModel) -> list[Layer]:
    """Return the weights of a model, each with how it can be adapted."""
    read = {*language_model(model).modules(), model.get_output_embeddings()}
    return adapts_experts(
        [
            Layer(
                name, tuple(weight.shape), _layer_kind(model, module, weight), key, module in read
            )
            for name, module in model.named_modules()
            for key, weight in module.named_parameters(recurse=False)
        ]
    )


def _layer_kind(model: PreTrainedModel, module: nn.Module, weight: nn.Parameter) -> Kind:
    if weight is getattr(module, "weight", None) and isinstance(module, (nn.Linear, Conv1D)):
        if module is not model.get_output_embeddings():
            return "linear"
        return "tied head" if weight is model.get_input_embeddings().weight else "head"
    if isinstance(module, nn.Embedding):
        return "embedding"
    name = type(module).__name__
    experts = weight.dim() == 3 and "expert" in name.lower()
    return "tensor" if experts or (weight.dim() == 2 and name.endswith("Router")) else "other"


def _embeddings(model: Model) -> dict[str, nn.Module]:
    """The input embedding and the LM head, by name."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: m for name, m in model.named_modules() if any(m is end for end in ends)}


def _is_tied(model: Model) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def embedding_weights(model: Model) -> set[str]:
    """Names of the weights of the input embedding and of the LM head, trained copies of them."""
    weights = [module.weight for module in _embeddings(model).values()]
    return {name for name, p in model.named_parameters() if any(p is weight for weight in weights)}


def pissa_as_lora(
    start: dict[str, torch.Tensor], trained: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The adapter of twice the rank that does to the base what PiSSA's has done.

    PiSSA (Meng et al. 2024, arXiv 2404.02948) puts W - s B0 A0 in the place of W, so that the
    update of W is s (B A - B0 A0) = s [B, -B0] [A; A0]. The first half of the rank is the trained
    one, from which a run goes on.
    """
    converted = {}
    for name, tensor in trained.items():
        if ".lora_A." in name:
            converted[name] = torch.cat([tensor, start[name]], dim=0)
        elif ".lora_B." in name:
            converted[name] = torch.cat([tensor, -start[name]], dim=1)
        else:
            converted[name] = tensor
    return converted


def trainable_half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Of a converted tensor of PiSSA's, the half that was trained."""
    if ".lora_" not in name:
        return tensor
    return tensor.chunk(2, dim=0 if ".lora_A." in name else 1)[0].contiguous()


def cast_frozen_weights(model: Model, precision: torch.dtype) -> None:
    """Store the frozen matrices under LoRA in the arithmetic's precision, once and for all.

    Autocast would round them to bfloat16 at every forward pass, and peft would widen every input to
    the adapter's float32 first: the numbers are the same bit by bit, without the copies and with
    half the memory. Trained weights, embeddings (also as a tied LM head) and norms stay float32;
    DoRA, which takes norms of the frozen weights, is left alone.
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
    """Return the layers of peft's that hold an adapter."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapted_weight(layer: Any) -> torch.Tensor:
    """Return the weight that an adapter updates: a matrix, or a tensor of experts."""
    weight: torch.Tensor = (
        layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
    )
    return weight


def is_tied(model: Model, layer: Any) -> bool:
    """Return whether the input embedding and the LM head share the weight of an adapted layer."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [_unwrapped(end).weight for end in ends if end is not None]
    return len(weights) == 2 and weights[0] is weights[1] and adapted_weight(layer) is weights[0]


def _unwrapped(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
