"""Documents packed whole into blocks of fixed length, each one blind to the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# A document is tried in the newest blocks only: older ones are nearly full.
MAX_OPEN_BINS = 64


def bin_pack(lengths: Sequence[int], block: int, order: Sequence[int]) -> list[list[int]]:
    """Fill blocks with whole documents, first fit, and return the documents of each block.

    Args:
        lengths: tokens of each document, none above `block`.
        block: tokens that a block holds.
        order: the documents in the order in which they are placed.
    """
    blocks: list[list[int]] = []
    room: list[int] = []
    for document in order:
        start = max(0, len(blocks) - MAX_OPEN_BINS)
        for place in range(start, len(blocks)):
            if room[place] >= lengths[document]:
                break
        else:
            place = len(blocks)
            blocks.append([])
            room.append(block)
        blocks[place].append(document)
        room[place] -= lengths[document]
    return blocks


def block_diagonal_causal_mask(
    sizes: Sequence[Sequence[int]], length: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and mask that make each document of a row what it is alone.

    Args:
        sizes: tokens of the documents of each row, in their order.
        length: places of a row; those that are left over are padding.

    Returns:
        Positions that start anew with every document, (rows, length), and which place (third) sees
        which (fourth), (rows, 1, length, length): backwards within the same document. Padding sees
        padding, to stay finite.
    """
    positions = torch.zeros((len(sizes), length), dtype=torch.long)
    owner = torch.full((len(sizes), length), -1)
    for row, documents in enumerate(sizes):
        start = 0
        for number, size in enumerate(documents):
            positions[row, start : start + size] = torch.arange(size)
            owner[row, start : start + size] = number
            start += size
    owner = owner.to(device)
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask = (owner[:, :, None] == owner[:, None, :]) & causal
    return positions.to(device), mask[:, None]
