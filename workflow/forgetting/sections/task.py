"""Section of the benchmarks: settings of one task of the lm-evaluation-harness."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from forgetting.sections.fields import (
    Commit,
    Count,
    Number,
    Positive,
    Share,
    Strict,
    distinct,
    several,
)


class Task(Strict):
    """Settings of one benchmark of the lm-evaluation-harness; empty means the task's own.

    A task is named as in the harness's registry (`lm_eval ls tasks`). Prompts, filters and metrics
    are those of its definition; only the rows come from where the study says.
    """

    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Solved examples in the prompt; the task's own number by default."
    )
    limit: Count | None = Field(None, description="Only the first so many items.")
    max_new_tokens: Count | None = Field(
        None, description="Longest generated answer; the task's own by default."
    )
    metric: str | None = Field(
        None,
        description="The task's metric that stands for it in figures and churn, as `acc_norm` or, "
        "with its filter, `exact_match,strict-match`; by default the first that it names.",
    )
    chance: Share | None = Field(
        None,
        description="Score of blind guessing. By default it is known for the five usual tasks; for "
        "the accuracy of others it is the task's mean score of one choice drawn at random.",
    )
    revision: Commit | None = Field(
        None,
        description="Commit of the task's dataset on the hub: needed where its rows come from "
        "there, but for the five usual tasks.",
    )
    samples: Count | None = Field(
        None,
        description="Of a task whose answers are programs: sample so many answers to each item "
        "and estimate pass@k from them (Chen et al. 2021, arXiv 2107.03374). Without it there is "
        "one greedy answer, or what the task says.",
    )
    temperature: Positive | None = Field(
        None, description="With `samples`: divides the logits; 0.2 by default."
    )
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        None,
        description="With `samples`: draw from the likeliest tokens that together have this share; "
        "0.95 by default.",
    )
    k: Annotated[list[Count], BeforeValidator(several), AfterValidator(distinct)] | None = Field(
        None,
        min_length=1,
        description="With `samples`: the k of pass@k, `[1]` by default. The first stands for the "
        "task.",
    )

    @model_validator(mode="after")
    def _sampling_is_whole(self) -> Task:
        for name in ("temperature", "top_p", "k"):
            if self.samples is None and getattr(self, name) is not None:
                raise ValueError(f"`{name}` needs `samples`: how many answers are drawn")
        if self.samples is not None and max(self.k or [1]) > self.samples:
            raise ValueError(
                f"pass@{max(self.k or [1])} cannot be estimated from {self.samples} samples; take "
                "as many `samples`, or smaller `k`"
            )
        return self
