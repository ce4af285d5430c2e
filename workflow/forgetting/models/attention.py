"""Attention within documents that stand side by side in one row, without padding.

All else in a model treats each token by itself, so that a pass over such a row computes nothing for
padding. Attention alone sets documents of about one length below each other and multiplies them as
a batch.

How a training pass attends: by PyTorch's kernel, or on a CPU by plain products of matrices.

Attention of one new token to all before it, by products of matrices where they are quicker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from forgetting.models.config_file import has_dropout_config
from forgetting.models.loading import Model, text_config

MAX_EAGER_TOKENS = 512
"""Tokens of the longest row that is quicker by products: see `make bench-train`'s record."""


@contextmanager
def eager_if_faster(
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
    short = mask.device.type == "cpu" and mask.shape[-1] <= MAX_EAGER_TOKENS
    changes = short and precision == torch.bfloat16 and _implementation(model) == "sdpa"
    if changes:
        model.set_attn_implementation("eager")
    try:
        # A model that knows products alone takes no mask of truth values either.
        yield (
            _with_added_mask(mask, precision)
            if mask.dtype == torch.bool and _implementation(model) == "eager"
            else mask
        )
    finally:
        if changes:
            model.set_attn_implementation("sdpa")


def has_dropout(model: Model) -> bool:
    """Is anything dropped out in training, by the base or by an adapter?"""
    return has_dropout_config(text_config(model).to_dict()) or any(
        isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()
    )


def _implementation(model: Model) -> str | None:
    """The name that transformers gives to how the model attends."""
    return getattr(model.config, "_attn_implementation", None)


def _with_added_mask(seen: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """What is added to the scores: 0 where a place is seen, the least number elsewhere."""
    return torch.zeros_like(seen, dtype=precision).masked_fill(~seen, torch.finfo(precision).min)


PADDING_FREE = "within_documents"
"""What transformers calls this way to attend."""

SUPPORTED_MODEL_TYPES = {
    *("cohere", "gemma", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo", "olmo2", "opt"),
    *("phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"),
}
"""Types of models that attend by transformers' interface alone and place tokens as they are told.

Others may not, without an error: Falcon would attend without any mask, doge adds a mask of its own,
Bart and RoBERTa count places by themselves. Each of these is tested (tests/test_documents.py).
"""


@dataclass(frozen=True)
class LengthBucket:
    """Documents of about one length, set below each other, the longest first.

    Attributes:
        places: of each token its place in the row; 0 beyond the end of a document: (tokens,).
        beyond: is a token beyond the end of its document? (tokens, 1)
        hidden: 0 where a place (first) sees another (second), else -inf: (length, length).
    """

    positions: Tensor
    is_padding: Tensor
    hidden: Tensor

    @property
    def length(self) -> int:
        """Tokens of the longest document."""
        return len(self.hidden)


@dataclass(frozen=True)
class PaddingFreeLayout:
    """A row of documents in lots; `back` is the place of each of its tokens among those of all."""

    buckets: list[LengthBucket]
    restore_order: Tensor

    @classmethod
    def of(cls, sizes: Sequence[int], parts: Sequence[Sequence[int]]) -> PaddingFreeLayout:
        """Documents of these sizes; `parts` are the numbers of those that make up each lot."""
        starts = [0, *accumulate(sizes)]
        back = torch.empty(starts[-1], dtype=torch.long)
        lots: list[LengthBucket] = []
        before = 0
        for part in parts:
            length = max(sizes[number] for number in part)
            places = torch.full((len(part), length), -1)
            for line, number in enumerate(part):
                size, first = sizes[number], before + line * length
                places[line, :size] = torch.arange(starts[number], starts[number] + size)
                back[starts[number] : starts[number] + size] = torch.arange(first, first + size)
            before += places.numel()
            flat = places.flatten()
            hidden = torch.full((length, length), -torch.inf).triu(1)
            lots.append(LengthBucket(flat.clamp(min=0), (flat < 0)[:, None], hidden))
        return cls(lots, back)


class _PaddingFreeAttention(torch.autograd.Function):
    """softmax(scale q k' + hidden) v of each document: (heads, tokens, width) of all three.

    A token beyond the end sees what it likes: nobody sees it, and no gradient comes from it.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: PaddingFreeLayout, scale: float
    ) -> Tensor:
        query, kept, outputs = query * scale, [], []
        for lot in layout.buckets:
            q, k, v = (_gather_rows(x, lot) for x in (query, key, value))
            scores = torch.bmm(q, k.mT).add_(lot.hidden.to(q.dtype))
            shares = torch.softmax(scores, -1)
            outputs.append(torch.bmm(shares, v).view(len(value), -1, v.shape[-1]))
            kept += [q, k, v, shares]
        ctx.save_for_backward(*kept)
        ctx.layout, ctx.scale = layout, scale
        return torch.cat(outputs, 1).index_select(1, layout.restore_order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        saved, heads = iter(ctx.saved_tensors), len(gradient)
        parts: list[tuple[Tensor, ...]] = []
        for lot in ctx.layout.buckets:
            q, k, v, shares = (next(saved) for _ in range(4))
            above = gradient.index_select(1, lot.positions).masked_fill_(lot.is_padding, 0.0)
            above = above.view(-1, lot.length, gradient.shape[-1])
            of_scores = torch._softmax_backward_data(
                torch.bmm(above, v.mT), shares, -1, shares.dtype
            )
            of_all = (torch.bmm(of_scores, k), torch.bmm(of_scores.mT, q), shares.mT @ above)
            parts.append(tuple(x.view(heads, -1, x.shape[-1]) for x in of_all))
        query, key, value = (
            torch.cat(of_lots, 1).index_select(1, ctx.layout.restore_order)
            for of_lots in zip(*parts, strict=True)
        )
        return query.mul_(ctx.scale), key, value, None, None


def _gather_rows(tensor: Tensor, lot: LengthBucket) -> Tensor:
    """The tokens of a lot: (heads x documents, length, width)."""
    return tensor.index_select(1, lot.positions).view(-1, lot.length, tensor.shape[-1])


_current_layout: PaddingFreeLayout | None = None


def _padding_free_attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: (1, heads, tokens, width) in, (1, tokens, heads, width) out."""
    assert _current_layout is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Rotated queries are float32 under autocast, which would round them for the product.
    q, k, v = (x[0].to(value.dtype) for x in (query, key, value))
    if len(k) < len(q):
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        output: Tensor = _PaddingFreeAttention.apply(q, k, v, _current_layout, scale)  # type: ignore[no-untyped-call]
    return output.transpose(0, 1)[None].contiguous(), None


AttentionInterface.register(PADDING_FREE, _padding_free_attend)


@contextmanager
def padding_free_attention(model: Model, layout: PaddingFreeLayout) -> Iterator[None]:
    """Within, `model` reads a single row and attends as its layout says.

    The backward pass has to be within as well, as activation checkpointing computes the forward
    pass again.
    """
    global _current_layout
    before, was = _current_layout, model.config._attn_implementation
    model.set_attn_implementation(PADDING_FREE)
    _current_layout = layout
    try:
        yield
    finally:
        _current_layout = before
        model.set_attn_implementation(was)


MATMUL_DECODE = "forgetting-products"


def _matmul_attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """softmax(q k' x scaling + mask) v.

    Args:
        query: (rows, heads, tokens, width); key, value: the same with heads that several share.
        attention_mask: what is seen, (rows, 1, tokens, places).
    """
    if query.shape[2] > 1 or key.dtype != torch.float32 or attention_mask is None:
        attended, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **settings
        )
        return attended, None
    rows, heads, _, width = query.shape
    shared = query.reshape(rows, key.shape[1], -1, width)
    scores = shared @ key.transpose(2, 3)
    scores *= width**-0.5 if scaling is None else scaling
    scores.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).reshape(rows, 1, heads, -1), None


AttentionInterface.register(MATMUL_DECODE, _matmul_attend)
AttentionMaskInterface.register(MATMUL_DECODE, sdpa_mask)


@contextmanager
def matmul_decode_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within, `model` attends so on a CPU.

    PyTorch's kernel is made for many queries: for one at each of 64 rows, with 4 heads of width 64
    and 200 places, one thread takes 2.0 ms, by products 1.4. In half precision the kernel stays,
    which rounds less.
    """
    before = model.config._attn_implementation
    if model.device.type != "cpu" or before != "sdpa":
        yield
        return
    model.set_attn_implementation(MATMUL_DECODE)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
