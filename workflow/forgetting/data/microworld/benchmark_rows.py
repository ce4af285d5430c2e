"""Short scenes of HellaSwag's kind: of four endings, one goes on with what is happening.

Questions of ARC's kind: which of four things belongs to a class, or does a certain job.

One-line functions of HumanEval's kind, with tests that run.

Word problems of GSM8K's kind: short stories, worked answers, the result after `####`.

Sentences of WinoGrande's kind: who or what is meant turns on one word near the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from forgetting.data.microworld.entities import Row, parse_table, parse_words

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
    deed = rng.choice(["buys", "finds", "gets", "wins"])
    return (
        f"{who} has {a} {things} and {deed} {b} more. How many {things} does {who} have now?",
        f"{who} has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} {things}.",
        a + b,
    )


def _less_story(rng: Random, who: str, other: str, things: str) -> tuple[str, str, int]:
    a, b = _terms(rng)
    deed = rng.choice([f"gives {b} to {other}", f"loses {b}", f"sells {b}"])
    return (
        f"{who} has {a + b} {things} and {deed}. How many {things} are left?",
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
    """Rows with different questions, in the columns of `openai/gsm8k`."""
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
    templates = parse_table(_TEMPLATES)
    while len(rows) < count:
        template = rng.choice(templates)
        argument = rng.choice(_ARGUMENTS[template[1]])
        row = _function(template, rng.randint(2, 9), argument)
        rows[row["prompt"]] = row
    return [{"task_id": f"Micro/{number}", **row} for number, row in enumerate(rows.values())]


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
_PRONOUN_THINGS = parse_words("ball box cup stone plate book vase lamp brick shoe bottle basket")


def pronoun_sentences(count: int, rng: Random, excluded: frozenset[str]) -> list[Row]:
    """Rows in the columns of `allenai/winogrande`, with no sentence that is in `excluded`."""
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
    """The sentence with the right one of its options in the blank."""
    meant = row["option1"] if row["answer"] == "1" else row["option2"]
    text: str = row["sentence"].replace("_", meant)
    return text


# activity | what happens first | objects | how it goes on
_ACTIVITIES = [
    (
        "Washing",
        "stands in the yard with a bucket and a dirty {o}",
        "car;dog;bicycle;carpet",
        "scrubs the {o} with soap;rinses the {o} with water",
    ),
    (
        "Cooking",
        "puts a pot on the stove and takes a {o}",
        "potato;carrot;fish;chicken",
        "cuts the {o} into small pieces;fries the {o} in butter",
    ),
    (
        "Fishing",
        "sits by the lake and sees a {o}",
        "trout;pike;carp;salmon",
        "pulls the {o} out of the water;lets the {o} swim away",
    ),
    (
        "Painting",
        "opens a can of paint beside a {o}",
        "fence;door;wall;chair",
        "covers the {o} with red paint;paints the {o} with a brush",
    ),
    (
        "Reading",
        "sits down in the library with a {o}",
        "novel;letter;newspaper;poem",
        "reads the {o} to the last line;folds the {o} and sighs",
    ),
    (
        "Gardening",
        "digs a hole for a {o}",
        "rose;bush;tulip;cherry tree",
        "puts the {o} into the earth;waters the {o} every day",
    ),
    (
        "Sewing",
        "takes needle and thread for a torn {o}",
        "shirt;coat;dress;sock",
        "mends the {o} with small stitches;sews a patch on the {o}",
    ),
    (
        "Music",
        "walks onto the stage with a {o}",
        "violin;guitar;trumpet;flute",
        "plays a slow song on the {o};tunes the {o} with care",
    ),
    (
        "Building",
        "brings boards and nails for a {o}",
        "table;shed;shelf;bench",
        "hammers the {o} together;saws wood for the {o}",
    ),
    (
        "Shopping",
        "goes into a shop and sees a {o}",
        "hat;lamp;watch;scarf",
        "pays for the {o} at the counter;asks how much the {o} costs",
    ),
    (
        "Baking",
        "mixes flour and eggs for a {o}",
        "cake;pie;loaf;biscuit",
        "puts the {o} into the oven;lets the {o} cool on the window",
    ),
    (
        "Skating",
        "ties the laces and looks at the {o}",
        "pond;rink;canal;ramp",
        "glides across the {o};slips and falls on the {o}",
    ),
]
_WHO = [
    ("A man", "he"),
    ("A woman", "she"),
    ("A boy", "he"),
    ("A girl", "she"),
    ("A farmer", "he"),
    ("A nurse", "she"),
    ("A king", "he"),
    ("A queen", "she"),
]
_WHEN = ["", "In the morning ", "On Sunday ", "After lunch "]


def scenes(count: int, split: str, rng: Random, excluded: frozenset[str]) -> list[Row]:
    """Rows in the columns of `Rowan/hellaswag`, none of whose first parts is in `excluded`.

    One wrong ending speaks of this scene's activity with another object, two of other activities.
    """
    rows: dict[str, Row] = {}
    while len(rows) < count:
        activity, *others = rng.sample(_ACTIVITIES, 3)
        label, start, objects, goes_on = activity
        thing, other_thing = rng.sample(objects.split(";"), 2)
        ending = rng.choice(goes_on.split(";"))
        wrong = [ending.format(o=other_thing)]
        for _, _, other_objects, other_endings in others:
            chosen = rng.choice(other_endings.split(";"))
            wrong.append(chosen.format(o=rng.choice(other_objects.split(";"))))
        endings = [ending.format(o=thing), *wrong]
        right = endings[0]
        rng.shuffle(endings)
        (who, pronoun), when = rng.choice(_WHO), rng.choice(_WHEN)
        first = f"{when}{who.lower() if when else who} {start.format(o=thing)}."
        if first in excluded or first in rows:
            continue
        rows[first] = {
            "ind": len(rows),
            "activity_label": label,
            "ctx_a": first,
            "ctx_b": pronoun,
            "ctx": f"{first} {pronoun}",
            "endings": [f"{text}." for text in endings],
            "source_id": f"micro~{split}{len(rows)}",
            "split": split,
            "split_type": "indomain",
            "label": str(endings.index(right)),
        }
    return list(rows.values())


def scene_text(row: Row) -> str:
    """The whole scene with its right ending, as the benchmark shows it."""
    ending = row["endings"][int(row["label"])]
    return f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()} {ending}"


# class | its members
_CLASSES = """
mammal|whale;bat;dolphin;horse;elephant;rabbit;seal;wolf
bird|eagle;owl;penguin;sparrow;swan;parrot;ostrich;raven
fish|salmon;shark;tuna;trout;carp;herring;cod;pike
reptile|snake;lizard;turtle;crocodile;gecko;iguana
insect|ant;bee;beetle;butterfly;mosquito;wasp;moth;cricket
amphibian|frog;toad;newt;salamander
metal|iron;copper;gold;silver;tin;zinc;nickel
gas|oxygen;nitrogen;helium;hydrogen;neon;argon
planet|Mars;Venus;Jupiter;Saturn;Neptune;Uranus
tree|oak;birch;maple;pine;willow;beech
rock|granite;marble;basalt;limestone;slate;chalk
organ|heart;liver;lung;kidney;stomach;brain
fruit|apple;cherry;banana;grape;lemon;peach
vegetable|carrot;onion;cabbage;spinach;leek;turnip
"""
_CLASS_QUESTIONS = (
    "Which of these is a {kind}?",
    "Which one is a kind of {kind}?",
    "Which word names a {kind}?",
    "What is an example of a {kind}?",
    "A teacher asks for a {kind}. Which answer is right?",
)

# job | tool
_TOOLS = """
measure temperature|thermometer
measure air pressure|barometer
measure length|ruler
measure mass|balance
measure time|clock
measure wind speed|anemometer
look at stars|telescope
look at cells|microscope
find north|compass
record earthquakes|seismograph
separate sand from pebbles|sieve
attract iron nails|magnet
lift water from a well|pump
split white light|prism
"""
_TOOL_QUESTIONS = (
    "Which tool is used to {job}?",
    "What do scientists use to {job}?",
    "A student wants to {job}. Which tool should she take?",
    "Which of these helps to {job}?",
)
CHOICES = 4
LABELS = ["A", "B", "C", "D"]


@dataclass(frozen=True)
class ScienceItem:
    """A question with its right answer and things that would be wrong."""

    question: str
    answer: str
    others: tuple[str, ...]


def _all_items() -> list[ScienceItem]:
    members = {kind: things.split(";") for kind, things in parse_table(_CLASSES)}
    tools = parse_table(_TOOLS)
    items = []
    for kind, things in members.items():
        others = tuple(t for k, ts in members.items() if k != kind for t in ts)
        for thing in things:
            for wording in _CLASS_QUESTIONS:
                items.append(ScienceItem(_science_question(wording, kind), thing, others))
    for job, tool in tools:
        others = tuple(t for _, t in tools if t != tool)
        for wording in _TOOL_QUESTIONS:
            items.append(ScienceItem(wording.format(job=job), tool, others))
    return items


def _science_question(wording: str, kind: str) -> str:
    text = wording.format(kind=kind)
    return text.replace(f"a {kind}", f"an {kind}") if kind[0] in "aeiou" else text


def science_items(test: int, rng: Random) -> tuple[list[ScienceItem], list[ScienceItem]]:
    """Training and test items: a test item asks for a known fact in a wording not yet seen for it.

    At most one wording of a fact is held out, so that every fact can be learnt from the others.
    """
    items = _all_items()
    rng.shuffle(items)
    seen: set[tuple[str, tuple[str, ...]]] = set()
    held_out: list[ScienceItem] = []
    training: list[ScienceItem] = []
    for item in items:
        fact = (item.answer, item.others)
        if fact not in seen and len(held_out) < test:
            seen.add(fact)
            held_out.append(item)
        else:
            training.append(item)
    return training, held_out


def science_rows(items: list[ScienceItem], split: str, rng: Random) -> list[Row]:
    """Rows in the columns of `allenai/ai2_arc`."""
    rows = []
    for number, item in enumerate(items):
        choices = [item.answer, *rng.sample(item.others, CHOICES - 1)]
        rng.shuffle(choices)
        rows.append(
            {
                "id": f"micro-{split}-{number:03d}",
                "question": item.question,
                "choices": {"text": choices, "label": LABELS},
                "answerKey": LABELS[choices.index(item.answer)],
            }
        )
    return rows
