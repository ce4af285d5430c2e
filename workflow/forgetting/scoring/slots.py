"""A cache of keys and values with a slot for each answer in work.

transformers' own cache copies all that it holds at every token, and its rows end together. Here a
token's keys and values are written behind those of its own answer, wherever that ends: a new prompt
can take the slot of an answer that is over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

GROWTH = 32
"""Places that slots grow by: at each of them all that they hold is copied."""


def all_plain(cache: DynamicCache) -> bool:
    """Does every layer keep the keys and values of all tokens, and nothing else?"""
    if cache.layers:
        return all(type(layer) is DynamicLayer for layer in cache.layers)
    return cache.layer_class_to_replicate is DynamicLayer


class SlotLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's slots, the first of which are in use.

    Attributes:
        keys, values: (slots, heads, places, width of a head).
        rows, columns: the slots in use, and the place of the next token of each.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, slots: int, like: DynamicLayer) -> None:
        super().__init__()
        self.keys = _empty(like.keys, slots, 0)
        self.values = _empty(like.values, slots, 0)
        self.is_initialized = True

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the next token of each answer; what there is of all of them, without a copy.

        Under autocast, values may be narrower than keys; they are kept as wide, as transformers'
        cache keeps them.
        """
        self.keys[self.rows, :, self.columns] = keys[:, :, 0].to(self.keys.dtype)
        self.values[self.rows, :, self.columns] = values[:, :, 0].to(self.values.dtype)
        return self.keys[: len(self.rows)], self.values[: len(self.rows)]

    def get_seq_length(self) -> int:
        """Places but that of the next token."""
        return int(self.keys.shape[2]) - 1

    def resize(self, places: int) -> None:
        """Lengthen or shorten the slots."""
        kept = min(places, self.keys.shape[2])
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = _empty(old, len(old), places)
            new[:, :, :kept] = old[:, :, :kept]
            setattr(self, name, new)


def _empty(like: Tensor, slots: int, places: int) -> Tensor:
    """What is not seen counts with weight 0, which takes a number."""
    return like.new_zeros(slots, like.shape[1], places, like.shape[3])


class SlotCache(Cache):  # type: ignore[misc]
    """Slots in every layer, made when the first prompts have been read."""

    layers: list[SlotLayer]

    def __init__(self, slots: int) -> None:
        super().__init__(layers=[])
        self.slots = slots

    @property
    def places(self) -> int:
        """Length of every slot."""
        return int(self.layers[0].keys.shape[2])

    def fill(self, first: int, cache: DynamicCache, lengths: list[int]) -> None:
        """Copy prompts, which were read padded on the left, into the slots from `first` on."""
        if not self.layers:
            self.layers = [SlotLayer(self.slots, layer) for layer in cache.layers]
        self._resize(max(self.places, max(lengths)))
        for mine, read in zip(self.layers, cache.layers, strict=True):
            for row, length in enumerate(lengths):
                mine.keys[first + row, :, :length] = read.keys[row, :, -length:]
                mine.values[first + row, :, :length] = read.values[row, :, -length:]

    def close_up(self, kept: list[int]) -> list[int]:
        """Let the first slots hold what is kept; which slot held before what each holds now.

        The last ones move into the slots of those that have ended.
        """
        still = set(kept)
        gone = [slot for slot in range(len(kept)) if slot not in still]
        moved = kept[len(kept) - len(gone) :]
        if gone:
            for layer in self.layers:
                layer.keys[gone], layer.values[gone] = layer.keys[moved], layer.values[moved]
        sources = dict(zip(gone, moved, strict=True))
        return [sources.get(slot, slot) for slot in range(len(kept))]

    def expect(self, lengths: list[int]) -> Tensor:
        """Make room for the next token of each row, which has so many; its column, (rows, 1)."""
        self._resize(max(lengths) + 1)
        device = self.layers[0].keys.device
        columns = torch.tensor(lengths, device=device)
        rows = torch.arange(len(lengths), device=device)
        for layer in self.layers:
            layer.rows, layer.columns = rows, columns
        return columns[:, None]

    def _resize(self, least: int) -> None:
        places = -(-least // GROWTH) * GROWTH
        if places != self.places:
            for layer in self.layers:
                layer.resize(places)
