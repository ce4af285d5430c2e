"""Forward passes: batches of examples, target logits and token log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from forgetting.data.tokenize import Example, concatenate
from forgetting.models.attention import PaddingFreeLayout
from forgetting.models.loading import Model, text_config


@dataclass(frozen=True)
class Batch:
    """Right-padded examples, or a single padding-free row.

    Attributes:
        ids: token ids, (rows, length).
        mask: 1 for tokens and 0 for padding, (rows, length); for packed sequences, whether a
            position (third) attends to another (fourth), (rows, 1, length, length).
        columns: positions whose next token is a target in some row, (width,).
        labels: the next token at those positions, or -100, (rows, width).
        positions: for packed sequences, the position of each token in its document,
            (rows, length).
        layout: for a padding-free row, the layout of its documents.
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
    """Return a batch of examples, padded with token `pad` to the longest of them."""
    length = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), length), pad)
    mask = torch.zeros((len(examples), length), dtype=torch.long)
    labels = torch.full((len(examples), length), -100)
    for row, example in enumerate(examples):
        tokens = len(example.ids)
        ids[row, :tokens] = torch.tensor(example.ids)
        mask[row, :tokens] = 1
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


def block_diagonal_causal_mask(
    lengths: Sequence[Sequence[int]], row_length: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return position ids that restart per document and a block-diagonal causal mask.

    Args:
        lengths: tokens of the documents of each row, in their order.
        row_length: tokens of a row, including padding at its end.
        device: of the returned tensors.

    Returns:
        Position ids, (rows, length), and whether a position (third) attends to another (fourth),
        (rows, 1, length, length). Padding attends to padding, to keep the result finite.
    """
    positions = torch.zeros((len(lengths), row_length), dtype=torch.long)
    document_ids = torch.full((len(lengths), row_length), -1)
    for row, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents):
            positions[row, start : start + length] = torch.arange(length)
            document_ids[row, start : start + length] = number
            start += length
    document_ids = document_ids.to(device)
    causal = torch.ones(row_length, row_length, dtype=torch.bool, device=device).tril()
    mask = (document_ids[:, :, None] == document_ids[:, None, :]) & causal
    return positions.to(device), mask[:, None]


BATCH_OVERHEAD_TOKENS = 256
"""Fixed cost of attention in one more length bucket, in tokens."""


def concatenate_examples(examples: Sequence[Example]) -> Batch:
    """Return a padding-free batch: all documents of the examples in one row.

    The model must read it within `padding_free_attention`.
    """
    row = concatenate(examples)
    layout = PaddingFreeLayout.of(
        row.document_lengths,
        micro_batches(row.document_lengths, len(row.document_starts), BATCH_OVERHEAD_TOKENS),
    )
    ids = torch.tensor([row.ids])
    spans = [torch.arange(begin - 1, end - 1) for begin, end in row.target_spans]
    columns = torch.cat(spans)
    positions = torch.cat([torch.arange(length) for length in row.document_lengths])[None]
    mask = torch.ones_like(ids)
    return Batch(ids, mask, columns, ids[:, columns + 1], positions, layout)


def context_length(model: Model) -> int | None:
    """Return the number of tokens that the model can read, or None if its config has no limit."""
    config = text_config(model)
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return None if limit is None else int(limit)


def token_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """Return log p of each target token given its prefix, 0 elsewhere: (rows, width), in nats."""
    return logprobs_of(target_logits(model, batch), batch)


def target_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits of the next token at the batch's columns: (rows, width, vocabulary).

    They are float32 at least. The LM head runs only at positions that precede a target in some row.
    """
    # Some models accept no positions.
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
    """Return log p of each target token under the logits, 0 elsewhere: (rows, width)."""
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), reduction="none", ignore_index=-100
    )
    return -losses.view_as(batch.labels)


def length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield indices in batches of similar length.

    The longest come first, so that an out-of-memory error occurs at the start.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def micro_batches(lengths: Sequence[int], max_rows: int, overhead: int) -> list[list[int]]:
    """Split a batch into micro-batches of similar length that compute the fewest tokens.

    The split minimizes the sum of rows x longest + overhead over the micro-batches.

    Args:
        lengths: tokens of each example.
        max_rows: limit of the rows of a micro-batch.
        overhead: fixed cost of a forward and backward pass, in tokens.

    Returns:
        The indices of the examples of each micro-batch, longest first.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    # costs[n]: lowest cost of the n longest examples; starts[n]: where their last part starts.
    costs, starts = [0.0], [0]
    for end in range(1, len(order) + 1):
        cost, start = min(
            (costs[start] + (end - start) * lengths[order[start]] + overhead, start)
            for start in range(max(0, end - max_rows), end)
        )
        costs.append(cost)
        starts.append(start)
    parts, end = [], len(order)
    while end:
        parts.append(order[starts[end] : end])
        end = starts[end]
    return parts[::-1]
