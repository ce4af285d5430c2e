"""Greedy answers to many questions: each leaves as soon as it ends, and another takes its place."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from forgetting.models.loading import Model, eos_tokens, inner_model
from forgetting.scoring.forward import by_length
from forgetting.scoring.products import by_products
from forgetting.scoring.shared import can_share
from forgetting.scoring.slots import SlotCache, all_plain

REFILL = 0.25
"""The share of the slots that are free when new prompts are read."""


def stop_tokens(model: Model, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens at which answers end: those of the model's author and the tokenizer's.

    They are the same for a base and for all that is tuned from it.
    """
    return frozenset(
        [tokenizer.eos_token_id, *eos_tokens(inner_model(model).generation_config.eos_token_id)]
    )


@torch.inference_mode()
def greedy_answers(
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
    if can_refill(model):
        with by_products(inner_model(model)):
            return _decode_in_slots(model, prompts, most, batch_size, ends, pad)
    decode = _decode if can_drop_rows(model) else _generate
    answers: list[list[int]] = [[] for _ in prompts]
    for indices in by_length([len(prompt) for prompt in prompts], batch_size):
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
    inner = inner_model(model)
    return (
        not getattr(inner, "_is_stateful", False)
        and "position_ids" in inspect.signature(inner.forward).parameters
    )


def can_refill(model: Model) -> bool:
    """May a new prompt take the place of an answer that has ended, at another length?"""
    inner = inner_model(model)
    return (
        can_drop_rows(model) and can_share(inner) and all_plain(DynamicCache(config=inner.config))
    )


def _decode_in_slots(
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
            tokens += _read(model, [prompts[index] for index in new], cache, len(rows), pad)
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


def _read(
    model: Model, prompts: Sequence[Sequence[int]], cache: SlotCache, first: int, pad: int
) -> list[int]:
    """Read prompts into the slots from `first` on; the token after each."""
    ids, mask = (part.to(model.device) for part in left_padded(prompts, pad))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    read = DynamicCache(config=inner_model(model).config)
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
    cache = DynamicCache(config=inner_model(model).config)
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
    with _only(inner_model(model), config):
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
def _only(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Set aside what the model's folder advises (penalties, beams, least lengths).

    `generate` fills in from there whatever `config` leaves open.
    """
    advice, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = advice
