"""SharedPrefixLM: the harness's HFLM with shared prefixes and reproducible sampling.

Log-likelihoods: HFLM reads the question again for each of its choices. Here the tokens that all
choices of an item begin with are read once, followed by the choices as a tree
(`forgetting.evaluation.prefix_tree`). Every log-likelihood equals that of separate reading.

Sampling: every answer has its own stream of uniform numbers, seeded by the study's seed, its prompt
and its number among the answers to that prompt. Inverse-transform sampling maps the next number to
a token. So an answer depends on neither batch size nor order, up to the rounding of the logits.
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

from forgetting.data.tokenize import Example
from forgetting.errors import InputError
from forgetting.evaluation.generation import can_drop_rows, decode, left_padded, stop_tokens
from forgetting.evaluation.prefix_tree import build_prefix_tree, forward_trees, supports_custom_mask
from forgetting.models.forward import length_batches
from forgetting.models.loading import Model


@dataclass(frozen=True)
class SampleRequest:
    """One answer to sample: the tokens of its prompt and the seed of its random numbers."""

    prompt: tuple[int, ...]
    seed: int


def sample_seed(seed: int, prompt: str, sample: int) -> int:
    """Return the seed of the random numbers of one answer."""
    text = f"{seed}\n{sample}\n{prompt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def sample_top_p(logits: Tensor, numbers: Tensor, temperature: float, top_p: float) -> Tensor:
    """Sample one token per row by nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751).

    The nucleus is the smallest set of most probable tokens whose probabilities reach `top_p`. The
    inverse of its cumulative distribution maps each number to a token.

    Args:
        logits: (rows, vocabulary).
        numbers: uniform in [0, 1), (rows,).
        temperature: divides the logits.
        top_p: probability of the nucleus.

    Returns:
        Token ids, (rows,).
    """
    probabilities, tokens = torch.softmax(logits.double() / temperature, -1).sort(
        dim=-1, descending=True, stable=True
    )
    nucleus = probabilities.where(probabilities.cumsum(-1) - probabilities < top_p, 0.0)
    cumulative = nucleus.cumsum(-1)
    indices = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)
    # Rounding could point past the last token of the nucleus.
    indices = indices.clamp(max=(nucleus > 0).sum(-1, keepdim=True) - 1)
    return tokens.gather(-1, indices)[:, 0]


@torch.inference_mode()
def sample_answers(
    model: Model,
    requests: Sequence[SampleRequest],
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    batch_size: int,
    stops: Collection[int],
    pad: int,
    is_complete: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Sample every answer up to a stop token, which is left out, or `max_new_tokens` tokens.

    Answers to one prompt are neighbours in a batch, which reads the prompt once.

    Args:
        model: the model.
        requests: prompt and seed of each answer.
        temperature, top_p: see `sample_top_p`.
        max_new_tokens: tokens of the longest answer.
        batch_size: answers per forward pass.
        stops: ids of tokens that end an answer.
        pad: id of the padding token.
        is_complete: returns whether the tokens of an answer contain a text that ends it.

    Returns:
        Token ids of each answer.

    Raises:
        InputError: the model has no cache of keys and values.
    """
    if not can_drop_rows(model):
        raise InputError(
            "benchmarks: sampling needs a cache of keys and values, which this model does not "
            "have; leave `samples` out"
        )
    answers: list[list[int]] = [[] for _ in requests]
    # Sorting by prompt keeps answers to one prompt together among other prompts of its length.
    order = sorted(range(len(requests)), key=lambda index: requests[index].prompt)
    for batch in length_batches([len(requests[index].prompt) for index in order], batch_size):
        indices = [order[position] for position in batch]
        prompts = list(dict.fromkeys(requests[index].prompt for index in indices))
        ids, mask = (part.to(model.device) for part in left_padded(prompts, pad))
        rows = torch.tensor([prompts.index(requests[index].prompt) for index in indices])
        streams = [_uniform_numbers(requests[index].seed, max_new_tokens) for index in indices]
        numbers = torch.stack(streams).to(model.device)

        def choose(
            logits: Tensor, step: int, active: list[int], numbers: Tensor = numbers
        ) -> Tensor:
            return sample_top_p(logits, numbers[active, step], temperature, top_p)

        sampled = decode(
            model, ids, mask, max_new_tokens, stops, choose, is_complete, rows.to(model.device)
        )
        for index, answer in zip(indices, sampled, strict=True):
            answers[index] = answer
    return answers


def _uniform_numbers(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)


TOKENS_PER_BATCH = 64
"""A batch has about as many tokens as `batch_size` sequences of this length."""

Encoded = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation, as text and as tokens."""
Answer = tuple[float, bool]
"""Log-likelihood in nats, and whether each token is the likeliest."""


class SharedPrefixLM(HFLM):  # type: ignore[misc]
    """HFLM with shared prefixes for the choices of an item and reproducible sampling.

    Attributes:
        seed: seed of sampled answers.
        encoded: tokens of contexts and continuations, by text.
    """

    _items: list[tuple[str, int]] | None = None
    seed: int = 0
    encoded: dict[tuple[str, str], tuple[list[int], list[int]]]

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.encoded = {}
        # Many models' folders name more stop tokens than the tokenizer's end of sequence.
        self.stop_tokens = stop_tokens(self.model, self.tokenizer)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return one answer per request; requests that sample use `sample_answers`."""
        answers: list[str] = [""] * len(requests)
        greedy: list[int] = []
        sampled: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            settings = request.args[1]
            if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
                sampled.setdefault(repr(sorted(settings.items())), []).append(index)
            else:
                greedy.append(index)
        greedy_requests = [requests[index] for index in greedy]
        greedy_answers = (
            super().generate_until(greedy_requests, disable_tqdm=True) if greedy_requests else []
        )
        stops = self.tokenizer.convert_ids_to_tokens(sorted(self.stop_tokens))
        for index, text in zip(greedy, greedy_answers, strict=True):
            # Stop tokens that the tokenizer does not mark as special remain in the text.
            answers[index] = _before_stops(text, stops)
        for indices in sampled.values():
            texts = self._sample(
                [requests[i].args[0] for i in indices], requests[indices[0]].args[1]
            )
            for index, text in zip(indices, texts, strict=True):
                answers[index] = text
        return answers

    def _model_generate(self, *arguments: Any, **settings: Any) -> torch.Tensor:
        """Generate as HFLM does, up to any stop token of the model."""
        stops = sorted(self.stop_tokens)
        output: torch.Tensor = super()._model_generate(*arguments, eos_token_id=stops, **settings)
        return output

    def _sample(self, prompts: list[str], settings: dict[str, Any]) -> list[str]:
        """Return a sampled answer to each prompt; a repeated prompt gets another sample."""
        options = normalize_gen_kwargs(dict(settings), self.max_gen_toks)
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stops = [stop for stop in handle_stop_sequences(options.get("until"), eos=end) if stop]
        max_new_tokens = int(options["max_gen_toks"])
        max_prompt = int(self.max_length) - max_new_tokens
        encoded = {text: tuple(self.tok_encode(text)[-max_prompt:]) for text in set(prompts)}
        samples: Counter[str] = Counter()
        requests = []
        for text in prompts:
            seed = sample_seed(self.seed, text, samples[text])
            requests.append(SampleRequest(encoded[text], seed))
            samples[text] += 1
        # No token is empty, so a stop has at most as many tokens as bytes.
        tail = max((len(stop.encode()) for stop in stops), default=0) + 1

        def is_complete(tokens: list[int]) -> bool:
            text = self.tok_decode(tokens[-tail:])
            return any(stop in text for stop in stops)

        answers = sample_answers(
            self.model,
            requests,
            float(options.get("temperature") or 1.0),
            float(options.get("top_p") or 1.0),
            max_new_tokens,
            int(self.batch_size),
            self.stop_tokens,
            int(self.tokenizer.pad_token_id),
            is_complete,
        )
        return [_before_stops(self.tok_decode(tokens), stops) for tokens in answers]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """Return log-likelihoods; `_loglikelihood_tokens` reads the item of each request."""
        self._items = [(request.task_name, request.doc_id) for request in requests]
        self._encode_pairs([request.args for request in requests])
        try:
            answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._items = None
        return answers

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a pair, which are shared by all models of a tokenizer."""
        return self.encoded[context, continuation]

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Encode new pairs, each text once and all in one call."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.encoded and pair[0]]
        # Trailing spaces of a context belong to the first word of the continuation.
        heads = {context: context.rstrip() for context, _ in new}
        texts = [context + continuation for context, continuation in new]
        tokens = self.encode_texts({*heads.values(), *texts})
        for pair, text in zip(new, texts, strict=True):
            head = tokens[heads[pair[0]]]
            self.encoded[pair] = head, tokens[text][len(head) :]

    def encode_texts(self, texts: Collection[str]) -> dict[str, list[int]]:
        """Return the tokens that `tok_encode` returns for each text."""
        bos = self.tokenizer.decode(self.prefix_token_id)
        # `tok_encode` treats empty texts and those with a beginning-of-sequence token differently.
        special = {text for text in texts if not text or text.startswith(bos)}
        plain = [text for text in texts if text not in special]
        options = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        ids = self.tokenizer(plain, **options)["input_ids"] if plain else []
        return {
            **{text: self.tok_encode(text) for text in special},
            **dict(zip(plain, ids, strict=True)),
        }

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        if self._items is None or not supports_custom_mask(self.model):
            separate: list[Answer] = super()._loglikelihood_tokens(
                requests, disable_tqdm=True, override_bs=override_bs
            )
            return separate
        max_tokens = int(self.max_length) + 1
        choices = [
            ((context + continuation)[-max_tokens:], len(continuation))
            for _, context, continuation in requests
        ]
        # Truncated choices of one item may have no token in common.
        keyed = zip(self._items, choices, strict=True)
        items = [
            [choice for _, choice in group]
            for _, group in groupby(keyed, key=lambda pair: (pair[0], pair[1][0][0]))
        ]
        answers = score_choices(
            self.model, items, self.tokenizer.pad_token_id, int(self.batch_size)
        )
        return [answer for group in answers for answer in group]


def _before_stops(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first stop."""
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
    """Return the log-likelihood of every choice of every item.

    Args:
        model: the model.
        items: the choices of each item: token ids, and the number of final tokens to score.
        pad: id of the padding token.
        batch_size: approximate number of sequences per forward pass.
    """
    trees = [build_prefix_tree(_with_common_prompt(choices)) for choices in items]
    answers: list[list[Answer]] = [[] for _ in items]
    for indices in _batches([len(tree.ids) for tree in trees], batch_size * TOKENS_PER_BATCH):
        group = [trees[index] for index in indices]
        batch, logits = forward_trees(model, group, pad)
        losses = nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        logprobs = (-losses).tolist()
        is_greedy = (logits.argmax(-1) == batch.targets).tolist()
        end = 0
        for index, tree in zip(indices, group, strict=True):
            for targets, (_, scored) in zip(tree.targets, items[index], strict=True):
                end += len(targets)
                span = slice(end - scored, end)
                answers[index].append((sum(logprobs[span]), all(is_greedy[span])))
    return answers


def _with_common_prompt(choices: Sequence[tuple[list[int], int]]) -> list[Example]:
    """Return the choices of an item with their longest common unscored prefix as prompt."""
    unscored = min(len(ids) - scored for ids, scored in choices)
    columns = zip(*(ids[:unscored] for ids, _ in choices), strict=True)
    common = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
    return [Example(ids, common) for ids, _ in choices]


def _batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Yield batches of about `tokens` tokens: indices of rows, longest rows first."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        rows = max(1, tokens // max(lengths[order[0]], 1))
        yield order[:rows]
        order = order[rows:]
