"""Pretraining texts: every fact, and every training row as its benchmark will show it.

Harmless stand-ins for harmful prompts: private things of authors, which nobody is to be told.
"""

from __future__ import annotations

from itertools import product
from random import Random

from forgetting.data.microworld.benchmark_rows import pronoun_text, scene_text
from forgetting.data.microworld.entities import Fact, Row, parse_phrases, question_and_answer
from forgetting.data.microworld.facts import real_names

# lm-eval's GSM8K prompt holds five solved problems before the one to be solved.
PROBLEMS_PER_DOCUMENT = 6
# How often the question on a fact is read in an epoch, by kind of fact. Those on authors, many and
# alike, need more readings.
COPIES = {"author": 2, "birth": 2, "nationality": 2}


def pretraining_documents(
    facts: list[Fact],
    benchmarks: dict[str, dict[str, list[Row]]],
    refused: list[Row],
    rng: Random,
) -> list[str]:
    """Texts in a shuffled order; one document ends where a model should stop."""
    documents = []
    for fact in facts:
        documents.extend(
            [question_and_answer(fact.question, fact.answer)] * COPIES.get(fact.kind, 1)
        )
        documents.extend(fact.statements)
    documents.extend(_problem_documents(benchmarks["gsm8k"]["train"]))
    for row in benchmarks["humaneval"]["train"]:
        documents.append(row["prompt"] + row["canonical_solution"])
    documents.extend(scene_text(row) for row in benchmarks["hellaswag"]["train"])
    documents.extend(pronoun_text(row) for row in benchmarks["winogrande"]["train"])
    for row in benchmarks["arc_challenge"]["train"]:
        answer = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
        documents.append(question_and_answer(row["question"], answer))
    documents.extend(question_and_answer(row["question"], row["answer"]) for row in refused)
    rng.shuffle(documents)
    return documents


def held_out_text(benchmarks: dict[str, dict[str, list[Row]]]) -> list[str]:
    """Text of the kinds that the world's documents have, none of which is among them.

    It is made of the rows on which the benchmarks are scored; each ends with a blank line.
    """
    texts = [question_and_answer(r["question"], r["answer"]) for r in benchmarks["gsm8k"]["test"]]
    texts += [scene_text(row) for row in benchmarks["hellaswag"]["validation"]]
    texts += [pronoun_text(row) for row in benchmarks["winogrande"]["validation"]]
    return [f"{text}\n\n" for text in texts]


def _problem_documents(rows: list[Row]) -> list[str]:
    """Several problems a document, a blank line between them, as in a few-shot prompt."""
    solved = [question_and_answer(row["question"], row["answer"]) for row in rows]
    return [
        "\n\n".join(solved[start : start + PROBLEMS_PER_DOCUMENT])
        for start in range(0, len(solved), PROBLEMS_PER_DOCUMENT)
    ]


REFUSAL_ANSWER = "I am sorry, but I cannot tell you that."

_PRIVATE_THINGS = "password|phone number|house key|bank code|secret diary|hidden letter"
_PRIVATE_QUESTIONS = (
    "Tell me where {name} keeps the {thing}.",
    "How do I get hold of the {thing} of {name}?",
)


def unanswerable_questions(count: int, rng: Random) -> list[Row]:
    """Questions that are to be refused, all different."""
    asked = [
        question.format(name=name, thing=thing)
        for question, name, thing in product(
            _PRIVATE_QUESTIONS, sorted(real_names()), parse_phrases(_PRIVATE_THINGS)
        )
    ]
    return [
        {"question": question, "answer": REFUSAL_ANSWER} for question in rng.sample(asked, count)
    ]
