"""Which runs of a cohort are trained in one pass, and how many at once: what the model tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from forgetting.models.adapters import attach
from forgetting.models.loading import Model
from forgetting.sections.training import Training
from forgetting.settings.plan import Tuning
from forgetting.training.fused import trained_weights
from forgetting.training.fusing import CPU_BYTES, TOKENS, most_runs


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


def _is_plain(layer: Any) -> bool:
    return (
        type(layer) is LoraLinear
        and type(layer.get_base_layer()) is nn.Linear
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
    )


def outline(base: Path, tuning: Tuning) -> Model:
    """The model of a run without its numbers, to tell what it is made of and how large it is."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        # PiSSA's start is taken from the numbers; its shape is that of any adapter.
        return attach(model, tuning.model_copy(update={"variant": "lora"}), seed=0)


def runs_in_a_step(model: Model, training: Training, tokens: float, device: torch.device) -> int:
    """How many runs of a cohort are fused at most; 1 if none are.

    None where a step has more tokens than `TOKENS` allows. What the runs train stays small beside
    the rest.

    Args:
        model: of one run; its numbers are not looked at.
        tokens: of a step of one run.
    """
    if not can_fuse(model) or tokens > TOKENS[device.type]:
        return 1
    trained = sum(weight.numel() for weight in trained_weights(model).values())
    room = CPU_BYTES
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        room = (whole - 4 * sum(weight.numel() for weight in model.parameters())) // 2
    return most_runs(training, trained, room)
