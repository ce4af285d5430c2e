"""Answers drawn at random, each from numbers of its own: the same whatever else is in the batch.

Every answer has a stream of uniform numbers, seeded by the study's seed, its prompt and its number
among the answers to that prompt. A token is drawn by looking the next of them up in the cumulated
shares of the likeliest tokens. So an answer depends on neither batch size nor order, up to the
rounding of the logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from forgetting.models.loading import Model, inner_model
from forgetting.records import InputError
from forgetting.scoring.decode import can_drop_rows, left_padded, next_logits
from forgetting.scoring.forward import by_length


@dataclass(frozen=True)
class Wish:
    """One answer that is to be drawn: after which tokens, from which stream."""

    prompt: tuple[int, ...]
    stream: int


def stream_of(seed: int, prompt: str, sample: int) -> int:
    """The seed of one answer's numbers."""
    text = f"{seed}\n{sample}\n{prompt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def draw(logits: Tensor, numbers: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token per row.

    The tokens are sorted by probability at this temperature; of them the fewest that together
    reach `top_p` are kept (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751), and the one
    is taken in whose share of their sum the number in [0, 1) falls.
    """
    shares, tokens = torch.softmax(logits.double() / temperature, -1).sort(
        dim=-1, descending=True, stable=True
    )
    reached = shares.cumsum(-1)
    kept = shares.where(reached - shares < top_p, 0.0)
    heaps = kept.cumsum(-1)
    places = torch.searchsorted(heaps, numbers[:, None] * heaps[:, -1:], right=True)
    # Rounding could point behind the last token that is kept.
    places = places.clamp(max=(kept > 0).sum(-1, keepdim=True) - 1)
    return tokens.gather(-1, places)[:, 0]


@torch.inference_mode()
def sample_answers(
    model: Model,
    wishes: Sequence[Wish],
    temperature: float,
    top_p: float,
    most: int,
    batch_size: int,
    ends: Collection[int],
    pad: int,
    is_over: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Draw every answer, up to one of `ends`, which is left out, or `most` tokens.

    Answers to one prompt stand beside each other in a batch, which reads the prompt once.

    Args:
        is_over: whether the tokens of an answer so far hold a text that ends it.
    """
    if not can_drop_rows(model):
        raise InputError(
            "benchmarks: samples are drawn with a cache of keys and values, which this model has "
            "not; leave `samples` out"
        )
    found: list[list[int]] = [[] for _ in wishes]
    # Sorted by prompt, so that those of one are neighbours also where others are as long.
    order = sorted(range(len(wishes)), key=lambda index: wishes[index].prompt)
    for places in by_length([len(wishes[index].prompt) for index in order], batch_size):
        indices = [order[place] for place in places]
        batch = [wishes[index] for index in indices]
        answers = _sample(model, batch, temperature, top_p, most, ends, pad, is_over)
        for index, answer in zip(indices, answers, strict=True):
            found[index] = answer
    return found


def _sample(
    model: Model,
    wishes: Sequence[Wish],
    temperature: float,
    top_p: float,
    most: int,
    ends: Collection[int],
    pad: int,
    is_over: Callable[[list[int]], bool],
) -> list[list[int]]:
    """One batch; what has ended is taken out of it and of the cache."""
    prompts = list(dict.fromkeys(wish.prompt for wish in wishes))
    ids, mask = (part.to(model.device) for part in left_padded(prompts, pad))
    numbers = torch.stack([_numbers(wish.stream, most) for wish in wishes]).to(model.device)
    cache = DynamicCache(config=inner_model(model).config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    # After the prompts are read, every answer has a row of its own.
    rows = torch.tensor([prompts.index(wish.prompt) for wish in wishes]).to(model.device)
    alive = list(range(len(wishes)))
    answers: list[list[int]] = [[] for _ in wishes]
    for step in range(most):
        logits = next_logits(model, ids, mask, positions, cache)
        if step == 0:
            cache.batch_select_indices(rows)
            logits, mask, positions = logits[rows], mask[rows], positions[rows]
        tokens = draw(logits, numbers[:, step], temperature, top_p)
        kept = []
        for place, (row, token) in enumerate(zip(alive, tokens.tolist(), strict=True)):
            if token in ends:
                continue
            answers[row].append(token)
            if not is_over(answers[row]):
                kept.append(place)
        if not kept:
            break
        if len(kept) < len(alive):
            going_on = torch.tensor(kept).to(model.device)
            cache.batch_select_indices(going_on)
            alive = [alive[place] for place in kept]
            tokens, numbers = tokens[going_on], numbers[going_on]
            mask, positions = mask[going_on], positions[going_on]
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return answers


def _numbers(stream: int, most: int) -> Tensor:
    generator = torch.Generator().manual_seed(stream)
    return torch.rand(most, generator=generator, dtype=torch.float64)
