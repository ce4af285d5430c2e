"""Benchmarks at every evaluation of a training, on the model as it then is.

Second and third paper draw benchmarks, and the answers that change hands on them, over the course
of a training (Biderman et al. 2024, arXiv 2405.09673, figure 2; Kalajdzievski 2024, arXiv
2401.05605, figure 4). What the evaluation asks here is what the benchmark job asks of a checkpoint,
in the same words; batches differ, and with them the last digits of log-likelihoods. So the base is
asked here too, and what changed is told against that: the same items in the same order and the same
batches, in the same precision, since in bfloat16 the batch that an item is read in has a say in its
last digits. A model that has learned nothing so has no churn.

Items of benchmarks in the table of an evaluation, beside those of the probes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from forgetting.benchmarks.evaluate import LoadedTasks, evaluate_tasks, load_tasks
from forgetting.benchmarks.registry import required_splits
from forgetting.benchmarks.scores import BenchmarkResult
from forgetting.benchmarks.tasks import TaskSpec
from forgetting.config.evaluation import TrainingBenchmarksConfig
from forgetting.digests import sha256
from forgetting.errors import InputError
from forgetting.io import content_key
from forgetting.models.loading import Model

ITEM_COLUMNS = ("task", "item", "metric", "value", "response", "choice")
COLUMN_TYPES = {"item": int, "choice": "Int64"}
PREFIX = "benchmark_"
"""What these columns are called beside other items begins with this."""


def merge_items(items: pd.DataFrame, more: pd.DataFrame) -> pd.DataFrame:
    """One table of the probes' items and of the benchmarks'."""
    return pd.concat([items, more.add_prefix(PREFIX)], ignore_index=True)


def split_items(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The items of the probes, and those of the benchmarks with what else stands in their rows."""
    marked = [PREFIX + name for name in ITEM_COLUMNS]
    if marked[0] not in table:
        return table, pd.DataFrame(columns=list(ITEM_COLUMNS))
    of_benchmarks = table[marked[0]].notna()
    where = [name for name in ("run", "step", "epoch") if name in table]
    found = table[of_benchmarks][[*where, *marked]]
    found = found.rename(columns=lambda name: name.removeprefix(PREFIX)).astype(COLUMN_TYPES)
    probes = table[~of_benchmarks].drop(columns=marked)
    return probes.reset_index(drop=True), found.reset_index(drop=True)


def training_benchmarks(
    config: TrainingBenchmarksConfig | None, rows: Mapping[str, Path], tokenizer: Any
) -> TrainingBenchmarks | None:
    """Return what evaluates a model on the benchmarks of trainings, if a study has any."""
    return TrainingBenchmarks(config, rows, tokenizer) if config else None


class TrainingBenchmarks:
    """Asks models of one tokenizer; what they have in common is read when the first is asked."""

    def __init__(
        self, spec: TrainingBenchmarksConfig, rows: Mapping[str, Path], tokenizer: Any
    ) -> None:
        self.spec, self.rows, self.tokenizer = spec, rows, tokenizer

    @cached_property
    def digest(self) -> str:
        """Of what is asked: the tasks and their rows.

        Not of what says how it is read (`chance`), of where rows came from (`revision`; their
        content counts), nor of `batch_size`. That changes log-likelihoods by their rounding alone,
        and who makes it smaller because a device was full would else lose the runs that are
        finished: these keep what they were asked in larger batches, while the base is asked anew.
        In bfloat16, answers between near equals may then differ from the base's for that alone.
        """
        files = {
            task: {
                split: sha256(folder / f"{split}.jsonl")
                for split in required_splits(task, self.spec.tasks[task].num_fewshot)
            }
            for task, folder in self.rows.items()
        }
        asked = {
            name: task.model_dump(mode="json", exclude={"chance", "revision"})
            for name, task in self.spec.tasks.items()
        }
        return content_key({"tasks": asked, "rows": files})

    @cached_property
    def _questions(self) -> LoadedTasks:
        specs = [TaskSpec.of(name, task) for name, task in self.spec.tasks.items()]
        return load_tasks(self.tokenizer, specs, self.rows, self.spec.batch_size)

    def __call__(self, model: Model) -> pd.DataFrame:
        """The items of `main_item_scores` of all tasks."""
        return main_item_scores(evaluate_tasks(model, self._questions))


def main_item_scores(result: BenchmarkResult) -> pd.DataFrame:
    """Columns task, item, metric (the main one), value, response, choice.

    Raises:
        InputError: a task's metric is not the mean over its items, so that these do not tell it.
    """
    main = result.scores[result.scores["main"].astype(bool)]
    items = result.items.merge(main[["task", "metric"]], on=["task", "metric"])
    means = items.groupby("task")["value"].mean()
    for task, value in zip(main["task"], main["value"], strict=True):
        if task not in means or not math.isclose(means[task], value, abs_tol=1e-9):
            raise InputError(
                f"benchmarks.during_training: the metric of {task} is no mean over its items; take "
                "it out, or name another one in benchmarks.tasks"
            )
    responses = result.responses[["task", "item", "response", "choice"]]
    return items.merge(responses, on=["task", "item"])[[*ITEM_COLUMNS]]
