"""Which runs of a cohort are trained in one pass, and how many at once.

Only runs whose loss is that of their own rows, and whose update is s B A on frozen matrices. And
only where it is faster: where a step is so small that starting its many operations, not their
arithmetic, takes the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from forgetting.adapters import attach
from forgetting.fused import trained_weights
from forgetting.models import Model
from forgetting.plan import Tuning
from forgetting.study import Training

TOKENS = {"cpu": 256, "cuda": 8192}
"""A step of more tokens than this keeps the cores busy by itself: `make bench-train` measures it on
a CPU; of a GPU it is what a pass costs beside its tokens (`gradients`), not measured."""

FEWEST = 4
"""So many runs must a sweep have: two in a pass were not faster than one after the other."""

CPU_BYTES = 2 * 2**30
"""So much memory may the weights, gradients and moments of a group take on a CPU."""


def asks_for_plain_adapters(tuning: Tuning) -> bool:
    """Is the method's loss that of its batch, and its update s B A on a frozen matrix?

    Replay only adds rows. What penalizes predictions or weights is a sum over a single run.
    """
    penalties = tuning.mitigation and (
        tuning.mitigation.kl or tuning.mitigation.ewc or tuning.mitigation.l2_sp
    )
    return (
        tuning.kind == "lora"
        and tuning.variant in ("lora", "rslora", "pissa")
        and not tuning.trains_embeddings
        and not penalties
    )


def may_fuse(tuning: Tuning, training: Training) -> bool:
    """Could a cohort be fused, as far as its settings tell?

    Trunks are not, so that a branch has the bits of its run alone.
    """
    return (
        training.fused == "auto"
        and not training.budgets
        and len(tuning.settings) >= FEWEST
        and asks_for_plain_adapters(tuning)
    )


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

    None where a step has more tokens than `TOKENS` allows. A pass over one example of each run
    takes no more memory than what a run alone may take, and what the runs train stays small beside
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
    # float32: the weight, its gradient, two moments of the optimizer.
    most = min(training.micro_batch_size, room // (16 * trained))
    return most if most >= FEWEST else 1


def evenly(items: Sequence[Any], most: int) -> list[list[Any]]:
    """Consecutive parts of at most so many items, whose sizes differ by one at most."""
    count = math.ceil(len(items) / most)
    size, more = divmod(len(items), max(1, count))
    ends = [(number + 1) * size + min(number + 1, more) for number in range(count)]
    return [list(items[begin:end]) for begin, end in pairwise([0, *ends])]
