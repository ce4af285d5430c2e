"""Attention implementations that are faster than PyTorch's kernel in particular cases.

- `eager_if_faster`: plain matrix products for training on short rows on a CPU.
- `padding_free_attention`: attention within documents that are concatenated in one row. All other
  parts of a model process each token independently, so that nothing is computed for padding.
  Attention alone collects documents of similar length and multiplies them as a batch.
- `matmul_decode_attention`: matrix products for a single new token on a CPU.
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
"""Tokens of the longest row for which eager attention is faster (see `make bench-train`)."""


@contextmanager
def eager_if_faster(
    model: Model, mask: torch.Tensor, precision: torch.dtype
) -> Iterator[torch.Tensor]:
    """Train within this context with the faster of eager attention and PyTorch's kernel.

    Both compute softmax(q k' / sqrt(width) + mask) v and differ by rounding. PyTorch's CPU kernel
    does not store the scores, which helps with long rows, but its bfloat16 backward pass is slow
    (16 rows of 105 tokens, one thread: 20 ms, against 4 ms for matrix products). The backward pass
    must also run within this context, because activation checkpointing repeats the forward pass.

    Args:
        model: its attention implementation is changed within this context.
        mask: 1 for tokens and 0 for padding (rows, length), or whether a position attends to
            another (rows, 1, length, length).
        precision: data type of the products.

    Yields:
        The mask to pass to the model.
    """
    is_short = mask.device.type == "cpu" and mask.shape[-1] <= MAX_EAGER_TOKENS
    uses_kernel = attention_implementation(model) == "sdpa"
    use_eager = is_short and precision == torch.bfloat16 and uses_kernel
    if use_eager:
        model.set_attn_implementation("eager")
    try:
        # Eager attention does not accept a boolean mask.
        yield (
            _additive_mask(mask, precision)
            if mask.dtype == torch.bool and attention_implementation(model) == "eager"
            else mask
        )
    finally:
        if use_eager:
            model.set_attn_implementation("sdpa")


def has_dropout(model: Model) -> bool:
    """Return whether the base or an adapter applies dropout in training."""
    return has_dropout_config(text_config(model).to_dict()) or any(
        isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()
    )


def attention_implementation(model: Model) -> str | None:
    """Return transformers' name of the attention implementation of a model."""
    return getattr(model.config, "_attn_implementation", None)


def _additive_mask(visible: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """Return what is added to the scores: 0 for visible positions, the least number for others."""
    minimum = torch.finfo(precision).min
    return torch.zeros_like(visible, dtype=precision).masked_fill(~visible, minimum)


PADDING_FREE = "padding_free"
"""Name of the padding-free attention in transformers' registry."""

SUPPORTED_MODEL_TYPES = {
    *("cohere", "gemma", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo", "olmo2", "opt"),
    *("phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"),
}
"""Model types that attend by transformers' interface alone and use the given positions.

Other types may silently compute something different: Falcon would attend without any mask, doge
adds a mask of its own, Bart and RoBERTa compute positions themselves. Each listed type is tested
(tests/equivalence/test_padding_free.py).
"""


@dataclass(frozen=True)
class LengthBucket:
    """Documents of similar length, padded to a batch, the longest first.

    Attributes:
        positions: position of each token in the row; 0 for padding: (tokens,).
        is_padding: whether a token is padding: (tokens, 1).
        causal_mask: 0 where a position (first) attends to another (second), -inf elsewhere:
            (length, length).
    """

    positions: Tensor
    is_padding: Tensor
    causal_mask: Tensor

    @property
    def length(self) -> int:
        """Tokens of the longest document."""
        return len(self.causal_mask)


@dataclass(frozen=True)
class PaddingFreeLayout:
    """The documents of a row, divided into buckets of similar length.

    Attributes:
        buckets: cover all documents of the row.
        restore_order: index of each token of the row among the tokens of all buckets: (tokens,).
    """

    buckets: list[LengthBucket]
    restore_order: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], groups: Sequence[Sequence[int]]) -> PaddingFreeLayout:
        """Return the layout of documents.

        Args:
            lengths: tokens of each document of the row.
            groups: indices of the documents of each bucket.
        """
        starts = [0, *accumulate(lengths)]
        restore_order = torch.empty(starts[-1], dtype=torch.long)
        buckets: list[LengthBucket] = []
        offset = 0
        for group in groups:
            longest = max(lengths[document] for document in group)
            positions = torch.full((len(group), longest), -1)
            for row, document in enumerate(group):
                start, end = starts[document], starts[document] + lengths[document]
                first = offset + row * longest
                positions[row, : end - start] = torch.arange(start, end)
                restore_order[start:end] = torch.arange(first, first + end - start)
            offset += positions.numel()
            flat = positions.flatten()
            causal_mask = torch.full((longest, longest), -torch.inf).triu(1)
            buckets.append(LengthBucket(flat.clamp(min=0), (flat < 0)[:, None], causal_mask))
        return cls(buckets, restore_order)


class _PaddingFreeAttention(torch.autograd.Function):
    """Compute softmax(scale q k' + causal_mask) v of each document.

    Queries, keys and values are (heads, tokens, width). Padding positions may attend anywhere: no
    other position attends to them and they receive no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: PaddingFreeLayout, scale: float
    ) -> Tensor:
        query, saved, outputs = query * scale, [], []
        for bucket in layout.buckets:
            q, k, v = (_gather_rows(x, bucket) for x in (query, key, value))
            scores = torch.bmm(q, k.mT).add_(bucket.causal_mask.to(q.dtype))
            weights = torch.softmax(scores, -1)
            outputs.append(torch.bmm(weights, v).view(len(value), -1, v.shape[-1]))
            saved += [q, k, v, weights]
        ctx.save_for_backward(*saved)
        ctx.layout, ctx.scale = layout, scale
        return torch.cat(outputs, 1).index_select(1, layout.restore_order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        saved, heads = iter(ctx.saved_tensors), len(gradient)
        gradients: list[tuple[Tensor, ...]] = []
        for bucket in ctx.layout.buckets:
            q, k, v, weights = (next(saved) for _ in range(4))
            dout = gradient.index_select(1, bucket.positions).masked_fill_(bucket.is_padding, 0.0)
            dout = dout.view(-1, bucket.length, gradient.shape[-1])
            dscores = torch._softmax_backward_data(
                torch.bmm(dout, v.mT), weights, -1, weights.dtype
            )
            dqkv = (torch.bmm(dscores, k), torch.bmm(dscores.mT, q), weights.mT @ dout)
            gradients.append(tuple(x.view(heads, -1, x.shape[-1]) for x in dqkv))
        query, key, value = (
            torch.cat(of_buckets, 1).index_select(1, ctx.layout.restore_order)
            for of_buckets in zip(*gradients, strict=True)
        )
        return query.mul_(ctx.scale), key, value, None, None


def _gather_rows(tensor: Tensor, bucket: LengthBucket) -> Tensor:
    """Return the tokens of a bucket: (heads x documents, length, width)."""
    return tensor.index_select(1, bucket.positions).view(-1, bucket.length, tensor.shape[-1])


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
    """Attend through transformers' interface within the documents of `_current_layout`.

    Takes (1, heads, tokens, width) and returns (1, tokens, heads, width).
    """
    assert _current_layout is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Rotated queries are float32 under autocast, which rounds them for the product.
    q, k, v = (x[0].to(value.dtype) for x in (query, key, value))
    if len(k) < len(q):
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        output: Tensor = _PaddingFreeAttention.apply(q, k, v, _current_layout, scale)  # type: ignore[no-untyped-call]
    return output.transpose(0, 1)[None].contiguous(), None


AttentionInterface.register(PADDING_FREE, _padding_free_attend)


@contextmanager
def padding_free_attention(model: Model, layout: PaddingFreeLayout) -> Iterator[None]:
    """Let `model` attend within the documents of a single row that has this layout.

    The backward pass must also run within this context, because activation checkpointing repeats
    the forward pass.
    """
    global _current_layout
    previous_layout, implementation = _current_layout, model.config._attn_implementation
    model.set_attn_implementation(PADDING_FREE)
    _current_layout = layout
    try:
        yield
    finally:
        _current_layout = previous_layout
        model.set_attn_implementation(implementation)


MATMUL_DECODE = "matmul_decode"
"""Name of `matmul_decode_attention` in transformers' registry."""


def _matmul_attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute softmax(q k' x scaling + mask) v for one query per row.

    Other inputs are passed to PyTorch's kernel.

    Args:
        query: (rows, heads, tokens, width).
        key: (rows, key-value heads, positions, width).
        value: like the key.
        attention_mask: whether a query attends to a position, (rows, 1, tokens, positions).
    """
    if query.shape[2] > 1 or key.dtype != torch.float32 or attention_mask is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return output, None
    rows, heads, _, width = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, width)
    scores = grouped @ key.transpose(2, 3)
    scores *= width**-0.5 if scaling is None else scaling
    scores.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).reshape(rows, 1, heads, -1), None


AttentionInterface.register(MATMUL_DECODE, _matmul_attend)
AttentionMaskInterface.register(MATMUL_DECODE, sdpa_mask)


@contextmanager
def matmul_decode_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` decode single tokens on a CPU by matrix products.

    PyTorch's kernel is optimized for many queries. For one query in each of 64 rows, with 4 heads
    of width 64 and 200 positions, it takes 2.0 ms on one thread, matrix products take 1.4 ms. In
    half precision the kernel is kept, because it rounds less.
    """
    implementation = model.config._attn_implementation
    if model.device.type != "cpu" or implementation != "sdpa":
        yield
        return
    model.set_attn_implementation(MATMUL_DECODE)
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
