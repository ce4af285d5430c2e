"""How a training pass attends: by PyTorch's kernel, or on a CPU by plain products of matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from forgetting.models.loading import Model, text_config
from forgetting.settings.model_config import drops_out

LONGEST = 512
"""Tokens of the longest row that is quicker by products: see `make bench-train`'s record."""


@contextmanager
def quick_attention(
    model: Model, mask: torch.Tensor, precision: torch.dtype
) -> Iterator[torch.Tensor]:
    """Within, `model` attends in the way that trains fastest; yields the mask to give it.

    softmax(q k' / sqrt(width) + mask) v, either way; they differ by rounding. PyTorch's kernel for
    CPUs never holds the scores, which pays for long rows, but goes back through bfloat16 slowly (16
    rows of 105 tokens, one thread: 20 ms, where products take 4). The backward pass has to be
    within as well, as activation checkpointing computes the forward pass again.

    Args:
        mask: 1 where there is a token (rows, length), or which place sees which
            (rows, 1, length, length).
        precision: of the products.
    """
    short = mask.device.type == "cpu" and mask.shape[-1] <= LONGEST
    changes = short and precision == torch.bfloat16 and _way(model) == "sdpa"
    if changes:
        model.set_attn_implementation("eager")
    try:
        # A model that knows products alone takes no mask of truth values either.
        yield (
            _added(mask, precision) if mask.dtype == torch.bool and _way(model) == "eager" else mask
        )
    finally:
        if changes:
            model.set_attn_implementation("sdpa")


def has_dropout(model: Model) -> bool:
    """Is anything dropped out in training, by the base or by an adapter?"""
    return drops_out(text_config(model).to_dict()) or any(
        isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()
    )


def _way(model: Model) -> str | None:
    """The name that transformers gives to how the model attends."""
    return getattr(model.config, "_attn_implementation", None)


def _added(seen: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """What is added to the scores: 0 where a place is seen, the least number elsewhere."""
    return torch.zeros_like(seen, dtype=precision).masked_fill(~seen, torch.finfo(precision).min)
