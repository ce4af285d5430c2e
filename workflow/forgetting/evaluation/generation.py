"""Generate greedily with a cache of key-value slots that new prompts refill.

transformers' cache copies all its content at every token, and its rows end together. Here the keys
and values of a token follow those of its own answer. An answer that ends frees its slot, and a new
prompt of another length can take it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
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

GROWTH_STEP = 32
"""Positions that slots grow by; each growth copies their content."""


def all_full_attention(cache: DynamicCache) -> bool:
    """Return whether every layer keeps exactly the keys and values of all tokens."""
    if cache.layers:
        return all(type(layer) is DynamicLayer for layer in cache.layers)
    return cache.layer_class_to_replicate is DynamicLayer


class SlotLayer(DynamicLayer):  # type: ignore[misc]
    """The slots of one layer; the first slots are in use.

    Attributes:
        keys, values: (slots, heads, positions, head width).
        rows: indices of the slots in use, (rows,).
        columns: position of the next token of each slot in use, (rows,).
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, slots: int, like: DynamicLayer) -> None:
        super().__init__()
        self.keys = _empty_cache(like.keys, slots, 0)
        self.values = _empty_cache(like.values, slots, 0)
        self.is_initialized = True

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the next token of each answer and return views of the slots in use.

        Under autocast, values may have a narrower type than keys. The cache widens them, as
        transformers' does.
        """
        self.keys[self.rows, :, self.columns] = keys[:, :, 0].to(self.keys.dtype)
        self.values[self.rows, :, self.columns] = values[:, :, 0].to(self.values.dtype)
        return self.keys[: len(self.rows)], self.values[: len(self.rows)]

    def get_seq_length(self) -> int:
        """Return the number of positions before the next token."""
        return int(self.keys.shape[2]) - 1

    def resize(self, length: int) -> None:
        """Lengthen or shorten the slots to this number of positions."""
        kept = min(length, self.keys.shape[2])
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = _empty_cache(old, len(old), length)
            new[:, :, :kept] = old[:, :, :kept]
            setattr(self, name, new)


def _empty_cache(like: Tensor, slots: int, length: int) -> Tensor:
    """Return zeros: masked positions have weight 0, and 0 * NaN would be NaN."""
    return like.new_zeros(slots, like.shape[1], length, like.shape[3])


class SlotCache(Cache):  # type: ignore[misc]
    """A cache of slots in every layer, which are allocated when the first prompts fill them."""

    layers: list[SlotLayer]

    def __init__(self, slots: int) -> None:
        super().__init__(layers=[])
        self.slots = slots

    @property
    def length(self) -> int:
        """Return the number of positions of every slot."""
        return int(self.layers[0].keys.shape[2])

    def fill(self, first: int, cache: DynamicCache, lengths: list[int]) -> None:
        """Copy left-padded prompts into the slots from `first` on.

        Args:
            first: the first slot to fill.
            cache: keys and values of the prompts.
            lengths: tokens of each prompt.
        """
        if not self.layers:
            self.layers = [SlotLayer(self.slots, layer) for layer in cache.layers]
        self._resize(max(self.length, max(lengths)))
        for layer, source in zip(self.layers, cache.layers, strict=True):
            for row, length in enumerate(lengths):
                layer.keys[first + row, :, :length] = source.keys[row, :, -length:]
                layer.values[first + row, :, :length] = source.values[row, :, -length:]

    def compact(self, kept: list[int]) -> list[int]:
        """Move the last kept slots into freed ones, so that the first slots hold all that is kept.

        Args:
            kept: the slots to keep, ascending.

        Returns:
            For each of the first slots, the slot that held its content before.
        """
        kept_set = set(kept)
        free = [slot for slot in range(len(kept)) if slot not in kept_set]
        moved = kept[len(kept) - len(free) :]
        if free:
            for layer in self.layers:
                layer.keys[free], layer.values[free] = layer.keys[moved], layer.values[moved]
        sources = dict(zip(free, moved, strict=True))
        return [sources.get(slot, slot) for slot in range(len(kept))]

    def reserve_next(self, lengths: list[int]) -> Tensor:
        """Reserve the position of the next token of each row and return it, (rows, 1).

        Args:
            lengths: number of cached tokens of each row.
        """
        self._resize(max(lengths) + 1)
        device = self.layers[0].keys.device
        columns = torch.tensor(lengths, device=device)
        rows = torch.arange(len(lengths), device=device)
        for layer in self.layers:
            layer.rows, layer.columns = rows, columns
        return columns[:, None]

    def _resize(self, min_length: int) -> None:
        length = -(-min_length // GROWTH_STEP) * GROWTH_STEP
        if length != self.length:
            for layer in self.layers:
                layer.resize(length)


REFILL_FRACTION = 0.25
"""New prompts are read once this fraction of the slots is free."""


def stop_tokens(model: Model, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of tokens that end answers: the model's and the tokenizer's.

    A base and the models tuned from it have the same.
    """
    return frozenset(
        [tokenizer.eos_token_id, *eos_tokens(unwrap_peft(model).generation_config.eos_token_id)]
    )


@torch.inference_mode()
def generate_greedy(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    stops: Collection[int],
    pad: int,
) -> list[list[int]]:
    """Generate an answer to each prompt greedily.

    Longest prompts come first, so that an out-of-memory error occurs at once.

    Args:
        model: the model.
        prompts: token ids.
        max_new_tokens: tokens of the longest answer.
        batch_size: answers per forward pass.
        stops: ids of tokens that end an answer.
        pad: id of the padding token.

    Returns:
        Token ids of each answer, without the stop token.
    """
    if supports_refill(model):
        with matmul_decode_attention(unwrap_peft(model)):
            return _decode_with_refill(model, prompts, max_new_tokens, batch_size, stops, pad)
    decode_batch = _decode_greedily if can_drop_rows(model) else _generate
    answers: list[list[int]] = [[] for _ in prompts]
    for indices in length_batches([len(prompt) for prompt in prompts], batch_size):
        ids, mask = left_padded([prompts[index] for index in indices], pad)
        ids, mask = ids.to(model.device), mask.to(model.device)
        decoded = decode_batch(model, ids, mask, max_new_tokens, stops)
        for index, tokens in zip(indices, decoded, strict=True):
            answers[index] = tokens
    return answers


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return prompts padded on the left, and their mask: (prompts, length) each."""
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids, mask


def next_logits(model: Model, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """Return the logits of the token after each row, (rows, vocabulary).

    The cache holds the earlier tokens of the rows and is extended by `ids`.
    """
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
    """Return whether a row's only state is a cache of keys and values at positions we can set."""
    inner = unwrap_peft(model)
    return (
        not getattr(inner, "_is_stateful", False)
        and "position_ids" in inspect.signature(inner.forward).parameters
    )


def supports_refill(model: Model) -> bool:
    """Return whether a prompt of any length may take the slot of an answer that has ended."""
    inner = unwrap_peft(model)
    return (
        can_drop_rows(model)
        and supports_custom_mask(inner)
        and all_full_attention(DynamicCache(config=inner.config))
    )


def _decode_with_refill(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    slots: int,
    stops: Collection[int],
    pad: int,
) -> list[list[int]]:
    """Decode in slots; answers that have ended leave their slots to batches of new prompts."""
    answers: list[list[int]] = [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    slots = min(slots, len(prompts))
    cache = SlotCache(slots)
    rows: list[int] = []
    tokens: list[int] = []
    while rows or waiting:
        if waiting and slots - len(rows) >= slots * REFILL_FRACTION:
            new, waiting = waiting[: slots - len(rows)], waiting[slots - len(rows) :]
            tokens += _read_prompts(model, [prompts[index] for index in new], cache, len(rows), pad)
            rows += new
        for index, token in zip(rows, tokens, strict=True):
            answers[index].append(token)
        kept = [
            slot
            for slot, index in enumerate(rows)
            if tokens[slot] not in stops and len(answers[index]) < max_new_tokens
        ]
        order = cache.compact(kept)
        rows, tokens = [rows[slot] for slot in order], [tokens[slot] for slot in order]
        if rows:
            lengths = [len(prompts[index]) + len(answers[index]) - 1 for index in rows]
            tokens = _step(model, tokens, cache, lengths)
    return [answer[:-1] if answer[-1] in stops else answer for answer in answers]


def _read_prompts(
    model: Model, prompts: Sequence[Sequence[int]], cache: SlotCache, first: int, pad: int
) -> list[int]:
    """Read prompts into the slots from `first` on and return the token after each."""
    ids, mask = (part.to(model.device) for part in left_padded(prompts, pad))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    prompt_cache = DynamicCache(config=unwrap_peft(model).config)
    logits = next_logits(model, ids, mask, positions, prompt_cache)
    tokens: list[int] = logits.argmax(-1).tolist()
    cache.fill(first, prompt_cache, [len(prompt) for prompt in prompts])
    return tokens


def _step(model: Model, tokens: list[int], cache: SlotCache, lengths: list[int]) -> list[int]:
    """Return the token after each answer, whose newest token is not in the cache yet."""
    positions = cache.reserve_next(lengths)
    ids = torch.tensor(tokens, device=positions.device)[:, None]
    mask = torch.arange(cache.length, device=positions.device) <= positions
    logits = next_logits(model, ids, mask[:, None, None], positions, cache)
    next_tokens: list[int] = logits.argmax(-1).tolist()
    return next_tokens


def decode(
    model: Model,
    ids: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    stops: Collection[int],
    choose: Callable[[Tensor, int, list[int]], Tensor],
    is_complete: Callable[[list[int]], bool] = lambda tokens: False,
    rows: Tensor | None = None,
) -> list[list[int]]:
    """Decode one batch; answers that have ended leave the batch and the cache.

    transformers' `generate` computes every row until the last one ends. One answer that does not
    end then makes a batch of short answers slow.

    Args:
        model: the model.
        ids, mask: left-padded prompts, (prompts, length).
        max_new_tokens: tokens of the longest answer.
        stops: ids of tokens that end an answer.
        choose: returns the next tokens, (answers,), from the logits (answers, vocabulary), the
            number of tokens before them, and the indices of the answers.
        is_complete: returns whether the tokens of an answer contain a text that ends it.
        rows: index of the prompt of each answer; by default each prompt has one answer.

    Returns:
        Token ids of each answer, without the stop token.
    """
    active = list(range(len(ids) if rows is None else len(rows)))
    answers: list[list[int]] = [[] for _ in active]
    cache = DynamicCache(config=unwrap_peft(model).config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for step in range(max_new_tokens):
        logits = next_logits(model, ids, mask, positions, cache)
        if step == 0 and rows is not None:
            cache.batch_select_indices(rows)
            logits, mask, positions = logits[rows], mask[rows], positions[rows]
        tokens = choose(logits, step, active)
        kept = []
        for position, (answer, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
            if token in stops:
                continue
            answers[answer].append(token)
            if not is_complete(answers[answer]):
                kept.append(position)
        if not kept:
            break
        if len(kept) < len(active):
            unfinished = torch.tensor(kept, device=ids.device)
            cache.batch_select_indices(unfinished)
            active = [active[position] for position in kept]
            tokens, mask, positions = tokens[unfinished], mask[unfinished], positions[unfinished]
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return answers


def _decode_greedily(
    model: Model, ids: Tensor, mask: Tensor, max_new_tokens: int, stops: Collection[int]
) -> list[list[int]]:
    return decode(model, ids, mask, max_new_tokens, stops, lambda logits, *_: logits.argmax(-1))


def _generate(
    model: Model, ids: Tensor, mask: Tensor, max_new_tokens: int, stops: Collection[int]
) -> list[list[int]]:
    """Decode one batch with transformers' `generate`, for models with other state than a cache."""
    stop_ids = sorted(stops)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
    )
    with _generation_config(unwrap_peft(model), config):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            # The processes of a training generate independently.
            synced_gpus=False,
        )
    generated = output[:, ids.shape[1] :].tolist()
    return [list(takewhile(lambda token: token not in stops, tokens)) for tokens in generated]


@contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace the generation config of the model's folder (penalties, beams, minimal lengths).

    Otherwise `generate` takes options that `config` does not set from there.
    """
    original, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = original
