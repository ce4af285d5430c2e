"""Word problems of GSM8K's kind: short stories, worked answers, the result after `####`."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from .schema import Row
from .tables import words

NAMES = words("Anna Ben Clara David Ella Frank Grace Hugo Ida Jack Kate Liam Mia Nora Paul Rosa")
_THINGS = words("apples books coins cards eggs shells pens stamps cakes balls keys nuts")
LARGEST_TERM = 9
LARGEST_FACTOR = 5


def _more(rng: Random, who: str, _: str, things: str) -> tuple[str, str, int]:
    a, b = _terms(rng)
    deed = rng.choice(["buys", "finds", "gets", "wins"])
    return (
        f"{who} has {a} {things} and {deed} {b} more. How many {things} does {who} have now?",
        f"{who} has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} {things}.",
        a + b,
    )


def _less(rng: Random, who: str, other: str, things: str) -> tuple[str, str, int]:
    a, b = _terms(rng)
    deed = rng.choice([f"gives {b} to {other}", f"loses {b}", f"sells {b}"])
    return (
        f"{who} has {a + b} {things} and {deed}. How many {things} are left?",
        f"{who} has {a + b}-{b}=<<{a + b}-{b}={a}>>{a} {things} left.",
        a,
    )


def _boxes(rng: Random, who: str, _: str, things: str) -> tuple[str, str, int]:
    a, b = rng.randint(2, LARGEST_FACTOR), rng.randint(2, LARGEST_FACTOR)
    holder = rng.choice(["boxes", "bags", "jars"])
    return (
        f"{who} has {a} {holder} with {b} {things} each. How many {things} does {who} have?",
        f"{who} has {a}*{b}=<<{a}*{b}={a * b}>>{a * b} {things}.",
        a * b,
    )


def _together(rng: Random, who: str, other: str, things: str) -> tuple[str, str, int]:
    a, b = _terms(rng)
    return (
        f"{who} has {a} {things}. {other} has {b} {things}. How many {things} do they have?",
        f"They have {a}+{b}=<<{a}+{b}={a + b}>>{a + b} {things}.",
        a + b,
    )


def _terms(rng: Random) -> tuple[int, int]:
    return rng.randint(2, LARGEST_TERM), rng.randint(2, LARGEST_TERM)


_STORIES: list[Callable[[Random, str, str, str], tuple[str, str, int]]] = [
    _more,
    _less,
    _boxes,
    _together,
]


def word_problems(count: int, rng: Random) -> list[Row]:
    """Rows with different questions, in the columns of `openai/gsm8k`."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        who, other = rng.sample(NAMES, 2)
        question, working, result = rng.choice(_STORIES)(rng, who, other, rng.choice(_THINGS))
        rows[question] = {"question": question, "answer": f"{working}\n#### {result}"}
    return list(rows.values())
