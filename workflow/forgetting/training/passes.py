"""How a forward and backward pass reads its examples: padded, or side by side in one row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from forgetting.encoding.encode import Example
from forgetting.models.attention import LONGEST, has_dropout, quick_attention
from forgetting.models.documents import within_documents
from forgetting.models.loading import Model
from forgetting.scoring.forward import Batch, collate, side_by_side
from forgetting.scoring.shared import can_share


def needs_no_padding(model: Model, examples: Sequence[Example]) -> bool:
    """May these examples stand side by side in the row of a pass, and is that quicker?

    It is on a CPU, where of TOFU's pairs, 32 to a step in passes of like length, a fifth of the
    tokens would be padding, and a third of the places at which something is predicted; unless a
    document is so long that its scores are better never held. A GPU was not measured.
    """
    return (
        model.device.type == "cpu"
        and can_share(model)
        and not has_dropout(model)
        and all(size <= LONGEST for example in examples for size in example.sizes)
    )


def lay_out(examples: Sequence[Example], pad: int, padded: bool, device: torch.device) -> Batch:
    """The batch of a pass."""
    return collate(examples, pad, device) if padded else side_by_side(examples)


@contextmanager
def attending(model: Model, batch: Batch, precision: torch.dtype) -> Iterator[Batch]:
    """Within, `model` attends as the batch is laid out; yields the batch to give it.

    The backward pass has to be within as well.
    """
    if batch.layout:
        with within_documents(model, batch.layout):
            yield batch
    else:
        with quick_attention(model, batch.mask, precision) as mask:
            yield replace(batch, mask=mask)
