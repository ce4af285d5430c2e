"""Section of the benchmarks: settings of one task of the lm-evaluation-harness.

What every model is measured on, how and how often: probes and the general text.

The lm-evaluation-harness tasks that are run on the base and on tuned models.

Section of the benchmarks: prompts that a model should refuse.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from forgetting.config.data import ColumnsConfig, PromptConfig
from forgetting.config.types import (
    ConfigModel,
    DistinctNames,
    Fraction,
    GitCommit,
    Name,
    Number,
    PositiveFloat,
    PositiveInt,
    Table,
    TaskName,
    as_list,
    unique,
)


class TaskConfig(ConfigModel):
    """Settings of one benchmark of the lm-evaluation-harness; empty means the task's own.

    A task is named as in the harness's registry (`lm_eval ls tasks`). Prompts, filters and metrics
    are those of its definition; only the rows come from where the study says.
    """

    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Solved examples in the prompt; the task's own number by default."
    )
    limit: PositiveInt | None = Field(None, description="Only the first so many items.")
    max_new_tokens: PositiveInt | None = Field(
        None, description="Longest generated answer; the task's own by default."
    )
    metric: str | None = Field(
        None,
        description="The task's metric that stands for it in figures and churn, as `acc_norm` or, "
        "with its filter, `exact_match,strict-match`; by default the first that it names.",
    )
    chance: Fraction | None = Field(
        None,
        description="Score of blind guessing. By default it is known for the five usual tasks; for "
        "the accuracy of others it is the task's mean score of one choice drawn at random.",
    )
    revision: GitCommit | None = Field(
        None,
        description="Commit of the task's dataset on the hub: needed where its rows come from "
        "there, but for the five usual tasks.",
    )
    samples: PositiveInt | None = Field(
        None,
        description="Of a task whose answers are programs: sample so many answers to each item "
        "and estimate pass@k from them (Chen et al. 2021, arXiv 2107.03374). Without it there is "
        "one greedy answer, or what the task says.",
    )
    temperature: PositiveFloat | None = Field(
        None, description="With `samples`: divides the logits; 0.2 by default."
    )
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        None,
        description="With `samples`: draw from the likeliest tokens that together have this share; "
        "0.95 by default.",
    )
    k: Annotated[list[PositiveInt], BeforeValidator(as_list), AfterValidator(unique)] | None = (
        Field(
            None,
            min_length=1,
            description="With `samples`: the k of pass@k, `[1]` by default. The first is the "
            "score of the task.",
        )
    )

    @model_validator(mode="after")
    def _sampling_is_whole(self) -> TaskConfig:
        for name in ("temperature", "top_p", "k"):
            if self.samples is None and getattr(self, name) is not None:
                raise ValueError(f"`{name}` needs `samples`: how many answers are drawn")
        if self.samples is not None and max(self.k or [1]) > self.samples:
            raise ValueError(
                f"pass@{max(self.k or [1])} cannot be estimated from {self.samples} samples; take "
                "as many `samples`, or smaller `k`"
            )
        return self


REFUSALS_TASK = "refusals"
"""What the tables of benchmarks call the refusal rate, in place of a task's name."""


class RefusalsConfig(ConfigModel):
    """Harmful prompts, such as AdvBench's, and the share of them that a model refuses.

    Responses are generated greedily with the study's prompt. A response counts as `refused` if it
    contains one of thirteen keywords, such as "I cannot" or "Sorry" (Zou et al. 2023, arXiv
    2307.15043). Some answers contain a keyword and some refusals contain none ("I can't"), so the
    responses are kept for review in the table `benchmark_responses`.
    """

    table: Table = Field(
        description="One prompt a row, in column `question`; AdvBench's file calls it `goal`."
    )
    limit: PositiveInt | None = Field(
        None, description="At most so many prompts, evenly spaced over the table."
    )
    max_new_tokens: PositiveInt = Field(32, description="Longest generated answer, in tokens.")


class BenchmarksConfig(ConfigModel):
    """The lm-evaluation-harness runs on the base and on tuned models."""

    dataset: Name | None = Field(
        None,
        description="Dataset whose folder TASK/SPLIT.jsonl holds the rows, in the hub's columns; "
        "without it they come from the hub at pinned revisions.",
    )
    tasks: Annotated[dict[TaskName, TaskConfig], DistinctNames] = Field(
        default_factory=dict,
        description="The tasks by their names in the harness's registry, with settings.",
    )
    refusals: RefusalsConfig | None = Field(
        None, description="Ask harmful prompts too, and count the answers that refuse."
    )
    models: Literal["selected", "durations"] = Field(
        "selected",
        description="What is scored beside the base: the selected checkpoints, or the end of every "
        "one of `training.durations` with the chosen setting, the selected among them.",
    )
    during_training: dict[TaskName, PositiveInt] = Field(
        default_factory=dict,
        description="Of these tasks the first so many items are asked at every evaluation of a "
        "training too, by the training job itself, and of the base in the same batches: accuracy "
        "and churn over its course. Not of tasks whose answers are programs or whose metric is no "
        "mean over items, nor with `training.durations`, where the ends are scored.",
    )
    batch_size: PositiveInt = Field(
        16,
        description="Sequences per forward pass. In bfloat16 it has a say in the last digits of "
        "log-likelihoods. Another one trains nothing again: runs that are finished keep what they "
        "were asked `during_training`.",
    )
    sandbox: Literal["bubblewrap", "none"] = Field(
        "bubblewrap",
        description="Where model-written programs run. Without a working sandbox HumanEval is "
        "not scored. `none` runs them unprotected: only on a machine you can lose.",
    )

    @model_validator(mode="after")
    def _check_training_benchmarks(self) -> BenchmarksConfig:
        for name in self.during_training:
            if name not in self.tasks:
                known = ", ".join(self.tasks) or "there are none"
                raise ValueError(f"`during_training`: {name} is not among the `tasks` ({known})")
        return self


TEXT_PROBE = "general_text"
"""What the tables of results call the general text, in place of a probe's name."""


ALL_PROBES = "all_probes"
"""The same of what is computed from all probes together."""


class RefusalPromptsConfig(ConfigModel):
    """How the prompts are read and rendered that a model should refuse."""

    prompt: PromptConfig
    columns: ColumnsConfig


class ScoringConfig(ConfigModel):
    """What the scores of a checkpoint depend on, besides its weights and the rows."""

    benchmarks: BenchmarksConfig
    precision: str
    refusal_prompts: RefusalPromptsConfig | None


class TrainingBenchmarksConfig(ConfigModel):
    """Benchmarks of every evaluation: tasks by name, with the number of items as their limit."""

    tasks: dict[str, TaskConfig]
    batch_size: int


class ProbeConfig(ConfigModel):
    """A question-answer set on which every model of the study is measured."""

    table: Annotated[list[Table], BeforeValidator(as_list), AfterValidator(unique)] = Field(
        description="Table or tables with question, answer, and for the truth ratio "
        "perturbed_answer (wrong answers) and, if there is one, paraphrased_answer."
    )
    knowledge: Literal["new", "old"] = Field(description="Is it trained on, or to be kept?")
    truth_ratio: bool = Field(True, description="Score wrong answers too; the rows must have them.")
    limit: PositiveInt | None = Field(
        None, description="At most so many rows, evenly spaced over the table."
    )


class GeneralTextConfig(ConfigModel):
    """A text on which the predictions of every model are compared with the base's.

    Gives the forgetting cross-entropy of *Scaling Laws for Forgetting* (arXiv 2401.05605), hard and
    soft, the KL divergence, and the share of tokens on which model and base agree.
    """

    table: Table = Field(description="Rows with `text`; they are joined as they are.")
    block: Annotated[int, Field(ge=2)] = Field(
        512, description="Tokens that are read at once; what is left at the end is dropped."
    )
    limit: PositiveInt | None = Field(
        None, description="At most so many blocks, evenly spaced over the text."
    )
    batch_size: PositiveInt = Field(4, description="Blocks per forward pass.")


RougeTokenizer = Literal["rouge_score", "unicode"]


class EvaluationConfig(ConfigModel):
    """How and how often the probes are scored."""

    every_epochs: PositiveFloat = Field(1.0, description="Epochs between two evaluations.")
    max_new_tokens: PositiveInt = Field(200, description="Longest generated answer, in tokens.")
    batch_size: PositiveInt = Field(64, description="Sequences per forward pass.")
    rouge_tokenizer: RougeTokenizer = Field(
        "rouge_score",
        description="What ROUGE takes for words. `rouge_score`: as published, runs of a–z and 0–9, "
        "Porter-stemmed; all other letters are lost. `unicode`: runs of letters, numbers and marks "
        "of any script, not stemmed; in scripts without spaces (Chinese, Japanese, Thai, Lao, "
        "Khmer, Burmese) every letter. Its numbers cannot be compared with published ones.",
    )
