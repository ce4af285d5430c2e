"""From a study to its methods, run groups and runs: pure expansion, no input or output."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from forgetting.config.data import ColumnsConfig, PromptConfig
from forgetting.config.evaluation import EvaluationConfig
from forgetting.config.methods import (
    Hyperparameters,
    MethodConfig,
    RankBudgetConfig,
    SecondStageConfig,
)
from forgetting.config.mitigations import MitigationConfig
from forgetting.config.selection import SelectionConfig
from forgetting.config.study import StudyConfig
from forgetting.config.training import TrainingConfig
from forgetting.config.types import MAX_NAME_LENGTH, ConfigModel, KeyedError
from forgetting.config.variants import VARIANTS, VariantName


class Method(ConfigModel):
    """One method of the report: full fine-tuning, or adapters of one variant and rank."""

    name: str
    kind: Literal["lora", "full", "hybrid"]
    label: str
    variant: VariantName = "lora"
    rank: int | None = None
    initial_rank: int | None = None
    """Of adalora, the rank of every adapter at the start; `rank` is the mean at the end."""
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    loraplus_lr_ratio: float | None = None
    rank_budget: RankBudgetConfig | None = None
    embeddings: Literal["frozen", "trained"] | None = None
    embedding_lr_ratio: float | None = None
    second_stage: SecondStageConfig | None = None
    hyperparameters: list[Hyperparameters]
    selected_hyperparameters: Hyperparameters | None = None
    mitigation: MitigationConfig | None = None
    processes: int | None = Field(None, exclude=True)
    nodes: int | None = Field(None, exclude=True)
    """As the study asks for; neither is among what a job is told, since it changes no number: how
    the job is started."""

    @property
    def largest_rank(self) -> int | None:
        """The rank that the adapted matrices must be able to hold."""
        return self.initial_rank or self.rank

    @property
    def scale(self) -> float:
        """What multiplies B·A: alpha/r, or alpha/sqrt(r) for rslora (Kalajdzievski 2023).

        Of adalora, alpha over the initial rank multiplies B·diag(E)·A (peft adds 1e-5 to the rank).
        """
        if self.rank is None or self.alpha is None:
            raise ValueError(f"{self.name} has no adapter")
        if self.initial_rank:
            return self.alpha / (self.initial_rank + 1e-5)
        return self.alpha / (
            math.sqrt(self.rank) if VARIANTS[self.variant].root_scale else self.rank
        )

    @property
    def trains_embeddings(self) -> bool:
        """Are the input embedding and the LM head trained?"""
        return (self.embeddings or ("trained" if self.kind == "full" else "frozen")) == "trained"


class RunGroupConfig(ConfigModel):
    """What the study says of the runs of one method and seed."""

    method: Method
    seed: int
    prompt: PromptConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    selection: SelectionConfig
    precision: str
    knowledge: dict[str, str]
    columns: dict[str, ColumnsConfig] = Field(default_factory=dict)


def expand_methods(study: StudyConfig) -> list[Method]:
    """The study's methods, one per rank, in the order of the file."""
    return [tuning for _, tuning in expand_methods_numbered(study)]


def expand_methods_numbered(study: StudyConfig) -> list[tuple[int, Method]]:
    """The same, each with the number of its entry in the file."""
    found = [
        (number, _with_mitigation(tuning, method.mitigation))
        for number, method in enumerate(study.methods)
        for tuning in _expand(method)
    ]
    names: dict[str, str] = {}
    for number, tuning in found:
        other = names.get(tuning.name.casefold())
        names[tuning.name.casefold()] = tuning.name
        if other is not None and other != tuning.name:
            raise KeyedError(
                ("methods", number),
                f"{tuning.name} and {other} differ only in upper and lower case, and some file "
                "systems take them for one folder; take another `suffix`",
            )
        if other is not None:
            raise KeyedError(
                ("methods", number),
                f"{tuning.name} stands there more than once; merge the entries, or tell "
                "them apart by `suffix`",
            )
        if len(tuning.name) > MAX_NAME_LENGTH:
            raise KeyedError(
                ("methods", number),
                f"its name, {tuning.name}, has {len(tuning.name)} characters, and file names are "
                f"made of it; take a `suffix` so short that it has at most {MAX_NAME_LENGTH}",
            )
        several = tuning.selected_hyperparameters is None and len(tuning.hyperparameters) > 1
        if study.selection.hyperparameters == "fixed" and several:
            raise KeyedError(
                ("methods", number),
                f"{tuning.name} has {len(tuning.hyperparameters)} settings; the rule `fixed` needs "
                "`selected_hyperparameters: {learning_rate: ..., weight_decay: ...}` there",
            )
    return found


def _expand(method: MethodConfig) -> list[Method]:
    shared: dict[str, Any] = {
        "kind": method.method,
        "embeddings": method.embeddings,
        "embedding_lr_ratio": method.embedding_lr_ratio,
        "hyperparameters": [
            Hyperparameters(learning_rate=rate, weight_decay=decay)
            for rate in method.learning_rate
            for decay in method.weight_decay
        ],
        "selected_hyperparameters": method.selected_hyperparameters,
        "processes": method.processes,
        "nodes": method.nodes,
    }
    more = _name_parts(method)
    if method.method == "full":
        names = ["full", *(name for name, _ in more)]
        labels = ["full", *(label for _, label in more)]
        return [Method(name="-".join(names), label=", ".join(labels), **shared)]
    budget = method.adalora or (
        RankBudgetConfig() if VARIANTS[method.variant].rank_budget else None
    )
    found = []
    for rank in method.rank or []:
        first = _variant_name(method, rank)
        # At least one more than the rank, so that the budget can fall.
        initial = max(rank + 1, math.ceil(budget.init_r_ratio * rank - 1e-9)) if budget else None
        found.append(
            Method(
                name="-".join([first[0], *(name for name, _ in more)]),
                label=", ".join([first[1], *(label for _, label in more)]),
                variant=method.variant,
                rank=rank,
                initial_rank=initial,
                alpha=2.0 * (initial or rank) if method.alpha == "2r" else method.alpha,
                dropout=method.dropout,
                target_modules=method.target_modules,
                loraplus_lr_ratio=method.loraplus_lr_ratio,
                rank_budget=budget,
                second_stage=method.second_stage,
                **shared,
            )
        )
    return found


def _variant_name(method: MethodConfig, rank: int) -> tuple[str, str]:
    """Name and label of an adapter: `dora-r8` and `dora 8`, `hybrid-r8` and `hybrid 8`."""
    plain = method.variant == "lora"
    if method.method == "hybrid":
        words = ["hybrid"] if plain else ["hybrid", method.variant]
        return "-".join([*words, f"r{rank}"]), " ".join([*words, str(rank)])
    return f"{method.variant}-r{rank}", f"rank {rank}" if plain else f"{method.variant} {rank}"


def _name_parts(method: MethodConfig) -> list[tuple[str, str]]:
    """What sets a method apart from others of its rank, as parts of its name and of its label."""
    more: list[tuple[str, str]] = []
    if method.target_modules in ("attention", "mlp"):
        more.append((str(method.target_modules), str(method.target_modules)))
    if method.loraplus_lr_ratio is not None:
        more.append((f"plus{method.loraplus_lr_ratio:g}", f"plus{method.loraplus_lr_ratio:g}"))
    if method.adalora and method.adalora.name:
        more.append((method.adalora.name, method.adalora.name))
    if method.embedding_lr_ratio is not None:
        ratio = f"{method.embedding_lr_ratio:g}"
        more.append((f"embeddings{ratio}", f"embeddings at {ratio}"))
    elif method.embeddings == "trained" and method.method == "lora":
        more.append(("embeddings", "embeddings trained"))
    elif method.embeddings == "frozen" and method.method == "full":
        more.append(("frozen-embeddings", "embeddings frozen"))
    if method.second_stage:
        more.append(
            (
                method.second_stage.name,
                f"then {method.second_stage.suffix or method.second_stage.layers_name}",
            )
        )
    if method.suffix:
        more.append((method.suffix, method.suffix))
    return more


def _with_mitigation(tuning: Method, mitigation: MitigationConfig | None) -> Method:
    if mitigation is None:
        return tuning
    named = {
        "name": f"{tuning.name}-{mitigation.name}",
        "label": f"{tuning.label}, {mitigation.name}",
    }
    return tuning.model_copy(update={**named, "mitigation": mitigation})


def run_name(
    tuning: str, seed: int, setting: Hyperparameters, duration: float | None = None
) -> str:
    """Name of one training, unique in the study: `lora-r8/seed0/lr0.0001-wd0`.

    The branch of a duration ends in it: `lora-r8/seed0/lr0.0001-wd0/duration0.5`.
    """
    name = f"{tuning}/seed{seed}/lr{setting.learning_rate:g}-wd{setting.weight_decay:g}"
    return name if duration is None else f"{name}/{duration_name(duration)}"


def duration_name(duration: float) -> str:
    """A duration of so many epochs in the names of runs and folders: `duration0.5`."""
    return f"duration{duration:g}"


def selected_models(study: StudyConfig) -> list[str]:
    """Every checkpoint that is selected: METHOD/seedN."""
    return [f"{tuning.name}/seed{seed}" for tuning in expand_methods(study) for seed in study.seeds]


def scored_model_names(study: StudyConfig) -> list[str]:
    """What is benchmarked of each method: seedN, or seedN-durationD where all ends are."""
    durations = study.training.durations if study.benchmarks.models == "durations" else []
    ends = [f"-{duration_name(duration)}" for duration in durations] or [""]
    return [f"seed{seed}{end}" for seed in study.seeds for end in ends]


def scored_models(study: StudyConfig) -> list[str]:
    """Every model with results of benchmarks: `base`, or METHOD/NAME; none without benchmarks."""
    if not (study.benchmarks.tasks or study.benchmarks.refusals):
        return []
    names = scored_model_names(study)
    return [
        "base",
        *(f"{tuning.name}/{name}" for tuning in expand_methods(study) for name in names),
    ]
