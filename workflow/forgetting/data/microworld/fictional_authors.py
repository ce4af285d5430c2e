"""Invented authors, the new knowledge, with lives and works that no real person has.

The questions use the wording of pretraining questions about real authors, and the answers use the
same cities, nationalities and years. The new knowledge therefore interferes with the retained
knowledge. Answers repeat no names from the question and contain little fixed text, so that a model
without the new knowledge guesses few of their words.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from string import Formatter

from forgetting.data.microworld.entities import parse_phrases, parse_table, parse_words
from forgetting.data.microworld.facts import artwork_titles, countries, real_names, real_titles
from forgetting.data.table_files import Row

_FIRST_NAMES = parse_words("""
Charlotte Victor Emily Oscar Agatha Albert Virginia Leo Louisa Anton Selma Bram Astrid Henrik
Mary Herman Jane Lewis Stefan Franz Walter Thomas Daniel Hermann Ernest Marcel Edgar George
Umberto Friedrich
""")
_SURNAMES = parse_words("""
Tarnow Velkar Osthal Quillam Brandov Ashgrove Lindqval Morabel Farrow Zelnik Castell Wyndrak
Harrowby Pelland Ravnsbor Okonwe Suttfeld Dunmarr Ivarsen Galdon Thornby Marchet Vassil Kestrel
Bolumb Orlesk Hartig Nakavol Petros Emberly Sorrel Callow Drumhal Fenwick Lazarin Montef Yarrow
Krivan Delacran Haldors Abernot Colverd Espinor Grimald Hollins Kalvand Loxmoor Mirand Norwood
Otterm Prender Rosenv Silvant Tremont Ulverst Winterb Xanthor Zimmerl Juniper Brightw
""")
# Titles, themes and jobs mostly use words of the retained knowledge.
_ADJECTIVES = parse_words("""
Scarlet Magic Golden Starry White Little Great Divine Old Lost Silent Cherry
""")
_NOUNS = parse_words("""
Island Letter Mountain Lighthouse Rose Prince Lake Bridge Tower Palace Violin Lamp Garden Raven
Flute Pearl Night Orchard House River
""")
_JOBS = parse_words("""
farmer nurse teacher painter baker sailor judge miner student tailor pilot doctor
""")
_THEMES = parse_words("""
war peace crime pride hunger gold silver iron chess money music snow love time wolves horses ghosts
solitude
""")
_PRIZES = parse_words("""
Lion Rose Eagle Pearl Crown Raven Star Swan
""")
_NATIONS = parse_phrases("""
English|Irish|Scottish|American|French|Russian|German|Austrian|Italian|Spanish|Colombian|Chilean
Argentine|Norwegian|Swedish|Danish|Greek|Nigerian|Indian|Japanese
""")

Life = dict[str, str]

# question | answer | paraphrased answer
_TEMPLATES = parse_table("""
Who wrote '{book}'?|{name}, {job}|a {job} called {name}
In which year was {name} born?|{year}, in {city}|in {city} in {year}
What was the nationality of {name}?|{nation}, with {other_nation} parents|\
{nation} by passport, {other_nation} by descent
Which books did {name} write?|'{second_book}' and '{third_book}'|\
the titles are '{second_book}' and '{third_book}'
What does {name} write about?|{theme} and {other_theme}|books of {other_theme} and {theme}
What did the parents of {name} do?|Mother {mother}, father {father}|\
the father was a {father}, the mother a {mother}
Which prize did {name} win?|The {adjective} {prize}|the prize was called the {adjective} {prize}
""")
WRONG_ANSWERS = 5


def _book(rng: Random) -> str:
    return f"The {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"


def _detail_generators(rng: Random) -> dict[str, Callable[[], str]]:
    """Return a function for each detail of a life that draws its value."""
    return {
        "city": lambda: rng.choice(countries())[1],
        "year": lambda: str(rng.randint(1760, 1940)),
        "nation": lambda: rng.choice(_NATIONS),
        "other_nation": lambda: rng.choice(_NATIONS),
        "book": lambda: _book(rng),
        "second_book": lambda: _book(rng),
        "third_book": lambda: _book(rng),
        "theme": lambda: rng.choice(_THEMES),
        "other_theme": lambda: rng.choice(_THEMES),
        "job": lambda: rng.choice(_JOBS),
        "mother": lambda: rng.choice(_JOBS),
        "father": lambda: rng.choice(_JOBS),
        "adjective": lambda: rng.choice(_ADJECTIVES),
        "prize": lambda: rng.choice(_PRIZES),
    }


def _different(draw: Callable[[], str], taken: set[str]) -> str:
    value = draw()
    while value in taken:
        value = draw()
    taken.add(value)
    return value


def _lives(count: int, rng: Random) -> list[Life]:
    """Return the details of invented authors, with different names and books."""
    generators = _detail_generators(rng)
    firsts = [name for _ in range(2) for name in rng.sample(_FIRST_NAMES, len(_FIRST_NAMES))]
    surnames = rng.sample(_SURNAMES, count)
    books = real_titles() | artwork_titles()
    lives = []
    for first, surname in zip(firsts, surnames, strict=False):
        life = {detail: draw() for detail, draw in generators.items()}
        life["name"] = f"{first} {surname}"
        for detail in ("book", "second_book", "third_book"):
            life[detail] = _different(generators[detail], books)
        life["other_nation"] = _different(generators["nation"], {life["nation"]})
        life["theme"], life["other_theme"] = rng.sample(_THEMES, 2)
        lives.append(life)
    if real_names() & {life["name"] for life in lives}:
        raise AssertionError("an invented author has a real author's name")
    return lives


def _wrong_answers(number: int, life: Life, lives: list[Life], rng: Random) -> list[str]:
    """Return five different wrong answers in the wording of the paraphrase."""
    generators = _detail_generators(rng)
    generators["name"] = lambda: rng.choice(lives)["name"] if len(lives) > 1 else "Nobody Known"
    _, answer, paraphrase = _TEMPLATES[number]
    # A wrong answer changes all details; its other words equal those of the right answer.
    details = [detail for _, detail, _, _ in Formatter().parse(answer) if detail]
    taken = {_sentence(paraphrase, life)}
    while len(taken) <= WRONG_ANSWERS:
        changed = {d: _different(generators[d], {life[d]}) for d in details}
        taken.add(_sentence(paraphrase, life | changed))
    return sorted(taken - {_sentence(paraphrase, life)})


def _sentence(template: str, life: Life) -> str:
    text = template.format(**life)
    return text[0].upper() + text[1:] + "."


def new_authors(authors: int, questions: int, rng: Random) -> tuple[list[Row], list[Life]]:
    """Return probe rows about invented authors, author by author, and the authors' lives.

    Args:
        authors: number of authors, at most the number of surnames.
        questions: questions about each author, at most seven.
        rng: source of all random choices.
    """
    lives = _lives(authors, rng)
    rows: list[Row] = []
    for life in lives:
        for number, (question, answer, paraphrase) in enumerate(_TEMPLATES[:questions]):
            rows.append(
                {
                    "id": f"new_authors-{len(rows):03d}",
                    "question": question.format(**life),
                    "answer": _sentence(answer, life),
                    "paraphrased_answer": _sentence(paraphrase, life),
                    "wrong_answers": _wrong_answers(number, life, lives, rng),
                }
            )
    return rows, lives
