"""What a run is trained on: its examples, one by one or several packed to a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from forgetting.encode import Example, join
from forgetting.models import Model
from forgetting.packing import pack
from forgetting.records import InputError
from forgetting.shared import can_share
from forgetting.study import Training


class Packed(Sequence[Example]):
    """Several examples to a sequence, joined when they are read."""

    def __init__(self, examples: Sequence[Example], packs: Sequence[Sequence[int]]) -> None:
        self.examples, self.packs = examples, packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        return join([self.examples[place] for place in self.packs[index]])


def arrange(examples: Sequence[Example], training: Training) -> Sequence[Example]:
    """The sequences of which a batch has `batch_size`: the examples, or, if asked, packs of them.

    The packs are the same for all runs, whose steps are then the same too; which of them share a
    batch is drawn anew for every epoch, as without packing. The examples are mixed before they are
    packed, since neighbours in a table are often alike.
    """
    if not training.packing or not examples:
        return examples
    sizes = [len(example.ids) for example in examples]
    order = shuffled(len(examples), seed=0).tolist()
    return Packed(examples, pack(sizes, training.max_length, order))


# An epoch's order is drawn once: for millions of examples it takes longer than a step.
@lru_cache(maxsize=4)
def shuffled(count: int, seed: int) -> torch.Tensor:
    """The numbers below `count` in an order that depends on the seed alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def check_packing(model: Model, training: Training) -> None:
    """Refuse to pack for a model in which one example would leak into the next."""
    if training.packing and not can_share(model):
        raise InputError(
            f"training.packing: in this model ({model.config.model_type}) the attention mask alone "
            "does not decide what a token sees, so that packed examples would not be apart; set "
            "packing: false"
        )
