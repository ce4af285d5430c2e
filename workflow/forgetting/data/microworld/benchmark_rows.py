"""Rows like those of GSM8K, HumanEval and WinoGrande, generated from templates.

- GSM8K: word problems with a worked answer and the result after `####`.
- HumanEval: one-line functions with tests that run.
- WinoGrande: sentences whose last words decide which of two options is meant.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from forgetting.data.microworld.entities import parse_table, parse_words
from forgetting.data.table_files import Row

NAMES = parse_words(
    "Anna Ben Clara David Ella Frank Grace Hugo Ida Jack Kate Liam Mia Nora Paul Rosa"
)
_COUNTED_THINGS = parse_words(
    "apples books coins cards eggs shells pens stamps cakes balls keys nuts"
)
LARGEST_TERM = 9
LARGEST_FACTOR = 5


def _more_story(rng: Random, who: str, _: str, things: str) -> tuple[str, str, int]:
    a, b = _terms(rng)
    verb = rng.choice(["buys", "finds", "gets", "wins"])
    return (
        f"{who} has {a} {things} and {verb} {b} more. How many {things} does {who} have now?",
        f"{who} has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} {things}.",
        a + b,
    )


def _less_story(rng: Random, who: str, other: str, things: str) -> tuple[str, str, int]:
    a, b = _terms(rng)
    action = rng.choice([f"gives {b} to {other}", f"loses {b}", f"sells {b}"])
    return (
        f"{who} has {a + b} {things} and {action}. How many {things} are left?",
        f"{who} has {a + b}-{b}=<<{a + b}-{b}={a}>>{a} {things} left.",
        a,
    )


def _boxes_story(rng: Random, who: str, _: str, things: str) -> tuple[str, str, int]:
    a, b = rng.randint(2, LARGEST_FACTOR), rng.randint(2, LARGEST_FACTOR)
    holder = rng.choice(["boxes", "bags", "jars"])
    return (
        f"{who} has {a} {holder} with {b} {things} each. How many {things} does {who} have?",
        f"{who} has {a}*{b}=<<{a}*{b}={a * b}>>{a * b} {things}.",
        a * b,
    )


def _sum_story(rng: Random, who: str, other: str, things: str) -> tuple[str, str, int]:
    a, b = _terms(rng)
    return (
        f"{who} has {a} {things}. {other} has {b} {things}. How many {things} do they have?",
        f"They have {a}+{b}=<<{a}+{b}={a + b}>>{a + b} {things}.",
        a + b,
    )


def _terms(rng: Random) -> tuple[int, int]:
    return rng.randint(2, LARGEST_TERM), rng.randint(2, LARGEST_TERM)


_STORIES: list[Callable[[Random, str, str, str], tuple[str, str, int]]] = [
    _more_story,
    _less_story,
    _boxes_story,
    _sum_story,
]


def word_problems(count: int, rng: Random) -> list[Row]:
    """Return rows with different questions, in the columns of `openai/gsm8k`."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        who, other = rng.sample(NAMES, 2)
        question, working, result = rng.choice(_STORIES)(
            rng, who, other, rng.choice(_COUNTED_THINGS)
        )
        rows[question] = {"question": question, "answer": f"{working}\n#### {result}"}
    return list(rows.values())


# name | signature type | return type | description | expression; {k} is a number, {v} the argument
_TEMPLATES = """
add_{k}|int|int|{v} plus {k}|{v} + {k}
subtract_{k}|int|int|{v} minus {k}|{v} - {k}
times_{k}|int|int|{v} times {k}|{v} * {k}
power_{k}|int|int|{v} to the power of {k}|{v} ** {k}
remainder_{k}|int|int|the remainder of {v} divided by {k}|{v} % {k}
at_least_{k}|int|int|the larger of {v} and {k}|max({v}, {k})
at_most_{k}|int|int|the smaller of {v} and {k}|min({v}, {k})
is_multiple_of_{k}|int|bool|True if {v} is a multiple of {k}|{v} % {k} == 0
is_greater_than_{k}|int|bool|True if {v} is greater than {k}|{v} > {k}
is_less_than_{k}|int|bool|True if {v} is less than {k}|{v} < {k}
repeat_{k}|str|str|{v} repeated {k} times|{v} * {k}
first_{k}|str|str|the first {k} letters of {v}|{v}[:{k}]
last_{k}|str|str|the last {k} letters of {v}|{v}[-{k}:]
without_first_{k}|str|str|{v} without its first {k} letters|{v}[{k}:]
longer_than_{k}|str|bool|True if {v} has more than {k} letters|len({v}) > {k}
upper_first_{k}|str|str|the first {k} letters of {v} in upper case|{v}[:{k}].upper()
add_{k}_to_each|list|list|each number of {v} plus {k}|[n + {k} for n in {v}]
times_{k}_each|list|list|each number of {v} times {k}|[n * {k} for n in {v}]
keep_above_{k}|list|list|the numbers of {v} above {k}|[n for n in {v} if n > {k}]
keep_below_{k}|list|list|the numbers of {v} below {k}|[n for n in {v} if n < {k}]
count_{k}|list|int|how often {k} is in {v}|{v}.count({k})
has_{k}|list|bool|True if {k} is in {v}|{k} in {v}
sum_plus_{k}|list|int|the sum of {v} plus {k}|sum({v}) + {k}
largest_plus_{k}|list|int|the largest of {v} plus {k}|max({v}) + {k}
smallest_{k}|list|list|the {k} smallest numbers of {v}|sorted({v})[:{k}]
"""
_ARGUMENTS = {
    "int": ["x", "n", "value", "number"],
    "str": ["s", "text", "word", "line"],
    "list": ["xs", "values", "numbers", "items"],
}
_INPUTS: dict[str, list[Any]] = {
    "int": [0, 1, 4, 7, 12, 20, -5],
    "str": ["", "a", "tree", "window", "mountains"],
    "list": [[3], [1, 2, 3, 4, 5], [9, 8, 2, 7, 7], [-4, 0, 6, 12, 5, 3]],
}


def _function(template: list[str], k: int, argument: str) -> Row:
    name, argument_type, return_type, description, expression = (
        cell.format(k=k, v=argument) for cell in template
    )
    body = f"    return {expression}\n"
    signature = f"def {name}({argument}: {argument_type}) -> {return_type}:"
    prompt = f'{signature}\n    """Return {description}."""\n'
    # Only expressions of the templates above are evaluated.
    asserts = [
        f"    assert candidate({value!r}) == {eval(expression, {argument: value})!r}\n"
        for value in _INPUTS[argument_type]
    ]
    return {
        "prompt": prompt,
        "canonical_solution": body,
        "test": "\n\ndef check(candidate):\n" + "".join(asserts),
        "entry_point": name,
    }


def one_line_functions(count: int, rng: Random) -> list[Row]:
    """Return rows with different prompts, in the columns of `openai/openai_humaneval`."""
    rows: dict[str, Row] = {}
    templates = parse_table(_TEMPLATES)
    while len(rows) < count:
        template = rng.choice(templates)
        argument = rng.choice(_ARGUMENTS[template[1]])
        row = _function(template, rng.randint(2, 9), argument)
        rows[row["prompt"]] = row
    return [{"task_id": f"Micro/{number}", **row} for number, row in enumerate(rows.values())]


# sentence up to the blank | ending if the first option is meant | ending if the second is meant
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
_PRONOUN_THINGS = parse_words("ball box cup stone plate book vase lamp brick shoe bottle basket")


def pronoun_sentences(count: int, rng: Random, excluded: frozenset[str]) -> list[Row]:
    """Return rows in the columns of `allenai/winogrande`, without the sentences in `excluded`."""
    templates = [(row, NAMES) for row in parse_table(_ABOUT_PEOPLE)]
    templates += [(row, _PRONOUN_THINGS) for row in parse_table(_ABOUT_THINGS)]
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
    """Return the sentence with the right option in its blank."""
    option = row["option1"] if row["answer"] == "1" else row["option2"]
    text: str = row["sentence"].replace("_", option)
    return text
