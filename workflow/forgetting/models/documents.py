"""Attention within documents that stand side by side in one row, without padding.

All else in a model treats each token by itself, so that a pass over such a row computes nothing for
padding. Attention alone sets documents of about one length below each other and multiplies them as
a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from forgetting.models.loading import Model

NAME = "within_documents"
"""What transformers calls this way to attend."""

KNOWN = {
    *("cohere", "gemma", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo", "olmo2", "opt"),
    *("phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"),
}
"""Types of models that attend by transformers' interface alone and place tokens as they are told.

Others may not, without an error: Falcon would attend without any mask, doge adds a mask of its own,
Bart and RoBERTa count places by themselves. Each of these is tested (tests/test_documents.py).
"""


@dataclass(frozen=True)
class Lot:
    """Documents of about one length, set below each other, the longest first.

    Attributes:
        places: of each token its place in the row; 0 beyond the end of a document: (tokens,).
        beyond: is a token beyond the end of its document? (tokens, 1)
        hidden: 0 where a place (first) sees another (second), else -inf: (length, length).
    """

    places: Tensor
    beyond: Tensor
    hidden: Tensor

    @property
    def length(self) -> int:
        """Tokens of the longest document."""
        return len(self.hidden)


@dataclass(frozen=True)
class Layout:
    """A row of documents in lots; `back` is the place of each of its tokens among those of all."""

    lots: list[Lot]
    back: Tensor

    @classmethod
    def of(cls, sizes: Sequence[int], parts: Sequence[Sequence[int]]) -> Layout:
        """Documents of these sizes; `parts` are the numbers of those that make up each lot."""
        starts = [0, *accumulate(sizes)]
        back = torch.empty(starts[-1], dtype=torch.long)
        lots: list[Lot] = []
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
            lots.append(Lot(flat.clamp(min=0), (flat < 0)[:, None], hidden))
        return cls(lots, back)


class _Attention(torch.autograd.Function):
    """softmax(scale q k' + hidden) v of each document: (heads, tokens, width) of all three.

    A token beyond the end sees what it likes: nobody sees it, and no gradient comes from it.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float
    ) -> Tensor:
        query, kept, outputs = query * scale, [], []
        for lot in layout.lots:
            q, k, v = (_gather(x, lot) for x in (query, key, value))
            scores = torch.bmm(q, k.mT).add_(lot.hidden.to(q.dtype))
            shares = torch.softmax(scores, -1)
            outputs.append(torch.bmm(shares, v).view(len(value), -1, v.shape[-1]))
            kept += [q, k, v, shares]
        ctx.save_for_backward(*kept)
        ctx.layout, ctx.scale = layout, scale
        return torch.cat(outputs, 1).index_select(1, layout.back)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        saved, heads = iter(ctx.saved_tensors), len(gradient)
        parts: list[tuple[Tensor, ...]] = []
        for lot in ctx.layout.lots:
            q, k, v, shares = (next(saved) for _ in range(4))
            above = gradient.index_select(1, lot.places).masked_fill_(lot.beyond, 0.0)
            above = above.view(-1, lot.length, gradient.shape[-1])
            of_scores = torch._softmax_backward_data(
                torch.bmm(above, v.mT), shares, -1, shares.dtype
            )
            of_all = (torch.bmm(of_scores, k), torch.bmm(of_scores.mT, q), shares.mT @ above)
            parts.append(tuple(x.view(heads, -1, x.shape[-1]) for x in of_all))
        query, key, value = (
            torch.cat(of_lots, 1).index_select(1, ctx.layout.back)
            for of_lots in zip(*parts, strict=True)
        )
        return query.mul_(ctx.scale), key, value, None, None


def _gather(tensor: Tensor, lot: Lot) -> Tensor:
    """The tokens of a lot: (heads x documents, length, width)."""
    return tensor.index_select(1, lot.places).view(-1, lot.length, tensor.shape[-1])


_layout: Layout | None = None


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: (1, heads, tokens, width) in, (1, tokens, heads, width) out."""
    assert _layout is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Rotated queries are float32 under autocast, which would round them for the product.
    q, k, v = (x[0].to(value.dtype) for x in (query, key, value))
    if len(k) < len(q):
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        output: Tensor = _Attention.apply(q, k, v, _layout, scale)  # type: ignore[no-untyped-call]
    return output.transpose(0, 1)[None].contiguous(), None


AttentionInterface.register(NAME, _attend)


@contextmanager
def within_documents(model: Model, layout: Layout) -> Iterator[None]:
    """Within, `model` reads a single row and attends as its layout says.

    The backward pass has to be within as well, as activation checkpointing computes the forward
    pass again.
    """
    global _layout
    before, was = _layout, model.config._attn_implementation
    model.set_attn_implementation(NAME)
    _layout = layout
    try:
        yield
    finally:
        _layout = before
        model.set_attn_implementation(was)
