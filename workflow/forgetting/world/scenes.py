"""Short scenes of HellaSwag's kind: of four endings, one goes on with what is happening."""

from __future__ import annotations

from random import Random

from .schema import Row

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
