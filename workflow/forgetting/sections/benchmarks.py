"""The lm-evaluation-harness tasks that are run on the base and on tuned models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from forgetting.sections.fields import Count, DistinctNames, Name, Strict, TaskName
from forgetting.sections.refusals import Refusals
from forgetting.sections.task import Task


class Benchmarks(Strict):
    """The lm-evaluation-harness runs on the base and on tuned models."""

    rows: Name | None = Field(
        None,
        description="Dataset whose folder TASK/SPLIT.jsonl holds the rows, in the hub's columns; "
        "without it they come from the hub at pinned revisions.",
    )
    tasks: Annotated[dict[TaskName, Task], DistinctNames] = Field(
        default_factory=dict,
        description="The tasks by their names in the harness's registry, with settings.",
    )
    refusals: Refusals | None = Field(
        None, description="Ask harmful prompts too, and count the answers that refuse."
    )
    models: Literal["selected", "budgets"] = Field(
        "selected",
        description="What is scored beside the base: the selected checkpoints, or the end of every "
        "one of `training.budgets` with the chosen setting, the selected among them.",
    )
    along: dict[TaskName, Count] = Field(
        default_factory=dict,
        description="Of these tasks the first so many items are asked at every evaluation of a "
        "training too, by the training job itself, and of the base in the same batches: accuracy "
        "and churn over its course. Not of tasks whose answers are programs or whose metric is no "
        "mean over items, nor with `training.budgets`, where the ends are scored.",
    )
    batch_size: Count = Field(
        16,
        description="Sequences per forward pass. In bfloat16 it has a say in the last digits of "
        "log-likelihoods. Another one trains nothing again: runs that are finished keep what they "
        "were asked `along`.",
    )
    sandbox: Literal["bubblewrap", "none"] = Field(
        "bubblewrap",
        description="Where model-written programs run. Without a working sandbox HumanEval is "
        "not scored. `none` runs them unprotected: only on a machine you can lose.",
    )

    @model_validator(mode="after")
    def _along_is_among_the_tasks(self) -> Benchmarks:
        for name in self.along:
            if name not in self.tasks:
                known = ", ".join(self.tasks) or "there are none"
                raise ValueError(f"`along`: {name} is not among the `tasks` ({known})")
        return self
