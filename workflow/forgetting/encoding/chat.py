"""Chat templates: what a tokenizer puts around the messages of a conversation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from forgetting.records import InputError
from forgetting.sections.prompt import Prompt
from forgetting.settings.chat_template import (
    THINKING,
    Endless,
    check_arguments,
    default_template,
    endless,
    within,
)

Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`."""

TODAY = datetime(2024, 7, 26, tzinfo=UTC)
"""The day on which all templates are rendered: some write the date into every prompt, and the day
of the run would make each day another study."""

LONGEST = 2**20
"""Characters that a template may add to a conversation, besides 16 for each character of it."""

QUESTION, ANSWER, NEXT = "{question}", "{answer}", "{next question}"


@dataclass(frozen=True)
class Ending:
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


def literal(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Prompt:
    """The prompt as text around question and answer, whether the study or the tokenizer has it."""
    return chat_literal(tokenizer, prompt) if prompt.chat else prompt


@lru_cache(maxsize=8)
def chat_literal(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Prompt:
    """Return the text that the chat template of a tokenizer puts around a question and its answer.

    Raises:
        InputError: the template changes question or answer, or has the model think unasked.
    """
    question = [*_system(prompt), {"role": "user", "content": QUESTION}]
    asked = render(tokenizer, prompt, question, ask=True)
    talk = [*question, {"role": "assistant", "content": ANSWER}]
    answer = _answer_side(tokenizer, prompt, talk, asked)
    try:
        found = Prompt(question=asked, answer=answer)
    except ValueError:
        raise _rewrites() from None
    if not any(prompt.template_arguments.get(name) for name in THINKING):
        _check_thinking(asked.rpartition(QUESTION)[2], answer.partition(ANSWER)[0])
    return found


@lru_cache(maxsize=8)
def ending(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Ending:
    """Return how the chat template of a tokenizer ends an answer.

    Raises:
        InputError: nothing stands between an answer and the next question.
    """
    talk = [
        *_system(prompt),
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": NEXT},
    ]
    whole = render(tokenizer, prompt, talk, ask=False)
    _, answered, behind = whole.rpartition(ANSWER)
    between, asked, _ = behind.partition(NEXT)
    if not answered or not asked:
        raise _rewrites()
    added = tokenizer.added_tokens_decoder
    for token in tokenizer(between, add_special_tokens=False)["input_ids"]:
        # Some tokenizers add runs of spaces too.
        if token in added and (content := added[token].content).strip(" \t\n\r▁"):
            text = between.partition(content)[0]
            return Ending(text, token, text + content)
    if not between.strip("\t "):
        raise InputError(
            "prompt.chat: the chat template of the base's tokenizer puts nothing between an answer "
            "and the next question, so that no answer would end; write the prompt as `question` "
            "and `answer`"
        )
    return Ending(between, None, "")


def end_token(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, chat: bool) -> int:
    """Return the token that the last answer of an example is trained to end with.

    In a chat template it is the template's own, so that a tuned model ends an answer as its base
    does; else the tokenizer's end of sequence.
    """
    token = ending(tokenizer, prompt).token if chat else None
    return int(tokenizer.eos_token_id if token is None else token)


def sides(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, messages: Sequence[Message]
) -> list[str]:
    """A conversation in turns: what the model reads, what it is to say, and so on to its last word.

    Raises:
        InputError: the template changes what was said before, or refuses the conversation.
    """
    chat_literal(tokenizer, prompt)  # raises where the template is not fit for training
    if messages[0]["role"] != "system":
        messages = [*_system(prompt), *messages]
    told, turns = "", []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = render(tokenizer, prompt, messages[:place], ask=True)
        answer = _answer_side(tokenizer, prompt, messages[: place + 1], asked)
        if not asked.startswith(told):
            raise InputError(
                "the chat template of the base's tokenizer writes earlier answers anew in later "
                "turns, so that a conversation is no single text; make each turn a row"
            )
        turns += [asked.removeprefix(told), answer]
        told = asked + answer
    return turns


def render(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, messages: Sequence[Message], *, ask: bool
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
    most = LONGEST + 16 * sum(len(message["content"]) for message in messages)
    parts, size = [], 0
    try:
        with within():
            template = _compile_jinja_template(source)
            # transformers' own tells the time of the run.
            template.globals["strftime_now"] = _strftime_now
            for part in template.generate(variables):
                parts.append(part)
                size += len(part)
                if size > most:
                    raise Endless(f"it writes more than {most:,} characters")
    except (Endless, MemoryError, RecursionError) as error:
        raise endless(error) from None
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
    return TODAY.strftime(form)


def _answer_side(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, talk: Sequence[Message], asked: str
) -> str:
    """What the assistant is to say to the last message of a conversation, with its ending."""
    end = ending(tokenizer, prompt).written
    whole = render(tokenizer, prompt, talk, ask=False)
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


def _rewrites() -> InputError:
    return InputError(
        "prompt.chat: the chat template of the base's tokenizer does not repeat question and "
        "answer as they are; write the prompt as `question` and `answer`"
    )


def _system(prompt: Prompt) -> list[Message]:
    return [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
