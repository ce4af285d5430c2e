"""The harness's log-likelihoods, with what the choices of an item have in common read once.

The harness reads the question anew for each of its choices. Here the tokens that all choices of an
item begin with stand in front, and what follows in each of them behind, as a tree
(`forgetting.scoring.shared`), so that every log-likelihood is what it would be alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from torch import nn

from forgetting.benchmarks.sampling import Wish, sample_answers, stream_of
from forgetting.encoding.encode import Example
from forgetting.scoring.shared import can_share, grow_tree, read_together

TOKENS = 64
"""A batch has as many tokens as `batch_size` sequences of this length, about."""

Encoded = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation, as text and as tokens."""
Answer = tuple[float, bool]
"""Log-likelihood in nats, and whether each token is the likeliest."""


class OneReadingLM(HFLM):  # type: ignore[misc]
    """The harness's own model, but for the likelihoods of choices, and answers that are drawn."""

    _items: list[tuple[str, int]] | None = None
    seed: int = 0
    """Of the answers that are drawn."""
    encoded: dict[tuple[str, str], tuple[list[int], list[int]]]
    """Tokens of contexts and continuations, by text."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.encoded = {}

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
        for index, text in zip(greedy, said, strict=True):
            answers[index] = text
        for indices in drawn.values():
            texts = self._draw([requests[i].args[0] for i in indices], requests[indices[0]].args[1])
            for index, text in zip(indices, texts, strict=True):
                answers[index] = text
        return answers

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
            wishes.append(Wish(encoded[text], stream_of(self.seed, text, seen[text])))
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
            int(self.eot_token_id),
            int(self.tokenizer.pad_token_id),
            is_over,
        )
        texts = [self.tok_decode(tokens) for tokens in found]
        return [_before(text, stops) for text in texts]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """Remember which requests are choices of one item, for `_loglikelihood_tokens`."""
        self._items = [(request.task_name, request.doc_id) for request in requests]
        try:
            found: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._items = None
        return found

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As the harness does, but once for all models that are asked the same; the choices of an
        item have one context, which is encoded once."""
        asked = (context, continuation)
        if asked in self.encoded:
            return self.encoded[asked]
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if context != self._context[0]:
            self._context = (context, self.tok_encode(context))
        whole, head = self.tok_encode(context + continuation), self._context[1]
        return self.encoded.setdefault(asked, (head, whole[len(head) :]))

    _context: tuple[str, list[int]] = ("", [])

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        if self._items is None or not can_share(self.model):
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
        answers = answer_items(self.model, items, self.tokenizer.pad_token_id, int(self.batch_size))
        return [answer for several in answers for answer in several]


def _before(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of the stops that it holds."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


@torch.inference_mode()
def answer_items(
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
    trees = [grow_tree(_with_common_prompt(choices)) for choices in items]
    answers: list[list[Answer]] = [[] for _ in items]
    for indices in _batches([len(tree.ids) for tree in trees], batch_size * TOKENS):
        group = [trees[index] for index in indices]
        batch, read = read_together(model, group, pad)
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
    first = choices[0][0]
    common = 0
    while common < longest and all(ids[common] == first[common] for ids, _ in choices):
        common += 1
    return [Example(ids, common) for ids, _ in choices]


def _batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of rows of similar length, longest first, padded to about so many tokens."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        rows = max(1, tokens // max(lengths[order[0]], 1))
        yield order[:rows]
        order = order[rows:]
