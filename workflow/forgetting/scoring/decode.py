"""Greedy answers to many questions: batched by length, each row leaving as soon as it ends."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from forgetting.models.loading import Model
from forgetting.scoring.forward import by_length


@torch.inference_mode()
def greedy_answers(
    model: Model, prompts: Sequence[Sequence[int]], most: int, batch_size: int, end: int, pad: int
) -> list[list[int]]:
    """The likeliest next token again and again, up to `end`, which is left out, or `most` tokens.

    Prompts of similar length share a batch, padded on the left.
    """
    decode = _decode if can_drop_rows(model) else _generate
    answers: list[list[int]] = [[] for _ in prompts]
    for indices in by_length([len(prompt) for prompt in prompts], batch_size):
        ids, mask = left_padded([prompts[index] for index in indices], pad)
        found = decode(model, ids.to(model.device), mask.to(model.device), most, end)
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


def next_logits(
    model: Model, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache
) -> Tensor:
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


def _decode(model: Model, ids: Tensor, mask: Tensor, most: int, end: int) -> list[list[int]]:
    """Rows that have ended are taken out of the batch and the cache: nothing is computed for them.

    `generate` computes every row until the last one ends, which for short answers beside one that
    never ends is most of its time.
    """
    answers: list[list[int]] = [[] for _ in ids]
    rows = list(range(len(ids)))
    cache = DynamicCache(config=inner_model(model).config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(most):
        tokens = next_logits(model, ids, mask, positions, cache).argmax(-1)
        going_on = (tokens != end).nonzero().flatten()
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


def _generate(model: Model, ids: Tensor, mask: Tensor, most: int, end: int) -> list[list[int]]:
    """The same with transformers' `generate`, for models that keep more than keys and values."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=most, eos_token_id=end, pad_token_id=end
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
    return [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in found]


def inner_model(model: Model) -> PreTrainedModel:
    """The model itself, without peft's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


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
