"""Pack whole documents into blocks of fixed length, with a mask that keeps them independent."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Only the newest blocks are tried, because older ones are nearly full.
MAX_OPEN_BINS = 64


def bin_pack(lengths: Sequence[int], block: int, order: Sequence[int]) -> list[list[int]]:
    """Fill blocks with whole documents, first fit, and return the documents of each block.

    Args:
        lengths: tokens of each document, none above `block`.
        block: tokens that a block holds.
        order: the documents in the order in which they are packed.
    """
    blocks: list[list[int]] = []
    free: list[int] = []
    for document in order:
        oldest_open = max(0, len(blocks) - MAX_OPEN_BINS)
        for index in range(oldest_open, len(blocks)):
            if free[index] >= lengths[document]:
                break
        else:
            index = len(blocks)
            blocks.append([])
            free.append(block)
        blocks[index].append(document)
        free[index] -= lengths[document]
    return blocks


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
