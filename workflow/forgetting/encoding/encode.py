"""From text to token ids, with the boundaries between what is read and what is to be said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from forgetting.data.rows import render_answer, render_question
from forgetting.encoding.chat import Message, end_token, literal, sides
from forgetting.sections.prompt import Prompt


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

    @property
    def sizes(self) -> list[int]:
        """Tokens of each document."""
        return [end - begin for begin, end in pairwise([*self.starts, len(self.ids)])]


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
    text = render_question(literal(tokenizer, prompt), question)
    return _grow(tokenizer, [], "", text, special=not prompt.chat)


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
    one end-of-sequence token follows, or with `prompt.chat` the token by which the template ends an
    answer, unless the text was cut at `max_length`. Where a token would
    span the boundary, the two sides are tokenized apart, so that what is trained on is what a
    generation starts from.
    """
    written = literal(tokenizer, prompt)
    turns = [render_question(written, question), render_answer(written, answer)]
    end = end_token(tokenizer, prompt, chat=prompt.chat)
    return _encode_turns(tokenizer, turns, max_length, end, special=not prompt.chat)


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    messages: Sequence[Message],
    max_length: int | None = None,
) -> Example:
    """Token ids of a conversation in the tokenizer's chat template; all answers are targets.

    An answer ends as the template ends it, the last one with an end-of-sequence token if the
    template has no token for it. What follows it is no target.
    """
    turns = sides(tokenizer, prompt, messages)
    end = end_token(tokenizer, prompt, chat=True)
    return _encode_turns(tokenizer, turns, max_length, end, special=False)


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, max_length: int | None = None
) -> Example:
    """Token ids of a text and its end; every token that has one before it is a target."""
    (ids,) = encode_texts(tokenizer, [text])
    return Example(ids=ids[:max_length], prompt=1)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of several texts, each with its end."""
    several = tokenizer(list(texts))["input_ids"]
    return [[*_without_end(tokenizer, ids), tokenizer.eos_token_id] for ids in several]


def _encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[str],
    max_length: int | None,
    end: int,
    special: bool,
) -> Example:
    """Turns of which the second, fourth and so on are targets, and the token that ends them."""
    ids: list[int] = []
    text, ends = "", []
    for turn in turns:
        ids = _grow(tokenizer, ids, text, turn, special)
        text += turn
        ends.append(len(ids))
    ids = (ids if ids[-1:] == [end] else [*ids, end])[:max_length]
    ends[-1] = len(ids)
    if len(turns) == 2:
        return Example(ids, ends[0])
    spans = zip(ends[::2], ends[1::2], strict=True)
    kept = tuple((begin, min(end, len(ids))) for begin, end in spans if begin < len(ids))
    return Example(ids, ends[0], kept)


def _grow(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, turn: str, special: bool
) -> list[int]:
    """Token ids of a text with one more turn, which begin with those of the text."""
    together = tokenizer(text + turn, add_special_tokens=special)["input_ids"]
    if special:
        together = _without_end(tokenizer, together)
    if together[: len(ids)] == ids:
        return list(together)
    return ids + list(tokenizer(turn, add_special_tokens=False)["input_ids"])


def _without_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
