"""Find and check the chat template of a model folder from its source, without rendering it."""

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
"""Arguments by which templates switch a model's thinking on or off, or limit its length."""

MAX_SECONDS = 10
"""Time limit of a template for one conversation."""


class _Generation(Extension):
    """The tag `{% generation %}`, with which transformers marks answers of the assistant."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the content of the tag like any other part of the template."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


# The environment only parses; it never renders.
TEMPLATE_ENVIRONMENT = Environment(extensions=[_Generation, loopcontrols], autoescape=True)


def read_chat_template(folder: Path) -> str | None:
    """Return the source of the chat template that transformers uses for a folder, if any.

    Raises:
        InputError: the template is not UTF-8 text.
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
        config = read_foreign_json(folder / "tokenizer_config.json")
        return default_template(config.get("chat_template"))
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return None


def default_template(template: Any) -> str | None:
    """Return the default template of a tokenizer, which may have several."""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) and template else None


class EndlessTemplate(Exception):
    """A template exceeds its limit of time or characters."""


@contextmanager
def time_limit(seconds: int = MAX_SECONDS) -> Iterator[None]:
    """Raise `EndlessTemplate` in a block that takes longer.

    Only the main thread can be interrupted; other threads have no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise EndlessTemplate(f"it takes longer than {seconds} s")

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def endless_template_error(error: BaseException) -> InputError:
    """Return the error for a template that exceeds a limit of time, characters or memory."""
    return InputError(
        "the chat template of the base's tokenizer does not end "
        f"({str(error) or type(error).__name__}); mend it, or write the prompt as `question` and "
        "`answer`"
    )


@lru_cache(maxsize=8)
def template_arguments(source: str) -> frozenset[str]:
    """Return the names of the arguments that a template reads.

    Raises:
        InputError: the template is invalid, or its output is random.
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
        raise endless_template_error(error) from None
    if "lipsum" in names or any(node.name == "random" for node in tree.find_all(nodes.Filter)):
        raise InputError(
            "the chat template of the base's tokenizer writes something else each time (`random` "
            "or `lipsum`); take that out of the template"
        )
    known = {*RESERVED_ARGUMENTS, *TEMPLATE_ENVIRONMENT.globals}
    return frozenset(name for name in names if name not in known and not name.endswith("_token"))


def check_arguments(source: str, prompt: PromptConfig, at: LocateKey = dotted) -> None:
    """Refuse arguments that a template does not read, and an undecided thinking mode.

    Args:
        source: of the template.
        prompt: holds the arguments of the study.
        at: formats a key of the study for messages.

    Raises:
        InputError: names the argument and the remedy.
    """
    names = template_arguments(source)
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
            f"{{{switches[0]}: {value}}}`, or another value if thoughts are part of the answers"
        )
