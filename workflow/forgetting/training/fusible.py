"""Which runs of a cohort are trained in one pass: what the model and the machine tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from forgetting.models.adapters import attach
from forgetting.models.loading import Model, text_config
from forgetting.sections.training import Training
from forgetting.settings.plan import Tuning
from forgetting.training.fused import trained_weights
from forgetting.training.fusing import TOKENS, allows_fusing, packed, room, rows_are_apart


def can_fuse(model: Model) -> bool:
    """Does each row of a batch go its own way through this model, by plain adapters of LoRA?

    Not with one beside the head, which is asked for predicted places alone: of runs that read other
    rows, these are not equally many.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return (
        isinstance(model, PeftModel)
        and rows_are_apart(text_config(model).to_dict())
        and all(_is_plain(layer) for layer in layers)
        and not isinstance(model.get_output_embeddings(), LoraLayer)
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


def shared_passes(
    runs: Sequence[Tuning], base: Path, training: Training, tokens: float, device: torch.device
) -> list[list[int]]:
    """Which runs share a pass, by their numbers; every run is in one of the parts.

    None share one where a step has more tokens than `TOKENS` allows.

    Args:
        runs: the method of each.
        tokens: of a step of one run.
    """
    alone = [[number] for number in range(len(runs))]
    if tokens > TOKENS[device.type] or not all(allows_fusing(run, training) for run in runs):
        return alone
    methods = {run.name: run for run in runs}
    outlines = {name: outline(base, run) for name, run in methods.items()}
    if not all(can_fuse(model) for model in outlines.values()):
        return alone
    sizes = [sum(w.numel() for w in trained_weights(outlines[run.name]).values()) for run in runs]
    whole = outlines[runs[0].name]
    frozen = sum(weight.numel() for weight in whole.parameters() if not weight.requires_grad)
    memory = None
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    return packed([1] * len(runs), sizes, training.micro_batch_size, room(frozen, memory))
