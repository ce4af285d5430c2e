"""What a study is: the validated model of one YAML file under config/studies.

Every key, its type, default and meaning stands here, or in the module of its section in
`forgetting.sections`, and nowhere else; the JSON Schema in workflow/schemas and the table in
config/README.md are generated from these classes. What sections ask of each other stands here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from forgetting.sections.base import Base
from forgetting.sections.benchmarks import Benchmarks
from forgetting.sections.columns import Columns
from forgetting.sections.dataset import Dataset
from forgetting.sections.fields import (
    AtKey,
    Count,
    DistinctNames,
    Name,
    Seed,
    Strict,
    Table,
    distinct,
    several,
)
from forgetting.sections.measurement import ALL_PROBES, TEXT_PROBE, GeneralText, Measurement, Probe
from forgetting.sections.method import Method
from forgetting.sections.prompt import Prompt
from forgetting.sections.selection import Selection
from forgetting.sections.training import Training


class Study(Strict):
    """One study: a base model, new knowledge, probes of the old, a sweep and a selection rule."""

    title: str = Field(description="Heading of the report.")
    description: str = Field("", description="What is asked, in a sentence or two.")
    seeds: Annotated[list[Seed], AfterValidator(distinct)] = Field(
        [0], min_length=1, description="One training per seed; three let the report say more."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Arithmetic of forward and backward passes; the weights that are trained stay "
        "float32. auto: bfloat16 where the GPU or the processor multiplies it in hardware, else "
        "float32.",
    )
    datasets: Annotated[dict[Name, Dataset], DistinctNames] = Field(
        description="Origins of the tables, by name."
    )
    base: Base
    prompt: Prompt = Prompt()
    train: Annotated[list[Table], BeforeValidator(several)] = Field(
        min_length=1, description="Table or tables of the new knowledge."
    )
    train_limit: Count | None = Field(None, description="At most so many evenly spaced rows.")
    probes: Annotated[dict[Name, Probe], DistinctNames] = Field(
        min_length=1, description="Question-answer sets, by name."
    )
    general_text: GeneralText | None = Field(
        None, description="Measure the forgetting cross-entropy on this text."
    )
    measurement: Measurement = Measurement()
    training: Training = Training()
    methods: list[Method] = Field(min_length=1, description="The sweep.")
    selection: Selection
    benchmarks: Benchmarks = Benchmarks()

    @model_validator(mode="after")
    def _old_is_not_trained_on(self) -> Study:
        self._text_is_not_trained_on()
        for name, probe in self.probes.items():
            place = ("probes", name, "table")
            if probe.knowledge == "old" and (both := set(probe.table) & set(self.train)):
                raise AtKey(place, f"{min(both)} is trained on, so it is no old knowledge")
            for number, method in enumerate(self.methods):
                replay = method.mitigation and method.mitigation.replay
                if replay and replay.table in probe.table:
                    raise AtKey(
                        place,
                        f"methods.{number} replays {replay.table}, so the probe would not tell "
                        "what is forgotten; replay another table",
                    )
        return self

    def _text_is_not_trained_on(self) -> None:
        if TEXT_PROBE in self.probes:
            raise AtKey(("probes", TEXT_PROBE), "the name belongs to the section general_text")
        if ALL_PROBES in self.probes:
            raise AtKey(("probes", ALL_PROBES), "the name belongs to what all probes say together")
        replays = [m.mitigation.replay for m in self.methods if m.mitigation]
        trained = {*self.train, *(replay.table for replay in replays if replay)}
        if self.general_text and self.general_text.table in trained:
            raise AtKey(
                ("general_text", "table"),
                f"{self.general_text.table} is trained on, so it would not tell what is forgotten; "
                "take another table",
            )

    @model_validator(mode="after")
    def _budgets_are_there_and_whole(self) -> Study:
        if self.benchmarks.models == "budgets" and not self.training.budgets:
            raise ValueError("benchmarks.models: `budgets` needs training.budgets")
        if self.benchmarks.along and self.training.budgets:
            raise AtKey(
                ("benchmarks", "along"),
                "with training.budgets the points of a course are the ends of its budgets: take it "
                "out, and `models: budgets` to score these",
            )
        if self.training.budgets and self.selection.stop_after is not None:
            raise AtKey(
                ("selection", "stop_after"),
                "it would end the trunk before the longest of training.budgets leaves it; take it "
                "out",
            )
        return self

    @model_validator(mode="after")
    def _fits_into_the_training(self) -> Study:
        epochs, training = self.training.epochs, self.training
        if self.measurement.every_epochs > epochs:
            raise AtKey(
                ("measurement", "every_epochs"),
                f"{self.measurement.every_epochs:g} is more than training.epochs, {epochs:g}, so "
                "that nothing would be measured on the way; make it smaller",
            )
        within = self.selection.within_epochs
        if within is not None and within > epochs:
            raise AtKey(
                ("selection", "within_epochs"),
                f"{within:g} is more than training.epochs, {epochs:g}, so that it would be no "
                "deadline; make it smaller, or leave it out",
            )
        share, warmup = training.warmup_share, training.warmup_epochs
        if share is None and warmup is None and training.warmup_steps is None and epochs <= 1:
            raise AtKey(
                ("training", "epochs"),
                f"{epochs:g} leaves nothing after the warm-up, which is 1 epoch by default; set "
                "training.warmup_epochs to less",
            )
        if warmup is not None and warmup >= epochs:
            raise AtKey(
                ("training", "warmup_epochs"),
                f"{warmup:g} leaves nothing of training.epochs, {epochs:g}; make it smaller",
            )
        if share == 1:
            raise AtKey(
                ("training", "warmup_share"),
                "the warm-up takes all steps, and the rate is never at its peak; make it smaller",
            )
        return self

    @model_validator(mode="after")
    def _system_messages_are_used(self) -> Study:
        for name, dataset in self.datasets.items():
            if dataset.columns.system and not self.prompt.chat:
                raise ValueError(
                    f"datasets.{name}.columns: `system` needs `prompt: {{chat: true}}`: other "
                    "templates have no place for it"
                )
        return self

    @model_validator(mode="after")
    def _processes_can_share_a_run(self) -> Study:
        for number, method in enumerate(self.methods):
            keys = ("methods", number, "processes")
            if method.processes is None:
                if method.nodes:
                    raise AtKey(
                        ("methods", number, "nodes"),
                        "nodes need `processes` to be spread over them; give these too, or neither",
                    )
                continue
            if method.processes % (method.nodes or 1):
                raise AtKey(
                    ("methods", number, "nodes"),
                    f"{method.processes} processes cannot be spread evenly over {method.nodes} "
                    "nodes; take `processes` a multiple of `nodes`",
                )
            if method.processes == 1:
                continue
            if method.method == "hybrid":
                raise AtKey(
                    keys, "the two parts of method hybrid are trained in one process; take 1"
                )
            if method.method == "full" and self.training.optimizer == "adafactor":
                raise AtKey(
                    keys,
                    "adafactor needs whole matrices, and method full in several processes has "
                    "parts of them; take 1, or training.optimizer: adamw or lionw",
                )
        return self

    @model_validator(mode="after")
    def _names_agree(self) -> Study:
        origins = [(keys, table.split("/", 1)[0]) for keys, table in self.tables()]
        if self.benchmarks.rows:
            origins.append((("benchmarks", "rows"), self.benchmarks.rows))
        for keys, name in origins:
            if name not in self.datasets:
                known = ", ".join(sorted(self.datasets))
                raise AtKey(keys, f"`{name}` is not among the datasets ({known})")
        probe = self.probes.get(self.selection.probe)
        if probe is None or probe.knowledge != "new":
            raise AtKey(
                ("selection", "probe"),
                f"`{self.selection.probe}` is not a probe of new knowledge",
            )
        return self

    def columns(self, table: str) -> Columns:
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
            for name in ("replay", "ewc"):
                if section := method.mitigation and getattr(method.mitigation, name):
                    keys = ("methods", number, "mitigation", name, "table")
                    found.append((keys, section.table))
        if self.general_text:
            found.append((("general_text", "table"), self.general_text.table))
        if self.benchmarks.refusals:
            found.append((("benchmarks", "refusals", "table"), self.benchmarks.refusals.table))
        return found
