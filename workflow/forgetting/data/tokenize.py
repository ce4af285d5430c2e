"""Chat templates: what a tokenizer puts around the messages of a conversation.

From text to token ids, with the boundaries between what is read and what is to be said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from itertools import pairwise

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from forgetting.config.data import PromptConfig
from forgetting.data.chat_template import (
    THINKING,
    EndlessTemplate,
    check_arguments,
    default_template,
    ends_nowhere,
    time_limit,
)
from forgetting.data.tables import render_answer, render_question
from forgetting.errors import InputError

Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`."""

TEMPLATE_CLOCK = datetime(2024, 7, 26, tzinfo=UTC)
"""The day on which all templates are rendered: some write the date into every prompt, and the day
of the run would make each day another study."""

MAX_TEMPLATE_TOKENS = 2**20
"""Characters that a template may add to a conversation, besides 16 for each character of it."""

QUESTION, ANSWER, NEXT = "{question}", "{answer}", "{next question}"


@dataclass(frozen=True)
class TurnEnding:
    """How a chat template ends an answer of the assistant in a conversation that goes on.

    Attributes:
        text: plain text behind the answer, up to the special token if there is one, else up to the
            next question.
        token: the first special token behind the answer, if there is one.
        written: text and token as they are written; empty without a token.
    """

    text: str
    token: int | None
    written: str

    @property
    def stop(self) -> str:
        """Return the text at which an answer ends besides the token; empty if there is none."""
        if self.token is not None and not self.text.strip():
            return ""
        return self.text.rstrip(" \t")


def resolve_template(tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig) -> PromptConfig:
    """The prompt as text around question and answer, whether the study or the tokenizer has it."""
    return chat_template_text(tokenizer, prompt) if prompt.chat else prompt


@lru_cache(maxsize=8)
def chat_template_text(tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig) -> PromptConfig:
    """Return the text that the chat template of a tokenizer puts around a question and its answer.

    Raises:
        InputError: the template changes question or answer, or has the model think unasked.
    """
    question = [*_system_turn(prompt), {"role": "user", "content": QUESTION}]
    asked = apply_chat_template(tokenizer, prompt, question, ask=True)
    talk = [*question, {"role": "assistant", "content": ANSWER}]
    answer = _assistant_turn(tokenizer, prompt, talk, asked)
    try:
        found = PromptConfig(question=asked, answer=answer)
    except ValueError:
        raise _template_changes_text() from None
    if not any(prompt.template_arguments.get(name) for name in THINKING):
        _check_thinking(asked.rpartition(QUESTION)[2], answer.partition(ANSWER)[0])
    return found


@lru_cache(maxsize=8)
def turn_ending(tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig) -> TurnEnding:
    """Return how the chat template of a tokenizer ends an answer.

    Raises:
        InputError: nothing stands between an answer and the next question.
    """
    talk = [
        *_system_turn(prompt),
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": NEXT},
    ]
    whole = apply_chat_template(tokenizer, prompt, talk, ask=False)
    _, answered, behind = whole.rpartition(ANSWER)
    between, asked, _ = behind.partition(NEXT)
    if not answered or not asked:
        raise _template_changes_text()
    added = tokenizer.added_tokens_decoder
    for token in tokenizer(between, add_special_tokens=False)["input_ids"]:
        # Some tokenizers add runs of spaces too.
        if token in added and (content := added[token].content).strip(" \t\n\r▁"):
            text = between.partition(content)[0]
            return TurnEnding(text, token, text + content)
    if not between.strip("\t "):
        raise InputError(
            "prompt.chat: the chat template of the base's tokenizer puts nothing between an answer "
            "and the next question, so that no answer would end; write the prompt as `question` "
            "and `answer`"
        )
    return TurnEnding(between, None, "")


def end_token(tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, *, chat: bool) -> int:
    """Return the token that the last answer of an example is trained to end with.

    In a chat template it is the template's own, so that a tuned model ends an answer as its base
    does; else the tokenizer's end of sequence.
    """
    token = turn_ending(tokenizer, prompt).token if chat else None
    return int(tokenizer.eos_token_id if token is None else token)


def chat_turns(
    tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, messages: Sequence[Message]
) -> list[str]:
    """A conversation in turns: what the model reads, what it is to say, and so on to its last word.

    Raises:
        InputError: the template changes what was said before, or refuses the conversation.
    """
    chat_template_text(tokenizer, prompt)  # raises where the template is not fit for training
    if messages[0]["role"] != "system":
        messages = [*_system_turn(prompt), *messages]
    told, turns = "", []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = apply_chat_template(tokenizer, prompt, messages[:place], ask=True)
        answer = _assistant_turn(tokenizer, prompt, messages[: place + 1], asked)
        if not asked.startswith(told):
            raise InputError(
                "the chat template of the base's tokenizer writes earlier answers anew in later "
                "turns, so that a conversation is no single text; make each turn a row"
            )
        turns += [asked.removeprefix(told), answer]
        told = asked + answer
    return turns


def apply_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    messages: Sequence[Message],
    *,
    ask: bool,
) -> str:
    """Render messages as `apply_chat_template` does, on a fixed day and within limits.

    Args:
        tokenizer: it has the template.
        prompt: it has the template's arguments.
        messages: the conversation.
        ask: go on to where an answer begins.

    Raises:
        InputError: there is no template, or it refuses the messages, lacks an argument, or is
            endless.
    """
    source = default_template(tokenizer.chat_template)
    if source is None:
        raise InputError(
            "prompt.chat: the base's tokenizer has no chat template; write the prompt as "
            "`question` and `answer`, or take a base that was tuned to chat"
        )
    check_arguments(source, prompt)
    variables = {
        **tokenizer.special_tokens_map,
        "date_string": _strftime_now("%d %b %Y"),
        **prompt.template_arguments,
        "messages": [dict(message) for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": ask,
    }
    most = MAX_TEMPLATE_TOKENS + 16 * sum(len(message["content"]) for message in messages)
    parts, size = [], 0
    try:
        with time_limit():
            template = _compile_jinja_template(source)
            # transformers' own tells the time of the run.
            template.globals["strftime_now"] = _strftime_now
            for part in template.generate(variables):
                parts.append(part)
                size += len(part)
                if size > most:
                    raise EndlessTemplate(f"it writes more than {most:,} characters")
    except (EndlessTemplate, MemoryError, RecursionError) as error:
        raise ends_nowhere(error) from None
    except Exception as error:
        # Of any type: templates call methods of Python's own types.
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            "prompt.chat: the chat template of the base's tokenizer (chat_template.jinja or "
            f"tokenizer_config.json) refuses the messages {roles}: {error}; mend it, or write the "
            "prompt as `question` and `answer`"
        ) from None
    return "".join(parts)


def _strftime_now(form: str) -> str:
    return TEMPLATE_CLOCK.strftime(form)


def _assistant_turn(
    tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, talk: Sequence[Message], asked: str
) -> str:
    """What the assistant is to say to the last message of a conversation, with its ending."""
    end = turn_ending(tokenizer, prompt).written
    whole = apply_chat_template(tokenizer, prompt, talk, ask=False)
    if not whole.startswith(asked):
        return talk[-1]["content"] + end
    answer = whole.removeprefix(asked)
    # Some templates write the tokenizer's end of sequence behind the last message too.
    before, found, _ = answer.rpartition(end) if end else ("", "", "")
    return before + found if found else answer.rstrip()


def _check_thinking(asked: str, begun: str) -> None:
    """Refuse a template in which the model thinks first, by what it writes before the answer.

    Args:
        asked: behind the question, on the prompt's side; empty thoughts may stand there.
        begun: before the answer, on the answer's side.
    """
    tag = re.compile(r"[<\[](/?)[\w:|]*think\w*[>\]]", re.IGNORECASE)
    if tag.search(begun) or tag.findall(asked)[-1:] == [""]:
        raise InputError(
            "prompt.chat: the chat template of the base's tokenizer has the model think before it "
            "answers, and no argument of the study turns that off; write the prompt as `question` "
            "and `answer`, with the tags of empty thoughts at the end of `question`, or take "
            "another base"
        )


def _template_changes_text() -> InputError:
    return InputError(
        "prompt.chat: the chat template of the base's tokenizer does not repeat question and "
        "answer as they are; write the prompt as `question` and `answer`"
    )


def _system_turn(prompt: PromptConfig) -> list[Message]:
    return [] if prompt.system is None else [{"role": "system", "content": prompt.system}]


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
    prompt_length: int
    spans: tuple[tuple[int, int], ...] = ()
    document_starts: tuple[int, ...] = (0,)

    @property
    def target_spans(self) -> tuple[tuple[int, int], ...]:
        """First and last place of every run of targets."""
        return self.spans or ((self.prompt_length, len(self.ids)),)

    @property
    def targets(self) -> int:
        """Number of tokens that are trained on and scored."""
        return sum(end - begin for begin, end in self.target_spans)

    @property
    def document_lengths(self) -> list[int]:
        """Tokens of each document."""
        return [end - begin for begin, end in pairwise([*self.document_starts, len(self.ids)])]


def concatenate(examples: Sequence[Example]) -> Example:
    """One sequence of several examples, which stay as blind to each other as they were."""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    starts: list[int] = []
    for example in examples:
        shift = len(ids)
        ids += example.ids
        spans += [(shift + begin, shift + end) for begin, end in example.target_spans]
        starts += [shift + start for start in example.document_starts]
    return Example(ids, spans[0][0], tuple(spans), tuple(starts))


# The probes are read anew at every evaluation of a trajectory; their tokens stay the same.
@lru_cache(maxsize=2**16)
def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, question: str
) -> list[int]:
    """Token ids of the question's side, with the tokenizer's own special tokens in front."""
    text = render_question(resolve_template(tokenizer, prompt), question)
    return _extend(tokenizer, [], "", text, special=not prompt.chat)


@lru_cache(maxsize=2**17)
def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
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
    written = resolve_template(tokenizer, prompt)
    turns = [render_question(written, question), render_answer(written, answer)]
    end = end_token(tokenizer, prompt, chat=prompt.chat)
    return _encode_turns(tokenizer, turns, max_length, end, special=not prompt.chat)


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    messages: Sequence[Message],
    max_length: int | None = None,
) -> Example:
    """Token ids of a conversation in the tokenizer's chat template; all answers are targets.

    An answer ends as the template ends it, the last one with an end-of-sequence token if the
    template has no token for it. What follows it is no target.
    """
    turns = chat_turns(tokenizer, prompt, messages)
    end = end_token(tokenizer, prompt, chat=True)
    return _encode_turns(tokenizer, turns, max_length, end, special=False)


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, max_length: int | None = None
) -> Example:
    """Token ids of a text and its end; every token that has one before it is a target."""
    (ids,) = encode_texts(tokenizer, [text])
    return Example(ids=ids[:max_length], prompt_length=1)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of several texts, each with its end."""
    several = tokenizer(list(texts))["input_ids"]
    return [[*_drop_end_token(tokenizer, ids), tokenizer.eos_token_id] for ids in several]


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
        ids = _extend(tokenizer, ids, text, turn, special)
        text += turn
        ends.append(len(ids))
    ids = (ids if ids[-1:] == [end] else [*ids, end])[:max_length]
    ends[-1] = len(ids)
    if len(turns) == 2:
        return Example(ids, ends[0])
    spans = zip(ends[::2], ends[1::2], strict=True)
    kept = tuple((begin, min(end, len(ids))) for begin, end in spans if begin < len(ids))
    return Example(ids, ends[0], kept)


def _extend(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, turn: str, special: bool
) -> list[int]:
    """Token ids of a text with one more turn, which begin with those of the text."""
    together = tokenizer(text + turn, add_special_tokens=special)["input_ids"]
    if special:
        together = _drop_end_token(tokenizer, together)
    if together[: len(ids)] == ids:
        return list(together)
    return ids + list(tokenizer(turn, add_special_tokens=False)["input_ids"])


def _drop_end_token(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
