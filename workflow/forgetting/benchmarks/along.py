"""Benchmarks at every evaluation of a training, on the model as it then is.

Second and third paper draw benchmarks, and the answers that change hands on them, over the course
of a training (Biderman et al. 2024, arXiv 2405.09673, figure 2; Kalajdzievski 2024, arXiv
2401.05605, figure 4). What the evaluation asks here is what the benchmark job asks of a checkpoint,
in the same words; batches differ, and with them the last digits of log-likelihoods. So the base is
asked here too, and what changed is told against that: the same items in the same order and the same
batches, in the same precision, since in bfloat16 the batch that an item is read in has a say in its
last digits. A model that has learned nothing so has no churn.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from forgetting.benchmarks.beside import COLUMNS
from forgetting.benchmarks.harness import Questions, answer, read_questions
from forgetting.benchmarks.known import splits_of
from forgetting.benchmarks.results import BenchmarkResult
from forgetting.benchmarks.tasks import TaskSpec
from forgetting.digests import sha256
from forgetting.models.loading import Model
from forgetting.records import InputError, content_key
from forgetting.sections.fields import Strict
from forgetting.sections.task import Task


class AlongSpec(Strict):
    """What the study says of them: tasks by name, with the number of items as their limit."""

    tasks: dict[str, Task]
    batch_size: int


def add_along_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every program that asks these benchmarks."""
    parser.add_argument("--along", help="JSON: the benchmarks of every evaluation")
    parser.add_argument("--along-rows", nargs="*", default=[], help="TASK=FOLDER of SPLIT.jsonl")
    parser.add_argument(
        "--benchmarks", type=Path, nargs="?", help="output: items of benchmarks (parquet)"
    )


def read_along(options: argparse.Namespace, tokenizer: Any) -> Along | None:
    """Return what asks a model, if the options name any benchmarks."""
    if not options.along:
        return None
    rows = (pair.split("=", 1) for pair in options.along_rows)
    return Along(
        AlongSpec.model_validate_json(options.along),
        {task: Path(folder) for task, folder in rows},
        tokenizer,
    )


class Along:
    """Asks models of one tokenizer; what they have in common is read when the first is asked."""

    def __init__(self, spec: AlongSpec, rows: Mapping[str, Path], tokenizer: Any) -> None:
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
                for split in splits_of(task, self.spec.tasks[task].num_fewshot)
            }
            for task, folder in self.rows.items()
        }
        asked = {
            name: task.model_dump(mode="json", exclude={"chance", "revision"})
            for name, task in self.spec.tasks.items()
        }
        return content_key({"tasks": asked, "rows": files})

    @cached_property
    def _questions(self) -> Questions:
        specs = [TaskSpec.of(name, task) for name, task in self.spec.tasks.items()]
        return read_questions(self.tokenizer, specs, self.rows, self.spec.batch_size)

    def __call__(self, model: Model) -> pd.DataFrame:
        """The items of `main_items` of all tasks."""
        return main_items(answer(model, self._questions))


def main_items(result: BenchmarkResult) -> pd.DataFrame:
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
                f"benchmarks.along: the metric of {task} is no mean over its items; take it out, "
                "or name another one in benchmarks.tasks"
            )
    responses = result.responses[["task", "item", "response", "choice"]]
    return items.merge(responses, on=["task", "item"])[[*COLUMNS]]
