"""Encode questions with answers, conversations and texts as token ids with target spans.

A prompt is the study's own text around question and answer, or the tokenizer's chat template.
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
    endless_template_error,
    time_limit,
)
from forgetting.errors import InputError

Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`."""

TEMPLATE_CLOCK = datetime(2024, 7, 26, tzinfo=UTC)
"""The date on which all templates are rendered.

Some templates write the date into every prompt, so the current date would change the results.
"""

MAX_TEMPLATE_CHARACTERS = 2**20
"""Characters that a template may write, in addition to 16 for each character of the messages."""

QUESTION, ANSWER, NEXT_QUESTION = "{question}", "{answer}", "{next question}"


@dataclass(frozen=True)
class TurnEnding:
    """How a chat template ends an answer of the assistant before the next question.

    Attributes:
        text: plain text after the answer, up to the special token or, without one, up to the next
            question.
        token: the first special token after the answer, if any.
        with_token: text and token as the template writes them; empty without a token.
    """

    text: str
    token: int | None
    with_token: str

    @property
    def stop(self) -> str:
        """Return the text at which an answer ends, in addition to the token; may be empty."""
        if self.token is not None and not self.text.strip():
            return ""
        return self.text.rstrip(" \t")


def resolve_template(tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig) -> PromptConfig:
    """Return the prompt as text around question and answer, from the study or the chat template."""
    return chat_template_text(tokenizer, prompt) if prompt.chat else prompt


@lru_cache(maxsize=8)
def chat_template_text(tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig) -> PromptConfig:
    """Return the text that the chat template of a tokenizer puts around a question and its answer.

    Raises:
        InputError: the template changes question or answer, or enables thinking by default.
    """
    question = [*_system_turn(prompt), {"role": "user", "content": QUESTION}]
    context = apply_chat_template(tokenizer, prompt, question, add_generation_prompt=True)
    messages = [*question, {"role": "assistant", "content": ANSWER}]
    answer = _assistant_turn(tokenizer, prompt, messages, context)
    try:
        text_prompt = PromptConfig(question=context, answer=answer)
    except ValueError:
        raise _template_changes_text() from None
    if not any(prompt.template_arguments.get(name) for name in THINKING):
        _check_thinking(context.rpartition(QUESTION)[2], answer.partition(ANSWER)[0])
    return text_prompt


@lru_cache(maxsize=8)
def turn_ending(tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig) -> TurnEnding:
    """Return how the chat template of a tokenizer ends an answer.

    Raises:
        InputError: the template writes nothing between an answer and the next question.
    """
    messages = [
        *_system_turn(prompt),
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": NEXT_QUESTION},
    ]
    text = apply_chat_template(tokenizer, prompt, messages, add_generation_prompt=False)
    _, has_answer, after = text.rpartition(ANSWER)
    between, has_question, _ = after.partition(NEXT_QUESTION)
    if not has_answer or not has_question:
        raise _template_changes_text()
    added = tokenizer.added_tokens_decoder
    for token in tokenizer(between, add_special_tokens=False)["input_ids"]:
        # Some tokenizers also have added tokens for runs of spaces.
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
    """Return the token with which the last answer of an example ends.

    With a chat template it is the template's token, so that a tuned model ends answers like its
    base. Otherwise it is the tokenizer's end-of-sequence token.
    """
    token = turn_ending(tokenizer, prompt).token if chat else None
    return int(tokenizer.eos_token_id if token is None else token)


def chat_turns(
    tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, messages: Sequence[Message]
) -> list[str]:
    """Return a conversation as alternating texts: what the model reads, and what it answers.

    Raises:
        InputError: the template rewrites earlier turns, or refuses the conversation.
    """
    chat_template_text(tokenizer, prompt)  # Raises for templates that are unsuitable for training.
    if messages[0]["role"] != "system":
        messages = [*_system_turn(prompt), *messages]
    text, turns = "", []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        context = apply_chat_template(
            tokenizer, prompt, messages[:index], add_generation_prompt=True
        )
        answer = _assistant_turn(tokenizer, prompt, messages[: index + 1], context)
        if not context.startswith(text):
            raise InputError(
                "the chat template of the base's tokenizer rewrites earlier answers in later "
                "turns, so that a conversation is no single text; make each turn a row"
            )
        turns += [context.removeprefix(text), answer]
        text = context + answer
    return turns


def apply_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
) -> str:
    """Render messages like transformers' method of this name, on a fixed date and within limits.

    Args:
        tokenizer: has the template.
        prompt: has the arguments of the template.
        messages: the conversation.
        add_generation_prompt: whether to append what precedes the next answer.

    Raises:
        InputError: there is no template, or it refuses the messages, lacks an argument or exceeds
            a limit.
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
        "add_generation_prompt": add_generation_prompt,
    }
    limit = MAX_TEMPLATE_CHARACTERS + 16 * sum(len(message["content"]) for message in messages)
    parts, length = [], 0
    try:
        with time_limit():
            template = _compile_jinja_template(source)
            # transformers' own function returns the current date.
            template.globals["strftime_now"] = _strftime_now
            for part in template.generate(variables):
                parts.append(part)
                length += len(part)
                if length > limit:
                    raise EndlessTemplate(f"it writes more than {limit:,} characters")
    except (EndlessTemplate, MemoryError, RecursionError) as error:
        raise endless_template_error(error) from None
    except Exception as error:
        # Templates call methods of Python types and can raise errors of any type.
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            "prompt.chat: the chat template of the base's tokenizer (chat_template.jinja or "
            f"tokenizer_config.json) refuses the messages {roles}: {error}; mend it, or write the "
            "prompt as `question` and `answer`"
        ) from None
    return "".join(parts)


def _strftime_now(date_format: str) -> str:
    return TEMPLATE_CLOCK.strftime(date_format)


def _assistant_turn(
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    messages: Sequence[Message],
    context: str,
) -> str:
    """Return the last message of a conversation, an answer, with its ending.

    Args:
        tokenizer: has the template.
        prompt: has the arguments of the template.
        messages: the conversation, which ends with the answer.
        context: the rendered conversation before the answer.
    """
    end = turn_ending(tokenizer, prompt).with_token
    text = apply_chat_template(tokenizer, prompt, messages, add_generation_prompt=False)
    if not text.startswith(context):
        return messages[-1]["content"] + end
    answer = text.removeprefix(context)
    # Some templates also write the tokenizer's end-of-sequence token after the last message.
    before, ending, _ = answer.rpartition(end) if end else ("", "", "")
    return before + ending if ending else answer.rstrip()


def _check_thinking(after_question: str, before_answer: str) -> None:
    """Refuse a template that opens a block of thoughts before the answer.

    Args:
        after_question: text of the prompt after the question, which may hold empty thoughts.
        before_answer: text before the answer on the answer's side.
    """
    tag = re.compile(r"[<\[](/?)[\w:|]*think\w*[>\]]", re.IGNORECASE)
    if tag.search(before_answer) or tag.findall(after_question)[-1:] == [""]:
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
    """A sequence of tokens with the spans of its targets, which are trained on and scored.

    Attributes:
        ids: token ids of one document, or of several packed documents.
        prompt_length: number of ids before the first target.
        spans: start and end, exclusive, of every run of targets; if empty, everything after the
            prompt is a target, including the end-of-sequence token.
        document_starts: where the documents begin. Each document attends only to itself, and its
            positions start at 0.
    """

    ids: list[int]
    prompt_length: int
    spans: tuple[tuple[int, int], ...] = ()
    document_starts: tuple[int, ...] = (0,)

    @property
    def target_spans(self) -> tuple[tuple[int, int], ...]:
        """Return start and end, exclusive, of every run of targets."""
        return self.spans or ((self.prompt_length, len(self.ids)),)

    @property
    def targets(self) -> int:
        """Return the number of target tokens."""
        return sum(end - begin for begin, end in self.target_spans)

    @property
    def document_lengths(self) -> list[int]:
        """Return the number of tokens of each document."""
        return [end - begin for begin, end in pairwise([*self.document_starts, len(self.ids)])]


def concatenate(examples: Sequence[Example]) -> Example:
    """Return one packed sequence of several examples, whose documents stay independent."""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    starts: list[int] = []
    for example in examples:
        offset = len(ids)
        ids += example.ids
        spans += [(offset + begin, offset + end) for begin, end in example.target_spans]
        starts += [offset + start for start in example.document_starts]
    return Example(ids, spans[0][0], tuple(spans), tuple(starts))


# Every evaluation encodes the same questions.
@lru_cache(maxsize=2**16)
def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, question: str
) -> list[int]:
    """Return the token ids of a question in its prompt, after the tokenizer's special tokens."""
    text = resolve_template(tokenizer, prompt).render_question(question)
    return _extend(tokenizer, [], "", text, special=not prompt.chat)


@lru_cache(maxsize=2**17)
def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    question: str,
    answer: str,
    max_length: int | None = None,
) -> Example:
    """Return a question with its answer as an example, encoded like in TOFU's code.

    Question and answer are tokenized together; the tokens of the question are the prompt. One
    end-of-sequence token follows, or with `prompt.chat` the token with which the template ends an
    answer, unless the text was cut at `max_length`. If a token would span the boundary, the two
    sides are tokenized separately, so that training uses the prompt from which generation starts.
    """
    text_prompt = resolve_template(tokenizer, prompt)
    turns = [text_prompt.render_question(question), text_prompt.render_answer(answer)]
    end = end_token(tokenizer, prompt, chat=prompt.chat)
    return _encode_turns(tokenizer, turns, max_length, end, special=not prompt.chat)


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    messages: Sequence[Message],
    max_length: int | None = None,
) -> Example:
    """Return a conversation in the tokenizer's chat template as an example.

    All answers are targets, with the ending that the template writes. The last answer ends with an
    end-of-sequence token if the template has no token of its own.
    """
    turns = chat_turns(tokenizer, prompt, messages)
    end = end_token(tokenizer, prompt, chat=True)
    return _encode_turns(tokenizer, turns, max_length, end, special=False)


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, max_length: int | None = None
) -> Example:
    """Return a text with its end-of-sequence token as an example; all but the first are targets."""
    (ids,) = encode_texts(tokenizer, [text])
    return Example(ids=ids[:max_length], prompt_length=1)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of several texts, each with its end-of-sequence token."""
    encoded = tokenizer(list(texts))["input_ids"]
    return [[*_drop_end_token(tokenizer, ids), tokenizer.eos_token_id] for ids in encoded]


def _encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[str],
    max_length: int | None,
    end: int,
    special: bool,
) -> Example:
    """Return an example of turns: the second, fourth and so on are targets; token `end` follows."""
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
    bounds = zip(ends[::2], ends[1::2], strict=True)
    spans = tuple((begin, min(end, len(ids))) for begin, end in bounds if begin < len(ids))
    return Example(ids, ends[0], spans)


def _extend(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, turn: str, special: bool
) -> list[int]:
    """Return the token ids of a text with one more turn; they begin with `ids`, its own."""
    extended = tokenizer(text + turn, add_special_tokens=special)["input_ids"]
    if special:
        extended = _drop_end_token(tokenizer, extended)
    if extended[: len(ids)] == ids:
        return list(extended)
    return ids + list(tokenizer(turn, add_special_tokens=False)["input_ids"])


def _drop_end_token(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
