"""Documents packed whole into blocks of fixed length, each one blind to the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

IGNORED = -100
# A document is tried in the newest blocks only: older ones are nearly full.
OPEN_BLOCKS = 64


def pack(lengths: Sequence[int], block: int, order: Sequence[int]) -> list[list[int]]:
    """Fill blocks with whole documents, first fit, and return the documents of each block.

    Args:
        lengths: tokens of each document, none above `block`.
        block: tokens that a block holds.
        order: the documents in the order in which they are placed.
    """
    blocks: list[list[int]] = []
    room: list[int] = []
    for document in order:
        start = max(0, len(blocks) - OPEN_BLOCKS)
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


def collate(
    documents: Sequence[Sequence[Sequence[int]]], block: int, padding: int
) -> dict[str, torch.Tensor]:
    """A batch from the token ids of the documents of each block.

    Returns:
        `input_ids`, `position_ids` and `labels` of shape (blocks, block), and the
        `attention_mask` of `keep_apart`. Labels are shifted already: label t is token t + 1.
    """
    shape = (len(documents), block)
    ids = torch.full(shape, padding)
    labels = torch.full(shape, IGNORED)
    for row, block_documents in enumerate(documents):
        start = 0
        for tokens in block_documents:
            end = start + len(tokens)
            ids[row, start:end] = torch.tensor(tokens)
            labels[row, start : end - 1] = torch.tensor(tokens[1:])
            start = end
    sizes = [[len(tokens) for tokens in block_documents] for block_documents in documents]
    positions, mask = keep_apart(sizes, block)
    return {
        "input_ids": ids,
        "position_ids": positions,
        "labels": labels,
        "attention_mask": mask,
    }


def keep_apart(
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
