"""What a study is: the validated model of one YAML file under config/studies.

Every key, its type, default and meaning stands here, or in the module of its section in
`forgetting.config`, and nowhere else; the JSON Schema in config/schema.json and the table in
config/README.md are generated from these classes. What sections ask of each other stands here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from forgetting.config.base_model import BaseModelConfig
from forgetting.config.data import ColumnsConfig, DatasetConfig, PromptConfig
from forgetting.config.evaluation import (
    ALL_PROBES,
    TEXT_PROBE,
    BenchmarksConfig,
    EvaluationConfig,
    GeneralTextConfig,
    ProbeConfig,
)
from forgetting.config.methods import MethodConfig
from forgetting.config.selection import SelectionConfig
from forgetting.config.training import TrainingConfig
from forgetting.config.types import (
    ConfigModel,
    DistinctNames,
    KeyedError,
    Name,
    PositiveInt,
    Seed,
    Table,
    as_list,
    unique,
)


class StudyConfig(ConfigModel):
    """One study: a base model, new knowledge, probes of the old, a sweep and a selection rule."""

    title: str = Field(description="Heading of the report.")
    description: str = Field("", description="What is asked, in a sentence or two.")
    seeds: Annotated[list[Seed], AfterValidator(unique)] = Field(
        [0], min_length=1, description="One training per seed; three let the report say more."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Arithmetic of forward and backward passes; the weights that are trained stay "
        "float32. auto: bfloat16 where the GPU or the processor multiplies it in hardware, else "
        "float32.",
    )
    datasets: Annotated[dict[Name, DatasetConfig], DistinctNames] = Field(
        description="Origins of the tables, by name."
    )
    base: BaseModelConfig
    prompt: PromptConfig = PromptConfig()
    train: Annotated[list[Table], BeforeValidator(as_list)] = Field(
        min_length=1, description="Table or tables of the new knowledge."
    )
    train_limit: PositiveInt | None = Field(None, description="At most so many evenly spaced rows.")
    probes: Annotated[dict[Name, ProbeConfig], DistinctNames] = Field(
        min_length=1, description="Question-answer sets, by name."
    )
    general_text: GeneralTextConfig | None = Field(
        None, description="Measure the forgetting cross-entropy on this text."
    )
    evaluation: EvaluationConfig = EvaluationConfig()
    training: TrainingConfig = TrainingConfig()
    methods: list[MethodConfig] = Field(min_length=1, description="The sweep.")
    selection: SelectionConfig
    benchmarks: BenchmarksConfig = BenchmarksConfig()

    @model_validator(mode="after")
    def _check_retained_not_trained(self) -> StudyConfig:
        self._check_text_not_trained()
        for name, probe in self.probes.items():
            place = ("probes", name, "table")
            if probe.knowledge == "old" and (both := set(probe.table) & set(self.train)):
                raise KeyedError(place, f"{min(both)} is trained on, so it is no old knowledge")
            for number, method in enumerate(self.methods):
                replay = method.mitigation and method.mitigation.replay
                if replay and replay.table in probe.table:
                    raise KeyedError(
                        place,
                        f"methods.{number} replays {replay.table}, so the probe would not tell "
                        "what is forgotten; replay another table",
                    )
        return self

    def _check_text_not_trained(self) -> None:
        if TEXT_PROBE in self.probes:
            raise KeyedError(("probes", TEXT_PROBE), "the name belongs to the section general_text")
        if ALL_PROBES in self.probes:
            raise KeyedError(
                ("probes", ALL_PROBES), "the name belongs to what all probes say together"
            )
        replays = [m.mitigation.replay for m in self.methods if m.mitigation]
        trained = {*self.train, *(replay.table for replay in replays if replay)}
        if self.general_text and self.general_text.table in trained:
            raise KeyedError(
                ("general_text", "table"),
                f"{self.general_text.table} is trained on, so it would not tell what is forgotten; "
                "take another table",
            )

    @model_validator(mode="after")
    def _check_durations(self) -> StudyConfig:
        if self.benchmarks.models == "durations" and not self.training.durations:
            raise ValueError("benchmarks.models: `durations` needs training.durations")
        if self.benchmarks.during_training and self.training.durations:
            raise KeyedError(
                ("benchmarks", "during_training"),
                "with training.durations the points of a course are the ends of its durations: "
                "take it out, and `models: durations` to score these",
            )
        if self.training.durations and self.selection.stop_after_evaluations is not None:
            raise KeyedError(
                ("selection", "stop_after_evaluations"),
                "it would end the trunk before the longest of training.durations leaves it; "
                "take it out",
            )
        return self

    @model_validator(mode="after")
    def _check_fits_training(self) -> StudyConfig:
        epochs, training = self.training.epochs, self.training
        if self.evaluation.every_epochs > epochs:
            raise KeyedError(
                ("evaluation", "every_epochs"),
                f"{self.evaluation.every_epochs:g} is more than training.epochs, {epochs:g}, so "
                "that nothing would be measured on the way; make it smaller",
            )
        within = self.selection.deadline_epochs
        if within is not None and within > epochs:
            raise KeyedError(
                ("selection", "deadline_epochs"),
                f"{within:g} is more than training.epochs, {epochs:g}, so that it would be no "
                "deadline; make it smaller, or leave it out",
            )
        share, warmup = training.warmup_ratio, training.warmup_epochs
        if share is None and warmup is None and training.warmup_steps is None and epochs <= 1:
            raise KeyedError(
                ("training", "epochs"),
                f"{epochs:g} leaves nothing after the warm-up, which is 1 epoch by default; set "
                "training.warmup_epochs to less",
            )
        if warmup is not None and warmup >= epochs:
            raise KeyedError(
                ("training", "warmup_epochs"),
                f"{warmup:g} leaves nothing of training.epochs, {epochs:g}; make it smaller",
            )
        if share == 1:
            raise KeyedError(
                ("training", "warmup_ratio"),
                "the warm-up takes all steps, and the rate is never at its peak; make it smaller",
            )
        return self

    @model_validator(mode="after")
    def _check_system_messages(self) -> StudyConfig:
        for name, dataset in self.datasets.items():
            if dataset.columns.system and not self.prompt.chat:
                raise ValueError(
                    f"datasets.{name}.columns: `system` needs `prompt: {{chat: true}}`: other "
                    "templates have no place for it"
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
                        "nodes need `processes` to be spread over them; give these too, or neither",
                    )
                continue
            if method.processes % (method.nodes or 1):
                raise KeyedError(
                    ("methods", number, "nodes"),
                    f"{method.processes} processes cannot be spread evenly over {method.nodes} "
                    "nodes; take `processes` a multiple of `nodes`",
                )
            if method.processes == 1:
                continue
            if method.method == "hybrid":
                raise KeyedError(
                    keys, "the two parts of method hybrid are trained in one process; take 1"
                )
            if method.method == "full" and self.training.optimizer == "adafactor":
                raise KeyedError(
                    keys,
                    "adafactor needs whole matrices, and method full in several processes has "
                    "parts of them; take 1, or training.optimizer: adamw or lionw",
                )
        return self

    @model_validator(mode="after")
    def _check_names(self) -> StudyConfig:
        origins = [(keys, table.split("/", 1)[0]) for keys, table in self.tables()]
        if self.benchmarks.dataset:
            origins.append((("benchmarks", "dataset"), self.benchmarks.dataset))
        for keys, name in origins:
            if name not in self.datasets:
                known = ", ".join(sorted(self.datasets))
                raise KeyedError(keys, f"`{name}` is not among the datasets ({known})")
        probe = self.probes.get(self.selection.probe)
        if probe is None or probe.knowledge != "new":
            raise KeyedError(
                ("selection", "probe"),
                f"`{self.selection.probe}` is not a probe of new knowledge",
            )
        return self

    def columns(self, table: str) -> ColumnsConfig:
        """What the dataset of a table calls its columns."""
        return self.datasets[table.split("/", 1)[0]].columns

    def tables(self) -> list[tuple[tuple[str | int, ...], str]]:
        """Every use of a table, with the keys at which it stands."""
        documents = self.base.pretrain.documents if self.base.pretrain else []
        found: list[tuple[tuple[str | int, ...], str]] = [
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
                found += [(keys, table) for table in section.tables]
        if self.general_text:
            found.append((("general_text", "table"), self.general_text.table))
        if self.benchmarks.refusals:
            found.append((("benchmarks", "refusals", "table"), self.benchmarks.refusals.table))
        return found
