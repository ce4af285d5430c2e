"""The harness's log-likelihoods, with what the choices of an item have in common read once.

The harness reads the question anew for each of its choices. Here the tokens that all choices of an
item begin with stand in front, and what follows in each of them behind, as a tree
(`forgetting.evaluation.prefix_tree`), so that every log-likelihood is what it would be alone.

Answers drawn at random, each from numbers of its own: the same whatever else is in the batch.

Every answer has a stream of uniform numbers, seeded by the study's seed, its prompt and its number
among the answers to that prompt. A token is drawn by looking the next of them up in the cumulated
shares of the likeliest tokens. So an answer depends on neither batch size nor order, up to the
rounding of the logits.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from torch import Tensor, nn
from transformers import DynamicCache

from forgetting.data.tokenize import Example
from forgetting.errors import InputError
from forgetting.evaluation.generation import can_drop_rows, left_padded, next_logits, stop_tokens
from forgetting.evaluation.prefix_tree import build_prefix_tree, forward_trees, supports_custom_mask
from forgetting.models.forward import length_batches
from forgetting.models.loading import Model, unwrap_peft


@dataclass(frozen=True)
class SampleRequest:
    """One answer that is to be drawn: after which tokens, from which stream."""

    prompt: tuple[int, ...]
    seed: int


def sample_seed(seed: int, prompt: str, sample: int) -> int:
    """The seed of one answer's numbers."""
    text = f"{seed}\n{sample}\n{prompt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def sample_top_p(logits: Tensor, numbers: Tensor, temperature: float, top_p: float) -> Tensor:
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
    wishes: Sequence[SampleRequest],
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
    for places in length_batches([len(wishes[index].prompt) for index in order], batch_size):
        indices = [order[place] for place in places]
        batch = [wishes[index] for index in indices]
        answers = _sample(model, batch, temperature, top_p, most, ends, pad, is_over)
        for index, answer in zip(indices, answers, strict=True):
            found[index] = answer
    return found


def _sample(
    model: Model,
    wishes: Sequence[SampleRequest],
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
    numbers = torch.stack([_numbers(wish.seed, most) for wish in wishes]).to(model.device)
    cache = DynamicCache(config=unwrap_peft(model).config)
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
        tokens = sample_top_p(logits, numbers[:, step], temperature, top_p)
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


TOKENS_PER_BATCH = 64
"""A batch has as many tokens as `batch_size` sequences of this length, about."""

Encoded = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation, as text and as tokens."""
Answer = tuple[float, bool]
"""Log-likelihood in nats, and whether each token is the likeliest."""


class SharedPrefixLM(HFLM):  # type: ignore[misc]
    """The harness's own model, but for the likelihoods of choices, and answers that are drawn."""

    _items: list[tuple[str, int]] | None = None
    seed: int = 0
    """Of the answers that are drawn."""
    encoded: dict[tuple[str, str], tuple[list[int], list[int]]]
    """Tokens of contexts and continuations, by text."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.encoded = {}
        # As many models' folders name more tokens than the tokenizer's end of sequence.
        self.stop_tokens = stop_tokens(self.model, self.tokenizer)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Draw answers with numbers of their own; all else is the harness's."""
        answers: list[str] = [""] * len(requests)
        greedy: list[int] = []
        drawn: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            settings = request.args[1]
            if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
                drawn.setdefault(repr(sorted(settings.items())), []).append(index)
            else:
                greedy.append(index)
        asked = [requests[index] for index in greedy]
        said = super().generate_until(asked, disable_tqdm=True) if asked else []
        ends = self.tokenizer.convert_ids_to_tokens(sorted(self.stop_tokens))
        for index, text in zip(greedy, said, strict=True):
            # Tokens that are not marked as special stay in the text.
            answers[index] = _prefix_tokens(text, ends)
        for indices in drawn.values():
            texts = self._draw([requests[i].args[0] for i in indices], requests[indices[0]].args[1])
            for index, text in zip(indices, texts, strict=True):
                answers[index] = text
        return answers

    def _model_generate(self, *arguments: Any, **settings: Any) -> torch.Tensor:
        """As the harness does, up to every token that ends an answer."""
        ends = sorted(self.stop_tokens)
        found: torch.Tensor = super()._model_generate(*arguments, eos_token_id=ends, **settings)
        return found

    def _draw(self, prompts: list[str], settings: dict[str, Any]) -> list[str]:
        """Answers to prompts; each repetition of a prompt is another sample."""
        given = normalize_gen_kwargs(dict(settings), self.max_gen_toks)
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stops = [stop for stop in handle_stop_sequences(given.get("until"), eos=end) if stop]
        most = int(given["max_gen_toks"])
        room = int(self.max_length) - most
        encoded = {text: tuple(self.tok_encode(text)[-room:]) for text in set(prompts)}
        seen: Counter[str] = Counter()
        wishes = []
        for text in prompts:
            wishes.append(SampleRequest(encoded[text], sample_seed(self.seed, text, seen[text])))
            seen[text] += 1
        # No token is empty, so that a stop has at most as many of them as bytes.
        tail = max((len(stop.encode()) for stop in stops), default=0) + 1

        def is_over(tokens: list[int]) -> bool:
            text = self.tok_decode(tokens[-tail:])
            return any(stop in text for stop in stops)

        found = sample_answers(
            self.model,
            wishes,
            float(given.get("temperature") or 1.0),
            float(given.get("top_p") or 1.0),
            most,
            int(self.batch_size),
            self.stop_tokens,
            int(self.tokenizer.pad_token_id),
            is_over,
        )
        texts = [self.tok_decode(tokens) for tokens in found]
        return [_prefix_tokens(text, stops) for text in texts]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """Remember which requests are choices of one item, for `_loglikelihood_tokens`."""
        self._items = [(request.task_name, request.doc_id) for request in requests]
        self._encode_pairs([request.args for request in requests])
        try:
            found: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._items = None
        return found

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As the harness does, but once for all models that are asked the same."""
        return self.encoded[context, continuation]

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Tokens of pairs that are new, each text once and all in one call."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.encoded and pair[0]]
        # Spaces at the end of a context belong to the first word of what follows.
        heads = {context: context.rstrip() for context, _ in new}
        texts = [context + continuation for context, continuation in new]
        tokens = self._encode_texts({*heads.values(), *texts})
        for pair, text in zip(new, texts, strict=True):
            head = tokens[heads[pair[0]]]
            self.encoded[pair] = head, tokens[text][len(head) :]

    def _encode_texts(self, texts: Collection[str]) -> dict[str, list[int]]:
        """What `tok_encode` makes of each text."""
        begin = self.tokenizer.decode(self.prefix_token_id)
        alone = {text for text in texts if not text or text.startswith(begin)}
        together = [text for text in texts if text not in alone]
        given = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        found = self.tokenizer(together, **given)["input_ids"] if together else []
        return {
            **{text: self.tok_encode(text) for text in alone},
            **dict(zip(together, found, strict=True)),
        }

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        if self._items is None or not supports_custom_mask(self.model):
            found: list[Answer] = super()._loglikelihood_tokens(
                requests, disable_tqdm=True, override_bs=override_bs
            )
            return found
        room = int(self.max_length) + 1
        cut = [
            ((context + continuation)[-room:], len(continuation))
            for _, context, continuation in requests
        ]
        # Where the beginning was cut off, the choices of an item may have no token in common.
        keyed = zip(self._items, cut, strict=True)
        items = [
            [choice for _, choice in several]
            for _, several in groupby(keyed, key=lambda one: (one[0], one[1][0][0]))
        ]
        answers = score_choices(
            self.model, items, self.tokenizer.pad_token_id, int(self.batch_size)
        )
        return [answer for several in answers for answer in several]


def _prefix_tokens(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of the stops that it holds."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


@torch.inference_mode()
def score_choices(
    model: nn.Module,
    items: Sequence[Sequence[tuple[list[int], int]]],
    pad: int,
    batch_size: int,
) -> list[list[Answer]]:
    """Log-likelihood of every choice of every item.

    Args:
        items: per item its choices, as token ids and how many of them, at the end, are scored.
        batch_size: sequences per forward pass, about.
    """
    trees = [build_prefix_tree(_with_common_prompt(choices)) for choices in items]
    answers: list[list[Answer]] = [[] for _ in items]
    for indices in _batches([len(tree.ids) for tree in trees], batch_size * TOKENS_PER_BATCH):
        group = [trees[index] for index in indices]
        batch, read = forward_trees(model, group, pad)
        likelihoods = (-nn.functional.cross_entropy(read, batch.targets, reduction="none")).tolist()
        likeliest = (read.argmax(-1) == batch.targets).tolist()
        end = 0
        for index, tree in zip(indices, group, strict=True):
            for targets, (_, scored) in zip(tree.targets, items[index], strict=True):
                end += len(targets)
                span = slice(end - scored, end)
                answers[index].append((sum(likelihoods[span]), all(likeliest[span])))
    return answers


def _with_common_prompt(choices: Sequence[tuple[list[int], int]]) -> list[Example]:
    """The choices of an item with the longest prompt that all of them have, but no scored token."""
    longest = min(len(ids) - scored for ids, scored in choices)
    columns = zip(*(ids[:longest] for ids, _ in choices), strict=True)
    common = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
    return [Example(ids, common) for ids, _ in choices]


def _batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of rows of similar length, longest first, padded to about so many tokens."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        rows = max(1, tokens // max(lengths[order[0]], 1))
        yield order[:rows]
        order = order[rows:]
