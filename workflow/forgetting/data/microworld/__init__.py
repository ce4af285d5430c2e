"""The micro-world: a small, seeded world of facts, skills and invented authors.

`build_world` generates all data of the embedded study without any download:

- true facts about countries, art and classic authors (the retained knowledge);
- invented authors in the schema of TOFU (Maini et al. 2024, section 2; the new knowledge);
- rows for five benchmarks in the columns of the public data sets;
- texts from which a small model learns everything except the new knowledge.

The result depends only on the seed and the sizes.
"""

from __future__ import annotations

from forgetting.data.microworld.benchmark_rows import (
    one_line_functions,
    pronoun_sentences,
    word_problems,
)
from forgetting.data.microworld.documents import (
    held_out_text,
    pretraining_documents,
    unanswerable_questions,
)
from forgetting.data.microworld.entities import (
    Fact,
    World,
    WorldSizes,
    probe_rows,
    random_stream,
)
from forgetting.data.microworld.facts import author_facts, world_facts
from forgetting.data.microworld.fictional_authors import new_authors
from forgetting.data.microworld.multiple_choice_rows import scenes, science_items, science_rows
from forgetting.data.table_files import Row


def build_world(seed: int, sizes: WorldSizes | None = None) -> World:
    """Return the world of a seed; equal seeds and sizes give equal bytes on any machine."""
    sizes = sizes or WorldSizes()
    new, _ = new_authors(
        sizes.new_authors, sizes.questions_per_author, random_stream(seed, "invented")
    )
    probes = {
        "new_authors": new,
        "real_authors": _probe("real_authors", author_facts(), sizes.real_authors, seed),
        "world_facts": _probe("world_facts", world_facts(), sizes.world_facts, seed),
    }
    benchmarks = _benchmarks(seed, sizes)
    private = unanswerable_questions(
        sizes.refusals_train + sizes.refusals_test, random_stream(seed, "private")
    )
    fresh, shown = private[: sizes.refusals_test], private[sizes.refusals_test :]
    return World(
        probes=probes,
        documents=pretraining_documents(
            [*author_facts(), *world_facts()], benchmarks, shown, random_stream(seed, "documents")
        ),
        held_out=held_out_text(benchmarks),
        benchmarks=benchmarks,
        refusals=[{"question": row["question"]} for row in fresh],
    )


def _probe(name: str, facts: list[Fact], count: int, seed: int) -> list[Row]:
    rng = random_stream(seed, name)
    return probe_rows(name, rng.sample(facts, min(count, len(facts))), facts, rng)


def _benchmarks(seed: int, sizes: WorldSizes) -> dict[str, dict[str, list[Row]]]:
    """Return the rows of all tasks by split; no test row is a training row."""
    problems = word_problems(sizes.gsm8k_train + sizes.gsm8k_test, random_stream(seed, "gsm8k"))
    functions = one_line_functions(
        sizes.humaneval_train + sizes.humaneval_test, random_stream(seed, "humaneval")
    )
    rng = random_stream(seed, "hellaswag")
    fresh_scenes = scenes(sizes.hellaswag_test, "val", rng, frozenset())
    test_beginnings = frozenset(row["ctx_a"] for row in fresh_scenes)
    rng_pronouns = random_stream(seed, "winogrande")
    fresh_pronouns = pronoun_sentences(sizes.winogrande_test, rng_pronouns, frozenset())
    test_sentences = frozenset(row["sentence"] for row in fresh_pronouns)
    rng_science = random_stream(seed, "arc_challenge")
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
            "train": scenes(sizes.hellaswag_train, "train", rng, test_beginnings),
            "validation": fresh_scenes,
        },
        "winogrande": {
            "train": pronoun_sentences(sizes.winogrande_train, rng_pronouns, test_sentences),
            "validation": fresh_pronouns,
        },
        "arc_challenge": {
            "train": science_rows(science, "train", rng_science),
            "test": science_rows(fresh_science, "test", rng_science),
        },
    }
