"""How models are measured and selected.

Sections `probes`, `general_text`, `evaluation`, `benchmarks` and `selection`.
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
    """Options of one task of the lm-evaluation-harness; by default those of its definition.

    A task is named as in the harness's registry (`lm_eval ls tasks`). Prompts, filters and metrics
    are those of its definition; only the origin of the rows is chosen by the study.
    """

    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Solved examples in the prompt; by default that of the task."
    )
    limit: PositiveInt | None = Field(None, description="Evaluate only the first `limit` items.")
    max_new_tokens: PositiveInt | None = Field(
        None, description="Longest generated answer; by default that of the task."
    )
    metric: str | None = Field(
        None,
        description="Metric of the task that figures and churn use, such as `acc_norm` or, with "
        "its filter, `exact_match,strict-match`. By default the first metric of the task.",
    )
    chance: Fraction | None = Field(
        None,
        description="Score of random guessing. It is known for built-in tasks. For the "
        "accuracy of other tasks it is by default the mean score of one random choice.",
    )
    revision: GitCommit | None = Field(
        None,
        description="Commit of the task's dataset on the hub. It is required if the rows come from "
        "the hub, except for built-in tasks.",
    )
    samples: PositiveInt | None = Field(
        None,
        description="Only for tasks whose answers are programs: sample this number of answers to "
        "each item and estimate pass@k from them (Chen et al. 2021, arXiv 2107.03374). By default "
        "there is one greedy answer, or what the task defines.",
    )
    temperature: PositiveFloat | None = Field(
        None, description="With `samples`: divides the logits; 0.2 by default."
    )
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        None,
        description="With `samples`: draw from the most probable tokens that together have this "
        "probability; 0.95 by default.",
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
    def _check_sampling(self) -> TaskConfig:
        for name in ("temperature", "top_p", "k"):
            if self.samples is None and getattr(self, name) is not None:
                raise ValueError(f"`{name}` needs `samples`, the number of sampled answers")
        if self.samples is not None and max(self.k or [1]) > self.samples:
            raise ValueError(
                f"pass@{max(self.k or [1])} cannot be estimated from {self.samples} samples; set "
                "more `samples`, or smaller `k`"
            )
        return self


REFUSALS_TASK = "refusals"
"""Task name of the refusal rate in the tables of benchmark results."""


class RefusalsConfig(ConfigModel):
    """Harmful prompts, such as AdvBench's, of which the refused fraction is measured.

    Responses are generated greedily with the study's prompt. A response counts as `refused` if it
    contains one of thirteen keywords, such as "I cannot" or "Sorry" (Zou et al. 2023, arXiv
    2307.15043). Some answers contain a keyword and some refusals contain none ("I can't"), so the
    responses are kept for review in the table `benchmark_responses`.
    """

    table: Table = Field(
        description="One prompt a row, in column `question`; AdvBench's file calls it `goal`."
    )
    limit: PositiveInt | None = Field(
        None, description="Maximum number of prompts, evenly spaced over the table."
    )
    max_new_tokens: PositiveInt = Field(32, description="Longest generated answer, in tokens.")


class BenchmarksConfig(ConfigModel):
    """Tasks of the lm-evaluation-harness that are run on the base model and on tuned models."""

    dataset: Name | None = Field(
        None,
        description="Dataset whose folder contains the rows as TASK/SPLIT.jsonl, with the columns "
        "of the hub's datasets. By default the rows come from the hub at pinned revisions.",
    )
    tasks: Annotated[dict[TaskName, TaskConfig], DistinctNames] = Field(
        default_factory=dict,
        description="The tasks by their names in the harness's registry, with their options.",
    )
    refusals: RefusalsConfig | None = Field(
        None, description="Also evaluate harmful prompts, and count the answers that refuse."
    )
    models: Literal["selected", "durations"] = Field(
        "selected",
        description="Which tuned models are scored: the selected checkpoints, or, with the "
        "selected hyperparameters, the end of each of `training.durations`.",
    )
    during_training: dict[TaskName, PositiveInt] = Field(
        default_factory=dict,
        description="Number of items of a task that the training job also evaluates at every "
        "evaluation: the first ones. The base model is evaluated on them in the same batches. This "
        "gives accuracy and churn over training. It is not available for tasks whose answers are "
        "programs, for metrics that are not means over items, and with `training.durations`.",
    )
    batch_size: PositiveInt = Field(
        16,
        description="Sequences per forward pass. In bfloat16 it changes the last digits of "
        "log-likelihoods. Changing it retrains nothing: finished runs keep their results of "
        "`during_training`.",
    )
    sandbox: Literal["bubblewrap", "none"] = Field(
        "bubblewrap",
        description="Where programs written by a model run. Without a working sandbox HumanEval is "
        "not scored. `none` runs them unprotected: use it only on a disposable machine.",
    )

    @model_validator(mode="after")
    def _check_training_benchmarks(self) -> BenchmarksConfig:
        for name in self.during_training:
            if name not in self.tasks:
                known = ", ".join(self.tasks) or "there are none"
                raise ValueError(f"`during_training`: {name} is not among the `tasks` ({known})")
        return self


TEXT_PROBE = "general_text"
"""Probe name of the general text in the tables of results."""


ALL_PROBES = "all_probes"
"""Probe name of metrics computed from all probes in the tables of results."""


class RefusalPromptsConfig(ConfigModel):
    """Template and columns of the prompts that a model should refuse."""

    prompt: PromptConfig
    columns: ColumnsConfig


class ScoringConfig(ConfigModel):
    """All that the scores of a checkpoint depend on, except its weights and the rows."""

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
        description="Table or tables with `question` and `answer`. For the truth ratio the rows "
        "also need `perturbed_answer` (wrong answers) and may have `paraphrased_answer`."
    )
    knowledge: Literal["new", "old"] = Field(
        description="new: it is trained on; old: it should be retained."
    )
    truth_ratio: bool = Field(
        True, description="Also score wrong answers, which the rows must have."
    )
    limit: PositiveInt | None = Field(
        None, description="Maximum number of rows, evenly spaced over the table."
    )


class GeneralTextConfig(ConfigModel):
    """A text on which the predictions of every model are compared with those of the base model.

    The metrics are the forgetting cross-entropy of *Scaling Laws for Forgetting* (arXiv
    2401.05605), hard and soft, the KL divergence, and the fraction of tokens on which the most
    probable predictions agree.
    """

    table: Table = Field(description="Rows with `text`, which are joined without separators.")
    block: Annotated[int, Field(ge=2)] = Field(
        512, description="Tokens per block; an incomplete block at the end is dropped."
    )
    limit: PositiveInt | None = Field(
        None, description="Maximum number of blocks, evenly spaced over the text."
    )
    batch_size: PositiveInt = Field(4, description="Blocks per forward pass.")


RougeTokenizer = Literal["rouge_score", "unicode"]


class EvaluationConfig(ConfigModel):
    """How and how often models are evaluated on the probes."""

    every_epochs: PositiveFloat = Field(1.0, description="Epochs between two evaluations.")
    max_new_tokens: PositiveInt = Field(200, description="Longest generated answer, in tokens.")
    batch_size: PositiveInt = Field(64, description="Sequences per forward pass.")
    rouge_tokenizer: RougeTokenizer = Field(
        "rouge_score",
        description="Words of ROUGE. `rouge_score`: as published, runs of a–z and 0–9, "
        "Porter-stemmed; all other letters are dropped. `unicode`: runs of letters, numbers and "
        "marks of any script, not stemmed, and every letter of scripts without spaces (Chinese, "
        "Japanese, Thai, Lao, Khmer, Burmese); not comparable with published numbers.",
    )


class SelectionConfig(ConfigModel):
    """Rule that selects a checkpoint and the hyperparameters of each method."""

    probe: Name = Field(description="Probe of new knowledge to which the threshold applies.")
    metric: Literal["rougeL_recall", "rougeL_f1", "rouge1_recall", "probability"] = Field(
        "rougeL_recall", description="Metric whose mean over the probe's items is compared."
    )
    threshold: Annotated[Number, Field(gt=0, le=1)] = Field(
        0.9, description="The last evaluation before the metric first reaches it is selected."
    )
    hyperparameters: Literal["earliest", "smallest-lr", "fixed"] = Field(
        "earliest",
        description="earliest: those that reach the threshold at the earliest step; smallest-lr: "
        "the smallest learning rate that reaches it within `deadline_epochs`; fixed: the "
        "`selected_hyperparameters` of each method, or its only ones.",
    )
    deadline_epochs: PositiveFloat | None = Field(
        None, description="Deadline of `smallest-lr`; by default the end of training."
    )
    if_not_reached: Literal["none", "last"] = Field(
        "none",
        description="none: a run that never reaches the threshold has no selected checkpoint; "
        "last: its last checkpoint is selected and marked.",
    )
    stop_after_evaluations: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="End a run after this number of evaluations beyond the one that reaches the "
        "threshold. It saves time and cuts off the overfitted end of the trajectory. By default "
        "every run is trained to its end.",
    )
    wise_ft: Annotated[list[Fraction], AfterValidator(unique)] = Field(
        [],
        description="Also evaluate interpolations between the base model (0) and the selected "
        "checkpoints (1), without training (WiSE-FT, arXiv 2109.01903). Table `wise_ft` has the "
        "items.",
    )

    @model_validator(mode="after")
    def _check_deadline(self) -> SelectionConfig:
        if self.deadline_epochs is not None and self.hyperparameters != "smallest-lr":
            raise ValueError("`deadline_epochs` needs `hyperparameters: smallest-lr`")
        return self
