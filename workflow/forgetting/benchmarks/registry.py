"""Facts about tasks that a study needs before any job runs.

They come from the harness's definition of a task. For built-in tasks, data/hub_datasets.yaml adds
what the definition does not hold: revision, splits, main metric, chance level, columns and sizes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from forgetting.benchmarks.task_definitions import read_task_definition, tasks_folder
from forgetting.data.hub import BUILT_IN_BENCHMARKS, HUB_DATASETS
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
    num_fewshot: int
    max_gen_toks: int | None
    generates_code: bool


@functools.cache
def benchmark(name: str) -> Benchmark:
    """Return the facts about a task; what a definition does not hold is empty, None or NaN.

    Raises:
        InputError: the harness has no such task. The message does not name the study's key.
    """
    definition = read_task_definition(name)
    built_in = BUILT_IN_BENCHMARKS.get(name)
    dataset, config = definition.dataset
    if built_in:
        dataset, config = HUB_DATASETS[name].dataset, HUB_DATASETS[name].config
    return Benchmark(
        definition=str(definition.path.relative_to(tasks_folder())),
        dataset=(dataset or "", config),
        split=definition.split,
        example_split=definition.example_split,
        main_metric=built_in.main_metric if built_in else next(iter(definition.metrics), ""),
        chance=built_in.chance if built_in else math.nan,
        columns=built_in.columns if built_in else (),
        num_fewshot=definition.num_fewshot,
        max_gen_toks=definition.max_gen_toks,
        generates_code=definition.generates_code,
    )


def task_with_same_dataset(name: str, tasks: Iterable[str] = HUB_DATASETS) -> str | None:
    """Return the built-in task that reads the same dataset, or None: `gsm8k` for `gsm8k_cot`.

    Args:
        name: the task.
        tasks: the built-in tasks to choose from.
    """
    dataset = benchmark(name).dataset[0]
    return next((task for task in tasks if HUB_DATASETS[task].dataset == dataset), None)


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
