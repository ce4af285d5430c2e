"""Sentences of WinoGrande's kind: who or what is meant turns on one word near the end."""

from __future__ import annotations

from random import Random

from .arithmetic import NAMES
from .schema import Row
from .tables import table, words

# sentence up to the blank | ending if the first is meant | ending if the second is meant
_ABOUT_PEOPLE = """
{a} thanked {b} because _|had received a gift|had given a gift
{a} taught {b} chess because _|was a master|was a beginner
{a} visited {b} in hospital because _|was worried|was ill
{a} ran past {b} because _|was faster|was slower
{a} carried {b} home because _|was strong|was tired
"""
_ABOUT_THINGS = """
The {a} broke the {b} because the _|was hard|was fragile
"""
_THINGS = words("ball box cup stone plate book vase lamp brick shoe bottle basket")


def pronoun_sentences(count: int, rng: Random, excluded: frozenset[str]) -> list[Row]:
    """Rows in the columns of `allenai/winogrande`, with no sentence that is in `excluded`."""
    templates = [(row, NAMES) for row in table(_ABOUT_PEOPLE)]
    templates += [(row, _THINGS) for row in table(_ABOUT_THINGS)]
    rows: dict[str, Row] = {}
    while len(rows) < count:
        (start, *endings), pool = rng.choice(templates)
        a, b = rng.sample(pool, 2)
        meant = rng.randrange(2)
        sentence = f"{start.format(a=a, b=b)} {endings[meant]}."
        if sentence in excluded:
            continue
        rows[sentence] = {
            "sentence": sentence,
            "option1": a,
            "option2": b,
            "answer": str(meant + 1),
        }
    return list(rows.values())


def pronoun_text(row: Row) -> str:
    """The sentence with the right one of its options in the blank."""
    meant = row["option1"] if row["answer"] == "1" else row["option2"]
    text: str = row["sentence"].replace("_", meant)
    return text
