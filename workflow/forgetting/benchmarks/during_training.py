"""Benchmark a model at every evaluation of its training.

Biderman et al. (2024, arXiv 2405.09673, figure 2) and Kalajdzievski (2024, arXiv 2401.05605, figure
4) plot benchmark scores and changed answers over training. Items and prompts are those of the
benchmark job. Batches differ from that job's, and with them the last digits of log-likelihoods.

Base and tuned models are evaluated on the same items in the same order, batches and precision. In
bfloat16 the batch changes the last digits of a log-likelihood. An unchanged model therefore has
zero churn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

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

TRAINING_ITEM_COLUMNS = ("task", "item", "metric", "value", "response", "choice")
COLUMN_TYPES = {"item": int, "choice": "Int64"}
PREFIX = "benchmark_"
"""Prefix of these columns in a table that also holds the items of probes."""


def merge_items(probe_items: pd.DataFrame, benchmark_items: pd.DataFrame) -> pd.DataFrame:
    """Return one table with the items of probes and of benchmarks; see `split_items`."""
    return pd.concat([probe_items, benchmark_items.add_prefix(PREFIX)], ignore_index=True)


def split_items(items: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split what `merge_items` merged.

    Returns:
        The items of probes, and the items of benchmarks. The latter keep the columns run, step and
        epoch where the table has them.
    """
    prefixed = [PREFIX + name for name in TRAINING_ITEM_COLUMNS]
    if prefixed[0] not in items:
        return items, pd.DataFrame(columns=list(TRAINING_ITEM_COLUMNS))
    is_benchmark = items[prefixed[0]].notna()
    shared = [name for name in ("run", "step", "epoch") if name in items]
    benchmark_items = items[is_benchmark][[*shared, *prefixed]]
    benchmark_items = benchmark_items.rename(columns=lambda name: name.removeprefix(PREFIX))
    benchmark_items = benchmark_items.astype(COLUMN_TYPES)
    probe_items = items[~is_benchmark].drop(columns=prefixed)
    return probe_items.reset_index(drop=True), benchmark_items.reset_index(drop=True)


class TrainingBenchmarks:
    """Evaluate models that share a tokenizer on benchmarks.

    The first call loads the tasks; later calls reuse them.

    Args:
        config: the tasks.
        rows_dirs: the folder of SPLIT.jsonl of each task.
        tokenizer: the tokenizer of all models.
    """

    def __init__(
        self, config: TrainingBenchmarksConfig, rows_dirs: Mapping[str, Path], tokenizer: Any
    ) -> None:
        self.config, self.rows_dirs, self.tokenizer = config, rows_dirs, tokenizer

    @classmethod
    def of(
        cls, config: TrainingBenchmarksConfig | None, rows_dirs: Mapping[str, Path], tokenizer: Any
    ) -> Self | None:
        """Return what evaluates models on the tasks; None if the study has no such tasks."""
        return cls(config, rows_dirs, tokenizer) if config else None

    @cached_property
    def digest(self) -> str:
        """Return the digest of the tasks and their rows.

        The digest leaves out what changes no answer: `chance`, and `revision` since the content of
        the rows counts. It leaves out `batch_size` too, which changes log-likelihoods by rounding
        only. So finished runs survive a smaller batch size after an out-of-memory error. Their
        base is then evaluated again in the new batches, and in bfloat16 near ties may differ.
        """
        files = {
            task: {
                split: sha256(folder / f"{split}.jsonl")
                for split in required_splits(task, self.config.tasks[task].num_fewshot)
            }
            for task, folder in self.rows_dirs.items()
        }
        tasks = {
            name: task.model_dump(mode="json", exclude={"chance", "revision"})
            for name, task in self.config.tasks.items()
        }
        return content_key({"tasks": tasks, "rows": files})

    @cached_property
    def _tasks(self) -> LoadedTasks:
        specs = [TaskSpec.of(name, task) for name, task in self.config.tasks.items()]
        return load_tasks(self.tokenizer, specs, self.rows_dirs, self.config.batch_size)

    def __call__(self, model: Model) -> pd.DataFrame:
        """Return the items of all tasks, see `main_item_scores`."""
        return main_item_scores(evaluate_tasks(model, self._tasks))


def main_item_scores(result: BenchmarkResult) -> pd.DataFrame:
    """Return every item by its task's main metric, in the columns of `TRAINING_ITEM_COLUMNS`.

    Raises:
        InputError: the main metric of a task is not the mean over its items.
    """
    main = result.scores[result.scores["main"].astype(bool)]
    items = result.items.merge(main[["task", "metric"]], on=["task", "metric"])
    means = items.groupby("task")["value"].mean()
    for task, value in zip(main["task"], main["value"], strict=True):
        if task not in means or not math.isclose(means[task], value, abs_tol=1e-9):
            raise InputError(
                f"benchmarks.during_training: the metric of {task} is not a mean over its items; "
                "remove the task, or choose another metric in benchmarks.tasks"
            )
    responses = result.responses[["task", "item", "response", "choice"]]
    return items.merge(responses, on=["task", "item"])[[*TRAINING_ITEM_COLUMNS]]
