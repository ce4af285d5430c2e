"""The one place where a model computes log-probabilities of target tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from forgetting.data.packing import block_diagonal_causal_mask
from forgetting.data.tokenize import Example, concatenate
from forgetting.models.attention import PaddingFreeLayout
from forgetting.models.loading import Model, text_config


@dataclass(frozen=True)
class Batch:
    """Right-padded examples, packed ones among them or not.

    Attributes:
        ids: token ids, (rows, length).
        mask: 1 where there is a token, (rows, length); of packed examples, whether a place (third)
            sees another (fourth), (rows, 1, length, length).
        columns: positions whose next token is a target in some row, (width,).
        labels: the next token at those positions, or -100, (rows, width).
        positions: of packed examples, the place of each token in its document, (rows, length).
        layout: of a single row without padding, how its documents attend.
    """

    ids: Tensor
    mask: Tensor
    columns: Tensor
    labels: Tensor
    positions: Tensor | None = None
    layout: PaddingFreeLayout | None = None

    @property
    def targets(self) -> int:
        """Number of target tokens."""
        return int((self.labels != -100).sum())


def collate(examples: Sequence[Example], pad: int, device: torch.device | str = "cpu") -> Batch:
    """Pad examples to the longest of them, and find what is predicted where and what sees what."""
    length = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), length), pad)
    mask = torch.zeros((len(examples), length), dtype=torch.long)
    labels = torch.full((len(examples), length), -100)
    for row, example in enumerate(examples):
        size = len(example.ids)
        ids[row, :size] = torch.tensor(example.ids)
        mask[row, :size] = 1
        for begin, end in example.target_spans:
            labels[row, begin - 1 : end - 1] = ids[row, begin:end]
    columns = (labels != -100).any(dim=0).nonzero().flatten()
    positions = None
    if any(len(example.document_starts) > 1 for example in examples):
        positions, mask = block_diagonal_causal_mask(
            [e.document_lengths for e in examples], length, device
        )
    labels = labels[:, columns]
    return Batch(ids.to(device), mask.to(device), columns.to(device), labels.to(device), positions)


BATCH_OVERHEAD_TOKENS = 256
"""What it costs to attend in one lot of documents more, beside their tokens, in tokens."""


def concatenate_examples(examples: Sequence[Example]) -> Batch:
    """All documents of examples in one row without padding, to be read `within_documents`."""
    row = concatenate(examples)
    layout = PaddingFreeLayout.of(
        row.document_lengths,
        micro_batches(row.document_lengths, len(row.document_starts), BATCH_OVERHEAD_TOKENS),
    )
    ids = torch.tensor([row.ids])
    spans = [torch.arange(begin - 1, end - 1) for begin, end in row.target_spans]
    columns = torch.cat(spans)
    positions = torch.cat([torch.arange(size) for size in row.document_lengths])[None]
    mask = torch.ones_like(ids)
    return Batch(ids, mask, columns, ids[:, columns + 1], positions, layout)


def context_length(model: Model) -> int | None:
    """Number of tokens that the model can read, where it says so."""
    config = text_config(model)
    room = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return None if room is None else int(room)


def token_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """log p of each target token given all before it, 0 elsewhere: (rows, width), float32 nats."""
    return logprobs_of(target_logits(model, batch), batch)


def target_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of the next token at the batch's columns: (rows, width, vocabulary), float32 at least.

    The LM head runs only at positions where something is predicted in some row.
    """
    # Models that know no positions are not given any.
    positions = {} if batch.positions is None else {"position_ids": batch.positions}
    logits: Tensor = model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        logits_to_keep=batch.columns,
        use_cache=False,
        **positions,
    ).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def logprobs_of(logits: Tensor, batch: Batch) -> Tensor:
    """log p of each target token under the logits at its column, 0 elsewhere: (rows, width)."""
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), reduction="none", ignore_index=-100
    )
    return -losses.view_as(batch.labels)


def length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, so that memory runs out at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def micro_batches(lengths: Sequence[int], most: int, overhead: int) -> list[list[int]]:
    """Indices of a batch in parts of similar length, longest first, so that least is computed.

    Minimizes the sum over parts of rows x longest + overhead, where a part has at most `most` rows.

    Args:
        lengths: tokens of each example.
        most: rows of the largest part.
        overhead: what a forward and backward pass costs beside its tokens, in tokens.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    cost, begin = [0.0], [0]
    for end in range(1, len(order) + 1):
        options = [
            (cost[start] + (end - start) * lengths[order[start]] + overhead, start)
            for start in range(max(0, end - most), end)
        ]
        best, start = min(options)
        cost.append(best)
        begin.append(start)
    parts, end = [], len(order)
    while end:
        parts.append(order[begin[end] : end])
        end = begin[end]
    return parts[::-1]
