"""The micro-world: a small, seeded world of facts, skills and invented authors.

`build_world` makes everything that the embedded study needs, without any download: true facts
about countries, art and classic authors (the old knowledge), invented authors in the schema of
TOFU (Maini et al. 2024, section 2; the new knowledge), rows for five benchmarks in the columns of
the public data sets, and the texts from which a small model learns all but the new knowledge.
Everything is a function of the seed and the sizes alone.
"""

from __future__ import annotations

from .arithmetic import word_problems
from .authors import author_facts
from .documents import held_out_text, pretraining_documents
from .functions import one_line_functions
from .invented import new_authors
from .places import world_facts
from .private import private_questions
from .pronouns import pronoun_sentences
from .scenes import scenes
from .schema import Fact, Row, World, WorldSizes, probe_rows, stream
from .science import science_items, science_rows


def build_world(seed: int, sizes: WorldSizes | None = None) -> World:
    """The world of a seed: equal seeds and sizes give equal bytes, on any machine."""
    sizes = sizes or WorldSizes()
    new, _ = new_authors(sizes.new_authors, sizes.questions_per_author, stream(seed, "invented"))
    probes = {
        "new_authors": new,
        "real_authors": _probe("real_authors", author_facts(), sizes.real_authors, seed),
        "world_facts": _probe("world_facts", world_facts(), sizes.world_facts, seed),
    }
    benchmarks = _benchmarks(seed, sizes)
    private = private_questions(sizes.refusals_train + sizes.refusals_test, stream(seed, "private"))
    fresh, shown = private[: sizes.refusals_test], private[sizes.refusals_test :]
    return World(
        probes=probes,
        documents=pretraining_documents(
            [*author_facts(), *world_facts()], benchmarks, shown, stream(seed, "documents")
        ),
        held_out=held_out_text(benchmarks),
        benchmarks=benchmarks,
        refusals=[{"question": row["question"]} for row in fresh],
    )


def _probe(name: str, facts: list[Fact], count: int, seed: int) -> list[Row]:
    rng = stream(seed, name)
    return probe_rows(name, rng.sample(facts, min(count, len(facts))), facts, rng)


def _benchmarks(seed: int, sizes: WorldSizes) -> dict[str, dict[str, list[Row]]]:
    """Rows of all tasks; a test row is never a training row."""
    problems = word_problems(sizes.gsm8k_train + sizes.gsm8k_test, stream(seed, "gsm8k"))
    functions = one_line_functions(
        sizes.humaneval_train + sizes.humaneval_test, stream(seed, "humaneval")
    )
    rng = stream(seed, "hellaswag")
    fresh_scenes = scenes(sizes.hellaswag_test, "val", rng, frozenset())
    shown = frozenset(row["ctx_a"] for row in fresh_scenes)
    rng_pronouns = stream(seed, "winogrande")
    fresh_pronouns = pronoun_sentences(sizes.winogrande_test, rng_pronouns, frozenset())
    asked = frozenset(row["sentence"] for row in fresh_pronouns)
    rng_science = stream(seed, "arc_challenge")
    science, fresh_science = science_items(sizes.arc_test, rng_science)
    return {
        "gsm8k": {
            "train": problems[sizes.gsm8k_test :],
            "test": problems[: sizes.gsm8k_test],
        },
        "humaneval": {
            "train": functions[sizes.humaneval_test :],
            "test": functions[: sizes.humaneval_test],
        },
        "hellaswag": {
            "train": scenes(sizes.hellaswag_train, "train", rng, shown),
            "validation": fresh_scenes,
        },
        "winogrande": {
            "train": pronoun_sentences(sizes.winogrande_train, rng_pronouns, asked),
            "validation": fresh_pronouns,
        },
        "arc_challenge": {
            "train": science_rows(science, "train", rng_science),
            "test": science_rows(fresh_science, "test", rng_science),
        },
    }
