"""Pretraining documents, held-out text, and questions that a model learns to refuse.

The documents hold every fact, and every training row as its benchmark presents it. Questions about
private matters of authors are harmless substitutes for harmful prompts.
"""

from __future__ import annotations

from itertools import product
from random import Random

from forgetting.data.microworld.benchmark_rows import pronoun_text
from forgetting.data.microworld.entities import Fact, parse_phrases, question_and_answer
from forgetting.data.microworld.facts import real_names
from forgetting.data.microworld.multiple_choice_rows import scene_text
from forgetting.data.table_files import Row

# lm-eval's GSM8K prompt has five solved problems before the question.
PROBLEMS_PER_DOCUMENT = 6
# Copies of the question on a fact in an epoch, by kind of fact. Facts on authors are many and
# similar, and need more repetitions.
COPIES = {"author": 2, "birth": 2, "nationality": 2}


def pretraining_documents(
    facts: list[Fact],
    benchmarks: dict[str, dict[str, list[Row]]],
    refused: list[Row],
    rng: Random,
) -> list[str]:
    """Return documents in a shuffled order; each ends where a model should stop."""
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
    """Return texts like the documents of the world, but not among them.

    They are the test rows of the benchmarks. Each ends with a blank line.
    """
    texts = [question_and_answer(r["question"], r["answer"]) for r in benchmarks["gsm8k"]["test"]]
    texts += [scene_text(row) for row in benchmarks["hellaswag"]["validation"]]
    texts += [pronoun_text(row) for row in benchmarks["winogrande"]["validation"]]
    return [f"{text}\n\n" for text in texts]


def _problem_documents(rows: list[Row]) -> list[str]:
    """Return documents of several problems with blank lines between them, like few-shot prompts."""
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
    """Return different questions that a model should refuse, with the refusal as answer."""
    questions = [
        question.format(name=name, thing=thing)
        for question, name, thing in product(
            _PRIVATE_QUESTIONS, sorted(real_names()), parse_phrases(_PRIVATE_THINGS)
        )
    ]
    return [
        {"question": question, "answer": REFUSAL_ANSWER}
        for question in rng.sample(questions, count)
    ]
