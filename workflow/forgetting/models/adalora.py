"""AdaLoRA: adapters P diag(E) Q whose ranks share a budget (Zhang et al. 2023, arXiv 2303.10512).

The layers and the allocation are peft's. What peft leaves to the loop is here: the course of the
budget, the call after every update, the penalty, and the state from which a killed run goes on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor

from forgetting.models.loading import Model
from forgetting.sections.variants import Budget


def is_adalora(model: Model) -> bool:
    """Has the model an adapter of AdaLoRA's?"""
    return isinstance(model, PeftModel) and isinstance(model.base_model, AdaLoraModel)


def plan_budget(model: Model, budget: Budget, steps: int) -> None:
    """Lay the course of the budget over the steps of a run, in whole steps, rounded down."""
    config = model.peft_config["default"]
    config.total_step, config.deltaT = steps, budget.every
    config.tinit, config.tfinal = int(budget.tinit * steps), int(budget.tfinal * steps)


def allocate(model: Model, step: int) -> None:
    """After update number `step` (from 1), while its gradients are there: spend the budget.

    peft notes how much each weight matters, and sets the singular values to 0 that the budget of
    this step does not reach. At other models nothing is done.
    """
    if is_adalora(model):
        model.base_model.update_and_allocate(step)


def orthogonality(model: Model, weight: float) -> Tensor:
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


def without_pruned(model: Model) -> tuple[dict[str, Tensor], AdaLoraConfig]:
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


def training_state(model: Model) -> dict[str, Tensor]:
    """What a run needs to go on and the adapter on disk does not hold, by name; else nothing.

    All trained weights, pruned ones too, which may come back; the averages of how much each weight
    matters and of how sure that is; the masks of the last allocation.
    """
    if not is_adalora(model):
        return {}
    allocator = model.base_model.rankallocator
    kept: dict[str, dict[str, Any]] = {
        "weight": {name: p.detach() for name, p in _trained(model)},
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


def restore_training(model: Model, state: dict[str, Tensor]) -> None:
    """Put back what `training_state` told."""
    if not is_adalora(model):
        return
    kept: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        kind, name = key.split("/", 1)
        kept.setdefault(kind, {})[name] = tensor.to(model.device)
    with torch.no_grad():
        for name, parameter in _trained(model):
            parameter.copy_(kept["weight"][name])
    allocator = model.base_model.rankallocator
    allocator.exp_avg_ipt = kept.get("importance", {})
    allocator.exp_avg_unc = kept.get("uncertainty", {})
    # Computed anew before it is used; its names say for which weights there are averages.
    allocator.ipt = {name: torch.zeros_like(t) for name, t in allocator.exp_avg_ipt.items()}
    masks = {name: mask.tolist() for name, mask in kept.get("mask", {}).items()}
    model.peft_config["default"].rank_pattern = masks or None


def _trained(model: Model) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
