"""One-line functions of HumanEval's kind, with tests that run."""

from __future__ import annotations

from random import Random
from typing import Any

from .schema import Row
from .tables import table

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
    name, given, returned, description, expression = (
        part.format(k=k, v=argument) for part in template
    )
    body = f"    return {expression}\n"
    prompt = f'def {name}({argument}: {given}) -> {returned}:\n    """Return {description}."""\n'
    # The templates above are the only text that is ever evaluated here.
    asserts = [
        f"    assert candidate({value!r}) == {eval(expression, {argument: value})!r}\n"
        for value in _INPUTS[given]
    ]
    return {
        "prompt": prompt,
        "canonical_solution": body,
        "test": "\n\ndef check(candidate):\n" + "".join(asserts),
        "entry_point": name,
    }


def one_line_functions(count: int, rng: Random) -> list[Row]:
    """Rows with different prompts, in the columns of `openai/openai_humaneval`."""
    rows: dict[str, Row] = {}
    templates = table(_TEMPLATES)
    while len(rows) < count:
        template = rng.choice(templates)
        argument = rng.choice(_ARGUMENTS[template[1]])
        row = _function(template, rng.randint(2, 9), argument)
        rows[row["prompt"]] = row
    return [{"task_id": f"Micro/{number}", **row} for number, row in enumerate(rows.values())]
