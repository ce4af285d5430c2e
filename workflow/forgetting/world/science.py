"""Questions of ARC's kind: which of four things belongs to a class, or does a certain job."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from .schema import Row
from .tables import table

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
    members = {kind: things.split(";") for kind, things in table(_CLASSES)}
    tools = table(_TOOLS)
    items = []
    for kind, things in members.items():
        others = tuple(t for k, ts in members.items() if k != kind for t in ts)
        for thing in things:
            for wording in _CLASS_QUESTIONS:
                items.append(ScienceItem(_asked(wording, kind), thing, others))
    for job, tool in tools:
        others = tuple(t for _, t in tools if t != tool)
        for wording in _TOOL_QUESTIONS:
            items.append(ScienceItem(wording.format(job=job), tool, others))
    return items


def _asked(wording: str, kind: str) -> str:
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
