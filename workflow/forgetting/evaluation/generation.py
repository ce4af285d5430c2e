"""Greedy answers to many questions: each leaves as soon as it ends, and another takes its place.

A cache of keys and values with a slot for each answer in work.

transformers' own cache copies all that it holds at every token, and its rows end together. Here a
token's keys and values are written behind those of its own answer, wherever that ends: a new prompt
can take the slot of an answer that is over.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer

from forgetting.evaluation.prefix_tree import supports_custom_mask
from forgetting.models.attention import matmul_decode_attention
from forgetting.models.forward import length_batches
from forgetting.models.loading import Model, eos_tokens, unwrap_peft

GROWTH_FACTOR = 32
"""Places that slots grow by: at each of them all that they hold is copied."""


def all_full_attention(cache: DynamicCache) -> bool:
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
        self.keys = _empty_cache(like.keys, slots, 0)
        self.values = _empty_cache(like.values, slots, 0)
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
            new = _empty_cache(old, len(old), places)
            new[:, :, :kept] = old[:, :, :kept]
            setattr(self, name, new)


def _empty_cache(like: Tensor, slots: int, places: int) -> Tensor:
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
        places = -(-least // GROWTH_FACTOR) * GROWTH_FACTOR
        if places != self.places:
            for layer in self.layers:
                layer.resize(places)


REFILL = 0.25
"""The share of the slots that are free when new prompts are read."""


def stop_tokens(model: Model, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens at which answers end: those of the model's author and the tokenizer's.

    They are the same for a base and for all that is tuned from it.
    """
    return frozenset(
        [tokenizer.eos_token_id, *eos_tokens(unwrap_peft(model).generation_config.eos_token_id)]
    )


@torch.inference_mode()
def generate_greedy(
    model: Model,
    prompts: Sequence[Sequence[int]],
    most: int,
    batch_size: int,
    ends: Collection[int],
    pad: int,
) -> list[list[int]]:
    """The likeliest next token again and again, up to one of `ends`, which is left out.

    An answer has at most `most` tokens.

    `batch_size` of them are worked on at a time, longest prompts first, so that memory runs out at
    once.
    """
    if supports_refill(model):
        with matmul_decode_attention(unwrap_peft(model)):
            return _decode_with_refill(model, prompts, most, batch_size, ends, pad)
    decode = _decode if can_drop_rows(model) else _generate
    answers: list[list[int]] = [[] for _ in prompts]
    for indices in length_batches([len(prompt) for prompt in prompts], batch_size):
        ids, mask = left_padded([prompts[index] for index in indices], pad)
        found = decode(model, ids.to(model.device), mask.to(model.device), most, ends)
        for index, tokens in zip(indices, found, strict=True):
            answers[index] = tokens
    return answers


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Prompts as rows that end together, and a mask of what belongs to them."""
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids, mask


def next_logits(model: Model, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """Logits of the token after each row, whose earlier tokens are in the cache."""
    logits: Tensor = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    return logits[:, -1]


def can_drop_rows(model: Model) -> bool:
    """Is all that a row remembers in a cache of keys and values, by positions that we may give?"""
    inner = unwrap_peft(model)
    return (
        not getattr(inner, "_is_stateful", False)
        and "position_ids" in inspect.signature(inner.forward).parameters
    )


def supports_refill(model: Model) -> bool:
    """May a new prompt take the place of an answer that has ended, at another length?"""
    inner = unwrap_peft(model)
    return (
        can_drop_rows(model)
        and supports_custom_mask(inner)
        and all_full_attention(DynamicCache(config=inner.config))
    )


def _decode_with_refill(
    model: Model,
    prompts: Sequence[Sequence[int]],
    most: int,
    slots: int,
    ends: Collection[int],
    pad: int,
) -> list[list[int]]:
    """Answers that have ended leave their slots to new prompts, read several at once."""
    answers: list[list[int]] = [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    slots = min(slots, len(prompts))
    cache = SlotCache(slots)
    rows: list[int] = []
    tokens: list[int] = []
    while rows or waiting:
        if waiting and slots - len(rows) >= slots * REFILL:
            new, waiting = waiting[: slots - len(rows)], waiting[slots - len(rows) :]
            tokens += _read_prompts(model, [prompts[index] for index in new], cache, len(rows), pad)
            rows += new
        for index, token in zip(rows, tokens, strict=True):
            answers[index].append(token)
        kept = [
            slot
            for slot, index in enumerate(rows)
            if tokens[slot] not in ends and len(answers[index]) < most
        ]
        order = cache.close_up(kept)
        rows, tokens = [rows[slot] for slot in order], [tokens[slot] for slot in order]
        if rows:
            lengths = [len(prompts[index]) + len(answers[index]) - 1 for index in rows]
            tokens = _step(model, tokens, cache, lengths)
    return [answer[:-1] if answer[-1] in ends else answer for answer in answers]


def _read_prompts(
    model: Model, prompts: Sequence[Sequence[int]], cache: SlotCache, first: int, pad: int
) -> list[int]:
    """Read prompts into the slots from `first` on; the token after each."""
    ids, mask = (part.to(model.device) for part in left_padded(prompts, pad))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    read = DynamicCache(config=unwrap_peft(model).config)
    tokens: list[int] = next_logits(model, ids, mask, positions, read).argmax(-1).tolist()
    cache.fill(first, read, [len(prompt) for prompt in prompts])
    return tokens


def _step(model: Model, tokens: list[int], cache: SlotCache, lengths: list[int]) -> list[int]:
    """The token after each answer, whose newest one is not in the cache yet."""
    positions = cache.expect(lengths)
    ids = torch.tensor(tokens, device=positions.device)[:, None]
    seen = torch.arange(cache.places, device=positions.device) <= positions
    logits = next_logits(model, ids, seen[:, None, None], positions, cache)
    found: list[int] = logits.argmax(-1).tolist()
    return found


def _decode(
    model: Model, ids: Tensor, mask: Tensor, most: int, ends: Collection[int]
) -> list[list[int]]:
    """Rows that have ended are taken out of the batch and the cache: nothing is computed for them.

    `generate` computes every row until the last one ends, which for short answers beside one that
    never ends is most of its time.
    """
    answers: list[list[int]] = [[] for _ in ids]
    rows = list(range(len(ids)))
    cache = DynamicCache(config=unwrap_peft(model).config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    stops = torch.tensor(sorted(ends), device=ids.device)
    for _ in range(most):
        tokens = next_logits(model, ids, mask, positions, cache).argmax(-1)
        going_on = torch.isin(tokens, stops, invert=True).nonzero().flatten()
        if len(going_on) == 0:
            break
        if len(going_on) < len(rows):
            cache.batch_select_indices(going_on)
            rows = [rows[place] for place in going_on.tolist()]
            tokens, mask, positions = tokens[going_on], mask[going_on], positions[going_on]
        for row, token in zip(rows, tokens.tolist(), strict=True):
            answers[row].append(token)
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return answers


def _generate(
    model: Model, ids: Tensor, mask: Tensor, most: int, ends: Collection[int]
) -> list[list[int]]:
    """The same with transformers' `generate`, for models that keep more than keys and values."""
    stops = sorted(ends)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=most, eos_token_id=stops, pad_token_id=stops[0]
    )
    with _select_rows(unwrap_peft(model), config):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            # Processes that train together generate each at its own pace.
            synced_gpus=False,
        )
    found = output[:, ids.shape[1] :].tolist()
    return [list(takewhile(lambda token: token not in ends, tokens)) for tokens in found]


@contextmanager
def _select_rows(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Set aside what the model's folder advises (penalties, beams, least lengths).

    `generate` fills in from there whatever `config` leaves open.
    """
    advice, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = advice
