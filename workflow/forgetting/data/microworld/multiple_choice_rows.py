"""Multiple-choice rows like those of HellaSwag and ARC, generated from templates.

- HellaSwag: short scenes with four endings, one of which continues the scene.
- ARC: questions about the members of a class, or the tool for a job.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from forgetting.data.microworld.entities import parse_table
from forgetting.data.table_files import Row

# activity | beginning of the scene | objects | endings
_ACTIVITIES = parse_table("""
Washing|stands in the yard with a bucket and a dirty {o}|car;dog;bicycle;carpet|\
scrubs the {o} with soap;rinses the {o} with water
Cooking|puts a pot on the stove and takes a {o}|potato;carrot;fish;chicken|\
cuts the {o} into small pieces;fries the {o} in butter
Fishing|sits by the lake and sees a {o}|trout;pike;carp;salmon|\
pulls the {o} out of the water;lets the {o} swim away
Painting|opens a can of paint beside a {o}|fence;door;wall;chair|\
covers the {o} with red paint;paints the {o} with a brush
Reading|sits down in the library with a {o}|novel;letter;newspaper;poem|\
reads the {o} to the last line;folds the {o} and sighs
Gardening|digs a hole for a {o}|rose;bush;tulip;cherry tree|\
puts the {o} into the earth;waters the {o} every day
Sewing|takes needle and thread for a torn {o}|shirt;coat;dress;sock|\
mends the {o} with small stitches;sews a patch on the {o}
Music|walks onto the stage with a {o}|violin;guitar;trumpet;flute|\
plays a slow song on the {o};tunes the {o} with care
Building|brings boards and nails for a {o}|table;shed;shelf;bench|\
hammers the {o} together;saws wood for the {o}
Shopping|goes into a shop and sees a {o}|hat;lamp;watch;scarf|\
pays for the {o} at the counter;asks how much the {o} costs
Baking|mixes flour and eggs for a {o}|cake;pie;loaf;biscuit|\
puts the {o} into the oven;lets the {o} cool on the window
Skating|ties the laces and looks at the {o}|pond;rink;canal;ramp|\
glides across the {o};slips and falls on the {o}
""")
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
    """Return rows in the columns of `Rowan/hellaswag`, without the beginnings in `excluded`.

    One wrong ending has the right activity with another object, two have other activities.
    """
    rows: dict[str, Row] = {}
    while len(rows) < count:
        activity, *others = rng.sample(_ACTIVITIES, 3)
        label, beginning, objects, continuations = activity
        thing, other_thing = rng.sample(objects.split(";"), 2)
        ending = rng.choice(continuations.split(";"))
        wrong = [ending.format(o=other_thing)]
        for _, _, other_objects, other_endings in others:
            other_ending = rng.choice(other_endings.split(";"))
            wrong.append(other_ending.format(o=rng.choice(other_objects.split(";"))))
        endings = [ending.format(o=thing), *wrong]
        right = endings[0]
        rng.shuffle(endings)
        (who, pronoun), when = rng.choice(_WHO), rng.choice(_WHEN)
        first = f"{when}{who.lower() if when else who} {beginning.format(o=thing)}."
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
    """Return the scene with its right ending, as the benchmark presents it."""
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
    """A question with its right answer and the possible wrong answers."""

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
    """Return training and test items; a test item asks for a known fact in a new wording.

    At most one wording of a fact is held out, so that a model can learn every fact from the others.
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
    """Return rows in the columns of `allenai/ai2_arc`."""
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
