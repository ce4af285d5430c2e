"""From a question and an answer to token ids, with the boundary between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from forgetting.data import render_answer, render_question
from forgetting.study import Prompt


@dataclass(frozen=True)
class Example:
    """Token ids of prompt, answer and end of sequence; the first `prompt` ids are the prompt."""

    ids: list[int]
    prompt: int

    @property
    def targets(self) -> int:
        """Number of tokens that are trained on and scored, end of sequence included."""
        return len(self.ids) - self.prompt


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
