"""From a question and an answer to token ids, with the boundary between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from forgetting.data import render_answer, render_question
from forgetting.study import Prompt


@dataclass(frozen=True)
class Example:
    """A sequence of tokens, some of which are trained on and scored.

    Attributes:
        ids: token ids, of one document or of several that are packed.
        prompt: so many ids stand before the first target.
        spans: first and last place, the last one excluded, of every run of targets; without any,
            all that follows the prompt is a target, the end of sequence included.
        starts: where the documents begin; each sees itself only and counts its positions anew.
    """

    ids: list[int]
    prompt: int
    spans: tuple[tuple[int, int], ...] = ()
    starts: tuple[int, ...] = (0,)

    @property
    def target_spans(self) -> tuple[tuple[int, int], ...]:
        """First and last place of every run of targets."""
        return self.spans or ((self.prompt, len(self.ids)),)

    @property
    def targets(self) -> int:
        """Number of tokens that are trained on and scored."""
        return sum(end - begin for begin, end in self.target_spans)


def join(examples: Sequence[Example]) -> Example:
    """One sequence of several examples, which stay as blind to each other as they were."""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    starts: list[int] = []
    for example in examples:
        shift = len(ids)
        ids += example.ids
        spans += [(shift + begin, shift + end) for begin, end in example.target_spans]
        starts += [shift + start for start in example.starts]
    return Example(ids, spans[0][0], tuple(spans), tuple(starts))


# The probes are read anew at every evaluation of a trajectory; their tokens stay the same.
@lru_cache(maxsize=2**16)
def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, question: str) -> list[int]:
    """Token ids of the question's side, with the tokenizer's own special tokens in front."""
    return _without_end(tokenizer, tokenizer(render_question(prompt, question))["input_ids"])


@lru_cache(maxsize=2**17)
def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    question: str,
    answer: str,
    max_length: int | None = None,
) -> Example:
    """Token ids of a question with its answer, as TOFU's code forms them.

    Question and answer are tokenized together, the tokens of the question alone are the prompt, and
    one end-of-sequence token follows, unless the text was cut at `max_length`. Where a token would
    span the boundary, the two sides are tokenized apart, so that what is trained on is what a
    generation starts from.
    """
    head = encode_prompt(tokenizer, prompt, question)
    text = render_question(prompt, question) + render_answer(prompt, answer)
    ids = _without_end(tokenizer, tokenizer(text)["input_ids"])
    if ids[: len(head)] != head:
        tail = tokenizer(render_answer(prompt, answer), add_special_tokens=False)["input_ids"]
        ids = head + tail
    ids = [*ids, tokenizer.eos_token_id]
    return Example(ids=ids[:max_length], prompt=len(head))


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, max_length: int | None = None
) -> Example:
    """Token ids of a text and its end; every token that has one before it is a target."""
    ids = _without_end(tokenizer, tokenizer(text)["input_ids"])
    return Example(ids=[*ids, tokenizer.eos_token_id][:max_length], prompt=1)


def _without_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
