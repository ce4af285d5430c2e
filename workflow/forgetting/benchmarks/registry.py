"""What is known of a task before any job: of the five usual ones by heart, of others as defined."""

from __future__ import annotations

import math
from dataclasses import dataclass

from forgetting.benchmarks.task_definitions import read_task_definition, tasks_folder
from forgetting.errors import InputError

SCORE_FILES = (
    "scores.parquet",
    "items.parquet",
    "responses.parquet",
    "programs.json",
    "record.json",
)
"""What a job writes of each model that it scores."""


@dataclass(frozen=True)
class Benchmark:
    """What is known beforehand about a task."""

    definition: str  # file below the harness's folder of tasks
    dataset: tuple[str, str | None]  # on the hub: name, configuration
    split: str  # the one that is evaluated
    example_split: str | None  # the one that solved examples are drawn from
    main_metric: str  # the one to draw
    chance: float  # score of blind guessing
    columns: tuple[str, ...]  # that the task reads
    num_fewshot: int = 0  # in the prompt, by the task's own definition
    max_gen_toks: int | None = None  # longest answer by that definition, if it is generated
    generates_code: bool = False  # are the answers programs, to be run?


BENCHMARKS = {
    "gsm8k": Benchmark(
        definition="gsm8k/gsm8k.yaml",
        dataset=("openai/gsm8k", "main"),
        split="test",
        example_split="train",
        main_metric="exact_match,strict-match",
        chance=0.0,
        columns=("question", "answer"),
        num_fewshot=5,
        max_gen_toks=256,  # the harness's default
    ),
    "humaneval": Benchmark(
        definition="humaneval/humaneval.yaml",
        dataset=("openai/openai_humaneval", None),
        split="test",
        example_split=None,
        main_metric="pass@1,create_test",
        chance=0.0,
        columns=("prompt", "test", "entry_point"),
        max_gen_toks=1024,
        generates_code=True,
    ),
    "hellaswag": Benchmark(
        definition="hellaswag/hellaswag.yaml",
        dataset=("Rowan/hellaswag", None),
        split="validation",
        example_split="train",
        main_metric="acc_norm,none",
        chance=0.25,
        columns=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "winogrande": Benchmark(
        definition="winogrande/default.yaml",
        dataset=("allenai/winogrande", "winogrande_xl"),
        split="validation",
        example_split="train",
        main_metric="acc,none",
        chance=0.5,
        columns=("sentence", "option1", "option2", "answer"),
    ),
    "arc_challenge": Benchmark(
        definition="arc/arc_challenge.yaml",
        dataset=("allenai/ai2_arc", "ARC-Challenge"),
        split="test",
        example_split="train",
        main_metric="acc_norm,none",
        chance=0.25,
        columns=("question", "choices", "answerKey"),
    ),
}


def benchmark(name: str) -> Benchmark:
    """What is known of any task of the harness: of the five usual ones by heart, of others by
    their definition, which tells neither columns nor chance.

    Raises:
        InputError: there is no such task; it does not say where the name stood.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    found = read_task_definition(name)
    dataset, config = found.dataset
    return Benchmark(
        definition=str(found.path.relative_to(tasks_folder())),
        dataset=(dataset or "", config),
        split=found.split,
        example_split=found.example_split,
        main_metric=next(iter(found.metrics), ""),
        chance=math.nan,
        columns=(),
        num_fewshot=found.num_fewshot,
        max_gen_toks=found.max_gen_toks,
        generates_code=found.generates_code,
    )


def task_with_same_dataset(name: str) -> str | None:
    """Which of the five usual tasks has rows in the columns of this one, if any has: `gsm8k` for
    `gsm8k_cot`, as both read the same dataset."""
    dataset = benchmark(name).dataset[0]
    return next((task for task, known in BENCHMARKS.items() if known.dataset[0] == dataset), None)


def required_splits(name: str, num_fewshot: int | None = None) -> list[str]:
    """The splits that a task reads: the evaluated one, and the one examples are drawn from."""
    known = benchmark(name)
    shots = known.num_fewshot if num_fewshot is None else num_fewshot
    splits = [known.split, *([known.example_split] if shots and known.example_split else [])]
    return list(dict.fromkeys(splits))


def main_metric(name: str, wanted: str | None) -> str:
    """The metric that stands for a task: `wanted` with its filter, or the task's first.

    Raises:
        InputError: the task has no such metric; it does not say where that stood.
    """
    if wanted is None:
        return benchmark(name).main_metric
    metrics = read_task_definition(name).metrics
    for metric in metrics:
        if wanted in (metric, metric.partition(",")[0]):
            return metric
    raise InputError(f"{name} has no metric {wanted}, but {', '.join(metrics)}")
