"""Types of the micro-world (sizes, facts, the finished world) and parsers of its text tables."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from pydantic import BaseModel, ConfigDict, Field

from forgetting.data.table_files import Row

QUESTION = "Question: {question}\n"
ANSWER = "Answer: {answer}"


class WorldSizes(BaseModel):
    """Number of items of each kind in a world."""

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
    """A question with its true answer.

    Attributes:
        kind: type of the answer; facts of one kind share their wrong answers.
        question: the question.
        answer: the answer.
        statements: the fact as plain sentences, used in pretraining only.
        excluded: other right or arguable answers, which must not be offered as wrong ones.
    """

    kind: str
    question: str
    answer: str
    statements: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True)
class World:
    """All data of a world.

    Attributes:
        probes: rows by name of the probe, with id, question, answer, paraphrased_answer and
            wrong_answers.
        documents: pretraining texts; they hold the retained knowledge and no new knowledge.
        held_out: similar texts that are not among the documents.
        benchmarks: rows by task and split, in the columns of the public data sets.
        refusals: questions that a model of this world should refuse.
    """

    probes: dict[str, list[Row]]
    documents: list[str]
    held_out: list[str]
    benchmarks: dict[str, dict[str, list[Row]]]
    refusals: list[Row]


def random_stream(seed: int, part: str) -> Random:
    """Return the random generator of a part; resizing one part does not change the others."""
    return Random(f"micro-world/{seed}/{part}")


def question_and_answer(question: str, answer: str) -> str:
    """Return the prompt format of pretraining, fine-tuning and probes."""
    return QUESTION.format(question=question) + ANSWER.format(answer=answer)


def probe_rows(name: str, facts: list[Fact], choose_from: list[Fact], rng: Random) -> list[Row]:
    """Return probe rows with three wrong answers each, the answers of other facts of the kind."""
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
    """Return the words of a text."""
    return text.split()


def parse_phrases(text: str) -> list[str]:
    """Return the phrases of a text, which are separated by bars and line ends."""
    return [phrase for line in text.strip().splitlines() for phrase in line.split("|")]


def parse_table(text: str) -> list[list[str]]:
    """Return the cells of each line, which are separated by bars."""
    return [line.split("|") for line in text.strip().splitlines()]
