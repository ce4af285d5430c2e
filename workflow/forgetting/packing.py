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
        `input_ids`, `position_ids` and `labels` of shape (blocks, block), and a boolean
        `attention_mask` of shape (blocks, 1, block, block): true where a query may look, which is
        backwards within its own document. Labels are shifted already: label t is token t + 1.
    """
    shape = (len(documents), block)
    ids = torch.full(shape, padding)
    labels = torch.full(shape, IGNORED)
    positions = torch.zeros(shape, dtype=torch.long)
    owner = torch.full(shape, -1)
    for row, block_documents in enumerate(documents):
        start = 0
        for number, tokens in enumerate(block_documents):
            end = start + len(tokens)
            ids[row, start:end] = torch.tensor(tokens)
            labels[row, start : end - 1] = torch.tensor(tokens[1:])
            positions[row, start:end] = torch.arange(len(tokens))
            owner[row, start:end] = number
            start = end
    causal = torch.ones(block, block, dtype=torch.bool).tril()
    mask = (owner[:, :, None] == owner[:, None, :]) & causal
    return {
        "input_ids": ids,
        "position_ids": positions,
        "labels": labels,
        "attention_mask": mask[:, None],
    }
