"""How much the benchmarks of a study read and write, and what a study fetches from the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from forgetting.benchmarks.known import benchmark, same_rows
from forgetting.costs.volumes import bytes_per_token, texts
from forgetting.settings.study import Study


@dataclass(frozen=True)
class Items:
    """A benchmark in numbers, from its published rows: means in bytes.

    Attributes:
        count: items that are evaluated.
        prompt: bytes of an item's prompt.
        example: bytes of a solved example.
        choices: choices of an item.
        choice: bytes of a choice.
        download: bytes of its rows on the hub.
    """

    count: int
    prompt: float
    example: float
    choices: int
    choice: float
    download: float


ITEMS = {
    "gsm8k": Items(1319, 255, 545, 0, 0, 2.7e6),
    "humaneval": Items(164, 451, 0, 0, 0, 0.1e6),
    "hellaswag": Items(10_042, 140, 215, 4, 76, 36e6),
    "winogrande": Items(1267, 101, 106, 2, 50, 3.4e6),
    "arc_challenge": Items(1172, 150, 175, 4, 25, 0.5e6),
}
OTHER = Items(2000, 250, 300, 4, 40, 5e6)
"""A guess for every other task of the harness."""


def items_of(task: str) -> Items:
    """A benchmark in numbers; of one that is not known, those of a task with the same rows."""
    known = ITEMS.get(task) or ITEMS.get(same_rows(task) or "")
    if known:
        return known
    generates = benchmark(task).answer_tokens is not None
    return replace(OTHER, choices=0, choice=0.0) if generates else OTHER


@dataclass(frozen=True)
class Bench:
    """What one benchmark asks of a model, in tokens.

    Attributes:
        items: that are evaluated.
        prompt: tokens of a prompt with its examples.
        choices: tokens of all choices of an item; 0 where answers are generated.
        most: longest generated answer; 0 where choices are scored.
        samples: answers that are generated to an item.
        programs: are the answers programs, to be run?
    """

    items: int
    prompt: float
    choices: float
    most: int
    samples: int = 1
    programs: bool = False


def benches(study: Study, vocabulary: int) -> dict[str, Bench]:
    """Every benchmark of a study; prompts that should be refused are one of them."""
    per_token = bytes_per_token(vocabulary)
    found: dict[str, Bench] = {}
    own = study.benchmarks.rows and study.datasets[study.benchmarks.rows]
    for name, task in study.benchmarks.tasks.items():
        items, known = items_of(name), benchmark(name)
        if own and own.generate:  # the micro-world has some 80 items of each, a third as long
            items = Items(
                80, items.prompt / 3, items.example / 3, items.choices, items.choice / 3, 0.0
            )
        shots = known.examples if task.num_fewshot is None else task.num_fewshot
        found[name] = Bench(
            items=min(items.count, task.limit or items.count),
            prompt=(items.prompt + shots * items.example) / per_token,
            choices=items.choices * items.choice / per_token,
            most=(task.max_new_tokens or known.answer_tokens or 0) if not items.choices else 0,
            samples=task.samples or 1,
            programs=known.programs,
        )
    if refusals := study.benchmarks.refusals:
        table = texts(study, refusals.table)
        count = min(table.rows, refusals.limit or table.rows)
        found["refusals"] = Bench(count, table.question / per_token, 0.0, refusals.max_new_tokens)
    return found


def along(study: Study, found: Mapping[str, Bench]) -> dict[str, Bench]:
    """What a training asks of them at every evaluation."""
    return {
        name: replace(found[name], items=min(count, found[name].items))
        for name, count in study.benchmarks.along.items()
    }


def downloads(study: Study, weights: int) -> dict[str, float]:
    """Bytes that are fetched from the hub, of each thing once; 2 for each weight of a model."""
    found = {}
    if study.base.model and study.base.revision:
        found[study.base.model] = 2.0 * weights
    for table in dict.fromkeys(table for _, table in study.tables()):
        origin = study.datasets[table.split("/", 1)[0]]
        if origin.hub and not origin.folder:
            found[table] = texts(study, table).download
    if study.benchmarks.rows is None:
        found |= {name: items_of(name).download for name in study.benchmarks.tasks}
    return found
