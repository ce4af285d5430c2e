"""The study: the validated content of one YAML file, and the checks between its sections.

The classes of `forgetting.config` define every key with its type, default and description.
config/schema.json and the tables of config/README.md are generated from them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from forgetting.config.base_model import BaseModelConfig
from forgetting.config.data import ColumnsConfig, DatasetConfig, PromptConfig, TableRef
from forgetting.config.evaluation import (
    ALL_PROBES,
    TEXT_PROBE,
    BenchmarksConfig,
    EvaluationConfig,
    GeneralTextConfig,
    ProbeConfig,
    SelectionConfig,
)
from forgetting.config.methods import MethodConfig
from forgetting.config.training import TrainingConfig
from forgetting.config.types import (
    ConfigModel,
    DistinctNames,
    KeyedError,
    KeyPath,
    Name,
    PositiveInt,
    Seed,
    Table,
    as_list,
    unique,
)


class StudyConfig(ConfigModel):
    """A base model, new knowledge, probes, methods with their sweeps, and a selection rule."""

    title: str = Field(description="Heading of the report.")
    description: str = Field("", description="The question of the study, in a sentence or two.")
    seeds: Annotated[list[Seed], AfterValidator(unique)] = Field(
        [0],
        min_length=1,
        description="Seeds of the runs. With three, the report has intervals over seeds.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Precision of forward and backward passes; trained weights are always float32. "
        "auto: bfloat16 if the GPU or the processor multiplies it in hardware, float32 otherwise.",
    )
    datasets: Annotated[dict[Name, DatasetConfig], DistinctNames] = Field(
        description="Origins of the tables, by name."
    )
    base: BaseModelConfig
    prompt: PromptConfig = PromptConfig()
    train: Annotated[list[Table], BeforeValidator(as_list)] = Field(
        min_length=1, description="Table or tables of the new knowledge."
    )
    train_limit: PositiveInt | None = Field(
        None, description="Maximum number of training rows, evenly spaced over the tables."
    )
    probes: Annotated[dict[Name, ProbeConfig], DistinctNames] = Field(
        min_length=1, description="Question-answer sets, by name."
    )
    general_text: GeneralTextConfig | None = Field(
        None, description="Measure the divergence from the base model on this text."
    )
    evaluation: EvaluationConfig = EvaluationConfig()
    training: TrainingConfig = TrainingConfig()
    methods: list[MethodConfig] = Field(
        min_length=1, description="The methods that are compared, each with its sweep."
    )
    selection: SelectionConfig
    benchmarks: BenchmarksConfig = BenchmarksConfig()

    @model_validator(mode="after")
    def _check_retained_not_trained(self) -> StudyConfig:
        self._check_text_not_trained()
        for name, probe in self.probes.items():
            keys = ("probes", name, "table")
            if probe.knowledge == "old" and (trained := set(probe.table) & set(self.train)):
                raise KeyedError(keys, f"{min(trained)} is trained on, so it is not old knowledge")
            for number, method in enumerate(self.methods):
                replay = method.mitigation and method.mitigation.replay
                if replay and replay.table in probe.table:
                    raise KeyedError(
                        keys,
                        f"methods.{number} replays {replay.table}, so the probe cannot measure "
                        "forgetting; replay another table",
                    )
        return self

    def _check_text_not_trained(self) -> None:
        replays = [m.mitigation.replay for m in self.methods if m.mitigation]
        trained = {*self.train, *(replay.table for replay in replays if replay)}
        if self.general_text and self.general_text.table in trained:
            raise KeyedError(
                ("general_text", "table"),
                f"{self.general_text.table} is trained on, so it cannot measure forgetting; take "
                "another table",
            )

    @model_validator(mode="after")
    def _check_probe_names(self) -> StudyConfig:
        reserved = {TEXT_PROBE: "the section general_text", ALL_PROBES: "metrics of all probes"}
        for name, use in reserved.items():
            if name in self.probes:
                raise KeyedError(("probes", name), f"the name is reserved for {use}; rename it")
        probe = self.probes.get(self.selection.probe)
        if probe is None or probe.knowledge != "new":
            raise KeyedError(
                ("selection", "probe"),
                f"`{self.selection.probe}` is not a probe of new knowledge",
            )
        return self

    @model_validator(mode="after")
    def _check_durations(self) -> StudyConfig:
        if self.benchmarks.models == "durations" and not self.training.durations:
            raise ValueError("benchmarks.models: `durations` needs training.durations")
        if self.benchmarks.during_training and self.training.durations:
            raise KeyedError(
                ("benchmarks", "during_training"),
                "with training.durations only the ends of durations are evaluated; remove it, and "
                "set `models: durations` to score these ends",
            )
        if self.training.durations and self.selection.stop_after_evaluations is not None:
            raise KeyedError(
                ("selection", "stop_after_evaluations"),
                "it would end the trunk before the longest of training.durations leaves it; "
                "remove it",
            )
        return self

    @model_validator(mode="after")
    def _check_fits_training(self) -> StudyConfig:
        epochs, training = self.training.epochs, self.training
        if self.evaluation.every_epochs > epochs:
            raise KeyedError(
                ("evaluation", "every_epochs"),
                f"{self.evaluation.every_epochs:g} is more than training.epochs, {epochs:g}, so "
                "there would be no evaluation during training; make it smaller",
            )
        deadline = self.selection.deadline_epochs
        if deadline is not None and deadline > epochs:
            raise KeyedError(
                ("selection", "deadline_epochs"),
                f"{deadline:g} is more than training.epochs, {epochs:g}, so it would have no "
                "effect; make it smaller, or leave it out",
            )
        ratio, warmup = training.warmup_ratio, training.warmup_epochs
        if ratio is None and warmup is None and training.warmup_steps is None and epochs <= 1:
            raise KeyedError(
                ("training", "epochs"),
                f"{epochs:g} leaves no step after the warm-up, which is 1 epoch by default; set "
                "training.warmup_epochs to less",
            )
        if warmup is not None and warmup >= epochs:
            raise KeyedError(
                ("training", "warmup_epochs"),
                f"{warmup:g} leaves no step of training.epochs, {epochs:g}; make it smaller",
            )
        if ratio == 1:
            raise KeyedError(
                ("training", "warmup_ratio"),
                "the warm-up takes all steps, so the learning rate is never at its peak; make it "
                "smaller",
            )
        return self

    @model_validator(mode="after")
    def _check_system_messages(self) -> StudyConfig:
        for name, dataset in self.datasets.items():
            if dataset.columns.system and not self.prompt.chat:
                raise ValueError(
                    f"datasets.{name}.columns: `system` needs `prompt: {{chat: true}}`, because "
                    "other templates have no system message"
                )
        return self

    @model_validator(mode="after")
    def _check_processes(self) -> StudyConfig:
        for number, method in enumerate(self.methods):
            keys = ("methods", number, "processes")
            if method.processes is None:
                if method.nodes:
                    raise KeyedError(
                        ("methods", number, "nodes"),
                        "`nodes` needs `processes`, which are distributed over them; set both, or "
                        "neither",
                    )
                continue
            if method.processes % (method.nodes or 1):
                raise KeyedError(
                    ("methods", number, "nodes"),
                    f"{method.processes} processes cannot be distributed evenly over "
                    f"{method.nodes} nodes; set `processes` to a multiple of `nodes`",
                )
            if method.processes == 1:
                continue
            if method.method == "hybrid":
                raise KeyedError(
                    keys, "both stages of method hybrid are trained in one process; set it to 1"
                )
            if method.method == "full" and self.training.optimizer == "adafactor":
                raise KeyedError(
                    keys,
                    "adafactor needs whole matrices, but method full shards them over the "
                    "processes; set it to 1, or training.optimizer to adamw or lionw",
                )
        return self

    @model_validator(mode="after")
    def _check_datasets(self) -> StudyConfig:
        named = [(keys, TableRef.parse(table).dataset) for keys, table in self.tables()]
        if self.benchmarks.dataset:
            named.append((("benchmarks", "dataset"), self.benchmarks.dataset))
        for keys, name in named:
            if name not in self.datasets:
                known = ", ".join(sorted(self.datasets))
                raise KeyedError(keys, f"`{name}` is not among the datasets ({known})")
        return self

    @property
    def benchmark_dataset(self) -> DatasetConfig | None:
        """Return the dataset of the benchmarks' rows; None if they are those on the hub."""
        name = self.benchmarks.dataset
        return self.datasets[name] if name else None

    def columns(self, table: str) -> ColumnsConfig:
        """Return the column names of a table's dataset."""
        return TableRef.parse(table).config(self).columns

    def tables(self) -> list[tuple[KeyPath, str]]:
        """Return every use of a table, as its key path and the name `DATASET/TABLE`."""
        documents = self.base.pretrain.documents if self.base.pretrain else []
        uses: list[tuple[KeyPath, str]] = [
            *((("train", number), table) for number, table in enumerate(self.train)),
            *(
                (("probes", name, "table", number), table)
                for name, probe in self.probes.items()
                for number, table in enumerate(probe.table)
            ),
            *(
                (("base", "pretrain", "documents", number), table)
                for number, table in enumerate(documents)
            ),
        ]
        for number, method in enumerate(self.methods):
            sections = method.mitigation.sections if method.mitigation else {}
            for name, section in sections.items():
                keys = ("methods", number, "mitigation", name, "table")
                uses += [(keys, table) for table in section.tables]
        if self.general_text:
            uses.append((("general_text", "table"), self.general_text.table))
        if self.benchmarks.refusals:
            uses.append((("benchmarks", "refusals", "table"), self.benchmarks.refusals.table))
        return uses
