"""Facts about tasks that a study needs before any job runs.

The five built-in tasks are listed here, with their datasets in data/hub_datasets.yaml. Other
tasks are read from their definition files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from forgetting.benchmarks.task_definitions import read_task_definition, tasks_folder
from forgetting.data.hub_datasets import HUB_DATASETS
from forgetting.errors import InputError

SCORE_FILES = (
    "scores.parquet",
    "items.parquet",
    "responses.parquet",
    "programs.json",
    "record.json",
)
"""Files that a benchmark job writes for each model."""


@dataclass(frozen=True)
class Benchmark:
    """Facts about a task.

    Attributes:
        definition: file below the harness's folder of tasks.
        dataset: name and configuration on the hub.
        split: the split that is evaluated.
        example_split: the split that solved examples are drawn from, or None.
        main_metric: the metric that is plotted, as `metric,filter`.
        chance: score of blind guessing; NaN where it is unknown.
        columns: the columns that the task reads; empty where they are unknown.
        num_fewshot: solved examples in the prompt.
        max_gen_toks: tokens of the longest generated answer; None if nothing is generated.
        generates_code: whether the answers are programs, which are run.
    """

    definition: str
    dataset: tuple[str, str | None]
    split: str
    example_split: str | None
    main_metric: str
    chance: float
    columns: tuple[str, ...]
    num_fewshot: int = 0
    max_gen_toks: int | None = None
    generates_code: bool = False


def _dataset(task: str) -> tuple[str, str | None]:
    return HUB_DATASETS[task].dataset, HUB_DATASETS[task].config


BENCHMARKS = {
    "gsm8k": Benchmark(
        definition="gsm8k/gsm8k.yaml",
        dataset=_dataset("gsm8k"),
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
        dataset=_dataset("humaneval"),
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
        dataset=_dataset("hellaswag"),
        split="validation",
        example_split="train",
        main_metric="acc_norm,none",
        chance=0.25,
        columns=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "winogrande": Benchmark(
        definition="winogrande/default.yaml",
        dataset=_dataset("winogrande"),
        split="validation",
        example_split="train",
        main_metric="acc,none",
        chance=0.5,
        columns=("sentence", "option1", "option2", "answer"),
    ),
    "arc_challenge": Benchmark(
        definition="arc/arc_challenge.yaml",
        dataset=_dataset("arc_challenge"),
        split="test",
        example_split="train",
        main_metric="acc_norm,none",
        chance=0.25,
        columns=("question", "choices", "answerKey"),
    ),
}


def benchmark(name: str) -> Benchmark:
    """Return the facts about a task: built in, or else read from its definition.

    Raises:
        InputError: the harness has no such task. The message does not name the study's key.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    definition = read_task_definition(name)
    dataset, config = definition.dataset
    return Benchmark(
        definition=str(definition.path.relative_to(tasks_folder())),
        dataset=(dataset or "", config),
        split=definition.split,
        example_split=definition.example_split,
        main_metric=next(iter(definition.metrics), ""),
        chance=math.nan,
        columns=(),
        num_fewshot=definition.num_fewshot,
        max_gen_toks=definition.max_gen_toks,
        generates_code=definition.generates_code,
    )


def task_with_same_dataset(name: str) -> str | None:
    """Return the built-in task that reads the same dataset, or None: `gsm8k` for `gsm8k_cot`."""
    dataset = benchmark(name).dataset[0]
    return next(
        (task for task, built_in in BENCHMARKS.items() if built_in.dataset[0] == dataset), None
    )


def required_splits(name: str, num_fewshot: int | None = None) -> list[str]:
    """Return the splits that a task reads: the evaluated one, and the one with examples."""
    facts = benchmark(name)
    shots = facts.num_fewshot if num_fewshot is None else num_fewshot
    splits = [facts.split, *([facts.example_split] if shots and facts.example_split else [])]
    return list(dict.fromkeys(splits))


def main_metric(name: str, requested: str | None) -> str:
    """Return the metric that represents a task, as `metric,filter`.

    Args:
        name: the task.
        requested: a metric with or without its filter; None means the task's first metric.

    Raises:
        InputError: the task has no such metric. The message does not name the study's key.
    """
    if requested is None:
        return benchmark(name).main_metric
    metrics = read_task_definition(name).metrics
    for metric in metrics:
        if requested in (metric, metric.partition(",")[0]):
            return metric
    raise InputError(f"{name} has no metric {requested}, but {', '.join(metrics)}")
