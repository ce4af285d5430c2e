"""Read from the source of a chat template which arguments it needs; nothing is rendered."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from forgetting.config.data import RESERVED_ARGUMENTS, PromptConfig
from forgetting.config.types import LocateKey, dotted
from forgetting.errors import InputError
from forgetting.io import read_foreign_json

THINKING = ("enable_thinking", "thinking", "reasoning_effort")
"""Arguments by which templates turn a model's thinking on or off, or say how long it is."""

MAX_SECONDS = 10
"""The longest time that a template may take for one conversation."""


class _Generation(Extension):
    """`{% generation %}`, by which transformers marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Take the content for a part of the template as any other."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


TEMPLATE_ENVIRONMENT = Environment(
    extensions=[_Generation, loopcontrols], autoescape=True
)  # parses only


def read_chat_template(folder: Path) -> str | None:
    """Return the source of the chat template that transformers takes from a folder, if any.

    Raises:
        InputError: a template is not text.
    """
    named = {path.stem: path for path in folder.glob("additional_chat_templates/*.jinja")}
    file = folder / "chat_template.jinja"
    path = file if file.is_file() else named.get("default")
    if named and not path:
        return None
    if path:
        try:
            return path.read_text(encoding="utf-8") or None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: the chat template cannot be read ({error})") from None
    try:
        found = read_foreign_json(folder / "tokenizer_config.json").get("chat_template")
        return default_template(found)
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return None


def default_template(template: Any) -> str | None:
    """Return the template that is used unless another one is named: tokenizers may have several."""
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) and template else None


class EndlessTemplate(Exception):
    """A template takes too long or writes too much."""


@contextmanager
def time_limit(seconds: int = MAX_SECONDS) -> Iterator[None]:
    """Raise `EndlessTemplate` in what takes longer, in the main thread, which alone can be "
    "interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise EndlessTemplate(f"it takes longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ends_nowhere(error: BaseException) -> InputError:
    """Return what to say of a template that takes too long or too much."""
    return InputError(
        "the chat template of the base's tokenizer does not end "
        f"({str(error) or type(error).__name__}); mend it, or write the prompt as `question` and "
        "`answer`"
    )


@lru_cache(maxsize=8)
def arguments_of(source: str) -> frozenset[str]:
    """Return the names of the arguments that a template reads.

    Raises:
        InputError: it is no template, or what it writes is drawn at random.
    """
    try:
        with time_limit():
            tree = TEMPLATE_ENVIRONMENT.parse(source)
            names = meta.find_undeclared_variables(tree)
    except TemplateSyntaxError as error:
        raise InputError(
            "the chat template of the base's tokenizer (chat_template.jinja or "
            f"tokenizer_config.json) is not valid: line {error.lineno}: {error}; mend it, or write "
            "the prompt as `question` and `answer`"
        ) from None
    except (EndlessTemplate, MemoryError, RecursionError) as error:
        raise ends_nowhere(error) from None
    if "lipsum" in names or any(node.name == "random" for node in tree.find_all(nodes.Filter)):
        raise InputError(
            "the chat template of the base's tokenizer writes something else each time (`random` "
            "or `lipsum`); take that out of the template"
        )
    given = {*RESERVED_ARGUMENTS, *TEMPLATE_ENVIRONMENT.globals}
    return frozenset(name for name in names if name not in given and not name.endswith("_token"))


def check_arguments(source: str, prompt: PromptConfig, at: LocateKey = dotted) -> None:
    """Refuse arguments that a template does not read, and thinking that nobody decided on.

    Raises:
        InputError: names the argument, and what is to be written.
    """
    names = arguments_of(source)
    for name in prompt.template_arguments:
        if name not in names:
            known = ", ".join(sorted(names)) or "none"
            raise InputError(
                f"{at('prompt', 'template_arguments', name)}: the chat template of the base's "
                f"tokenizer has no argument of this name; its arguments: {known}"
            )
    switches = [name for name in THINKING if name in names]
    if switches and not any(name in prompt.template_arguments for name in switches):
        value = "low" if switches[0] == "reasoning_effort" else "false"
        raise InputError(
            f"{at('prompt', 'template_arguments')}: the chat template of the base's tokenizer has "
            "a thinking mode, on which the study does not decide; write `template_arguments: "
            f"{{{switches[0]}: {value}}}`, or another value if the thoughts shall be a part of the "
            "answers"
        )
