"""What a micro-world consists of: sizes, facts, rows and the finished world.

Facts and word lists are written as plain text tables; these read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

Row = dict[str, Any]

QUESTION = "Question: {question}\n"
ANSWER = "Answer: {answer}"


class WorldSizes(BaseModel):
    """How many items of each kind a world holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    new_authors: int = Field(10, ge=1, le=60, description="invented authors")
    questions_per_author: int = Field(
        7, ge=1, le=7, description="questions about each invented author"
    )
    real_authors: int = Field(80, ge=4, le=120, description="probe questions on real authors")
    world_facts: int = Field(80, ge=4, le=160, description="probe questions on the world")
    gsm8k_train: int = Field(480, ge=12, description="word problems that pretraining sees")
    gsm8k_test: int = Field(50, ge=1, description="fresh word problems")
    humaneval_train: int = Field(200, ge=1, description="functions that pretraining sees")
    humaneval_test: int = Field(50, ge=1, description="fresh functions")
    hellaswag_train: int = Field(240, ge=1, description="short scenes that pretraining sees")
    hellaswag_test: int = Field(80, ge=1, description="fresh scenes")
    winogrande_train: int = Field(1000, ge=1, description="pronoun sentences of pretraining")
    winogrande_test: int = Field(80, ge=1, description="fresh pronoun sentences")
    arc_test: int = Field(
        80, ge=1, le=160, description="fresh science questions; the other wordings are training"
    )
    refusals_train: int = Field(60, ge=1, le=200, description="refusals that pretraining sees")
    refusals_test: int = Field(12, ge=1, le=100, description="fresh questions to be refused")


@dataclass(frozen=True)
class Fact:
    """A true question and answer.

    Args:
        kind: what the question asks for; facts of one kind share their wrong answers.
        statements: the same fact as plain sentences, read in pretraining only.
        excluded: other right or arguable answers, never to be offered as wrong ones.
    """

    kind: str
    question: str
    answer: str
    statements: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True)
class World:
    """All that a study needs to know about its world.

    Args:
        probes: probe name to rows with id, question, answer, paraphrased_answer, wrong_answers.
        documents: pretraining texts; they hold the old knowledge and nothing of the new.
        held_out: texts of the same kinds that are not among the documents.
        benchmarks: task to split to rows, in the columns that the public data sets have.
        refusals: questions that a model of this world refuses to answer.
    """

    probes: dict[str, list[Row]]
    documents: list[str]
    held_out: list[str]
    benchmarks: dict[str, dict[str, list[Row]]]
    refusals: list[Row]


def random_stream(seed: int, part: str) -> Random:
    """A random stream of its own for each part, so that resizing one leaves the others alone."""
    return Random(f"micro-world/{seed}/{part}")


def question_and_answer(question: str, answer: str) -> str:
    """The one prompt form of pretraining, fine-tuning and probing."""
    return QUESTION.format(question=question) + ANSWER.format(answer=answer)


def probe_rows(name: str, facts: list[Fact], choose_from: list[Fact], rng: Random) -> list[Row]:
    """Probe rows with three wrong answers each, drawn from the right answers of the same kind."""
    rows = []
    for number, fact in enumerate(facts):
        others = {f.answer for f in choose_from if f.kind == fact.kind}
        others -= {fact.answer, *fact.excluded}
        rows.append(
            {
                "id": f"{name}-{number:03d}",
                "question": fact.question,
                "answer": fact.answer,
                "paraphrased_answer": None,
                "wrong_answers": rng.sample(sorted(others), 3),
            }
        )
    return rows


def parse_words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


def parse_phrases(text: str) -> list[str]:
    """The phrases of a text, parted by bars and line ends."""
    return [phrase for line in text.strip().splitlines() for phrase in line.split("|")]


def parse_table(text: str) -> list[list[str]]:
    """The cells of each line, parted by bars."""
    return [line.split("|") for line in text.strip().splitlines()]
