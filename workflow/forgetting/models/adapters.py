"""Make a base model trainable as a method says: all of it, or an adapter on it."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from forgetting.models.loading import Model, freeze_unread, language_model
from forgetting.models.merged import is_tied
from forgetting.records import InputError
from forgetting.settings.layers import Kind, Layer, Unadaptable, beside_experts, layers_to_adapt
from forgetting.settings.plan import Tuning

TWO_MATRICES = "gate_up_proj"
"""Experts' tensor that holds two matrices. Each gets an adapter of the method's rank."""


def attach(model: PreTrainedModel, tuning: Tuning, seed: int) -> Model:
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


def _config(model: PreTrainedModel, tuning: Tuning) -> LoraConfig:
    embeddings = list(_embeddings(model)) if tuning.trains_embeddings else None
    try:
        layers = layers_to_adapt(model_layers(model), tuning)
    except Unadaptable as error:
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
    if tuning.budget:
        # The steps are known later, when `plan_budget` lays the budget over them.
        return AdaLoraConfig(
            target_r=tuning.rank,
            init_r=tuning.initial_rank,
            total_step=1,
            orth_reg_weight=tuning.budget.orthogonality,
            **shared,
        )
    tensors = [layer for layer in layers if layer.kind == "tensor"]
    if any(layer.parameter == TWO_MATRICES for layer in tensors):
        pattern = rf".*\.{TWO_MATRICES}"
        shared["rank_pattern"] = {pattern: 2 * (tuning.rank or 0)}
        # So that the scale stays: alpha / rank, or alpha / sqrt(rank).
        factor = math.sqrt(2) if tuning.variant == "rslora" else 2
        shared["alpha_pattern"] = {pattern: factor * (tuning.alpha or 0)}
    return LoraConfig(
        r=tuning.rank,
        init_lora_weights="pissa" if tuning.variant == "pissa" else True,
        use_rslora=tuning.variant == "rslora",
        use_dora=tuning.variant == "dora",
        target_parameters=[layer.path for layer in tensors] or None,
        **shared,
    )


def model_layers(model: PreTrainedModel) -> list[Layer]:
    """Return the weights of a model, each with how it can be adapted."""
    read = {*language_model(model).modules(), model.get_output_embeddings()}
    return beside_experts(
        [
            Layer(name, tuple(weight.shape), _kind(model, module, weight), key, module in read)
            for name, module in model.named_modules()
            for key, weight in module.named_parameters(recurse=False)
        ]
    )


def _kind(model: PreTrainedModel, module: nn.Module, weight: nn.Parameter) -> Kind:
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


def convert_pissa(
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


def trained_half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Of a converted tensor of PiSSA's, the half that was trained."""
    if ".lora_" not in name:
        return tensor
    return tensor.chunk(2, dim=0 if ".lora_A." in name else 1)[0].contiguous()


def round_frozen(model: Model, precision: torch.dtype) -> None:
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
