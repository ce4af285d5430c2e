"""The one place where a model computes log-probabilities of target tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from forgetting.encode import Example


@dataclass(frozen=True)
class Batch:
    """Right-padded examples.

    Attributes:
        ids: token ids, (rows, length).
        mask: 1 where there is a token, (rows, length).
        columns: positions whose next token is a target in some row, (width,).
        labels: the next token at those positions, or -100, (rows, width).
    """

    ids: Tensor
    mask: Tensor
    columns: Tensor
    labels: Tensor

    @property
    def targets(self) -> int:
        """Number of target tokens."""
        return int((self.labels != -100).sum())

    @property
    def tokens(self) -> int:
        """Number of tokens that are not padding."""
        return int(self.mask.sum())


def collate(examples: Sequence[Example], pad: int, device: torch.device | str = "cpu") -> Batch:
    """Pad examples to the longest of them and find what is predicted where."""
    length = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), length), pad)
    mask = torch.zeros((len(examples), length), dtype=torch.long)
    labels = torch.full((len(examples), length), -100)
    for row, example in enumerate(examples):
        size = len(example.ids)
        ids[row, :size] = torch.tensor(example.ids)
        mask[row, :size] = 1
        labels[row, example.prompt - 1 : size - 1] = ids[row, example.prompt : size]
    columns = (labels != -100).any(dim=0).nonzero().flatten()
    return Batch(ids.to(device), mask.to(device), columns.to(device), labels[:, columns].to(device))


def token_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """log p of each target token given all before it, 0 elsewhere: (rows, width), float32 nats."""
    return logprobs_of(target_logits(model, batch), batch)


def target_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of the next token at the batch's columns: (rows, width, vocabulary), float32.

    The LM head runs only at positions where something is predicted in some row.
    """
    logits: Tensor = model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        logits_to_keep=batch.columns,
        use_cache=False,
    ).logits
    return logits.float()


def logprobs_of(logits: Tensor, batch: Batch) -> Tensor:
    """log p of each target token under the logits at its column, 0 elsewhere: (rows, width)."""
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), reduction="none", ignore_index=-100
    )
    return -losses.view_as(batch.labels)


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
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
