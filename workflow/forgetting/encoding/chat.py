"""Chat templates: what a tokenizer puts around the messages of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from forgetting.records import InputError
from forgetting.sections.prompt import Prompt

Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`."""

DATE = "26 Jul 2024"
"""Llama 3 writes a date into every prompt; the day of the run would make each day another study."""


@lru_cache(maxsize=8)
def literal(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Prompt:
    """The prompt as text around question and answer, whether the study or the tokenizer has it."""
    if not prompt.chat:
        return prompt
    question = [*_system(prompt), {"role": "user", "content": "{question}"}]
    asked = render(tokenizer, question, ask=True)
    whole = render(tokenizer, [*question, {"role": "assistant", "content": "{answer}"}], ask=False)
    answer = whole.rstrip().removeprefix(asked) if whole.startswith(asked) else "{answer}"
    try:
        return Prompt(question=asked, answer=answer)
    except ValueError:
        raise InputError(
            "prompt.chat: the chat template of the base's tokenizer does not repeat question and "
            "answer as they are; write the prompt as `question` and `answer`"
        ) from None


def sides(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, messages: Sequence[Message]
) -> list[str]:
    """A conversation in turns: what the model reads, what it is to say, and so on to its last word.

    Raises:
        InputError: the template changes what was said before, or refuses the conversation.
    """
    if messages[0]["role"] != "system":
        messages = [*_system(prompt), *messages]
    told, turns = "", []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = render(tokenizer, messages[:place], ask=True)
        answered = render(tokenizer, messages[: place + 1], ask=False).rstrip()
        if not answered.startswith(asked):
            answered = asked + message["content"]
        if not asked.startswith(told):
            raise InputError(
                "the chat template of the base's tokenizer writes earlier answers anew in later "
                "turns, so that a conversation is no single text; make each turn a row"
            )
        turns += [asked.removeprefix(told), answered.removeprefix(asked)]
        told = answered
    return turns


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, ask: bool) -> str:
    """Messages in the tokenizer's template; `ask`: up to where an answer begins."""
    if not tokenizer.chat_template:
        raise InputError(
            "prompt.chat: the base's tokenizer has no chat template; write the prompt as "
            "`question` and `answer`, or take a base that was tuned to chat"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=ask, date_string=DATE
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"prompt.chat: the base's chat template refuses the messages {roles}: {error}"
        ) from None
    return text


def _system(prompt: Prompt) -> list[Message]:
    return [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
