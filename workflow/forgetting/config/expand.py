"""Expand a study into its methods, runs and scored models, and give them their names."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from forgetting.config.data import ColumnsConfig, PromptConfig
from forgetting.config.evaluation import EvaluationConfig, SelectionConfig
from forgetting.config.methods import (
    Hyperparameters,
    MethodConfig,
    RankBudgetConfig,
    SecondStageConfig,
)
from forgetting.config.mitigations import MitigationConfig
from forgetting.config.study import StudyConfig
from forgetting.config.training import TrainingConfig
from forgetting.config.types import MAX_NAME_LENGTH, ConfigModel, KeyedError
from forgetting.config.variants import VARIANTS, VariantName

MIN_LAW_RANKS = 3

RANK_FIELDS = {"name", "label", "rank", "initial_rank", "alpha"}
RANK_FIELDS |= {"hyperparameters", "selected_hyperparameters"}
"""What may differ between adapters of one kind to which a law is fitted."""


class Method(ConfigModel):
    """One method of the report: full fine-tuning, or adapters of one variant and rank."""

    name: str
    kind: Literal["lora", "full", "hybrid"]
    label: str
    variant: VariantName = "lora"
    rank: int | None = None
    initial_rank: int | None = None
    """Rank of every adalora adapter at the start; `rank` is the mean rank at the end."""
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
    """How a job is started. They do not change the numbers, so they are not part of its keys."""

    @property
    def largest_rank(self) -> int | None:
        """Return the largest rank that the adapters have in training."""
        return self.initial_rank or self.rank

    @property
    def scale(self) -> float:
        """Return the factor of B·A: alpha/r, or alpha/sqrt(r) for rslora (Kalajdzievski 2023).

        For adalora, B·diag(E)·A is multiplied by alpha over the initial rank, to which peft adds
        1e-5.
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
        """Return whether the input embedding and the LM head are trained."""
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
    """Return the study's methods, one per rank, in the order of the file.

    Raises:
        KeyedError: names of methods are equal or too long, or the rule `fixed` has a choice.
    """
    return [method for _, method in expand_methods_numbered(study)]


def law_methods(study: StudyConfig) -> list[Method]:
    """Return the methods to which laws of forgetting are fitted: equal adapters of several ranks.

    They differ in rank, alpha and hyperparameters alone, and no rank occurs twice. If there are
    several such families it is the one of most ranks. None is of fewer than `MIN_LAW_RANKS`. Nor
    has a study any without general text, or with durations, whose runs have one evaluation each.
    """
    if study.general_text is None or study.training.durations:
        return []
    families: dict[str, list[Method]] = {}
    for method in expand_methods(study):
        if method.kind == "lora":
            families.setdefault(method.model_dump_json(exclude=RANK_FIELDS), []).append(method)
    different = [each for each in families.values() if len({m.rank for m in each}) == len(each)]
    largest = max(different, key=len, default=[])
    return largest if len(largest) >= MIN_LAW_RANKS else []


def expand_methods_numbered(study: StudyConfig) -> list[tuple[int, Method]]:
    """Return the methods, each with the position of its entry in the file."""
    numbered = [
        (number, _with_mitigation(method, entry.mitigation))
        for number, entry in enumerate(study.methods)
        for method in _expand(entry)
    ]
    names: dict[str, str] = {}
    for number, method in numbered:
        _check_name(number, method.name, names.get(method.name.casefold()))
        names[method.name.casefold()] = method.name
        count = len(method.hyperparameters)
        is_open = method.selected_hyperparameters is None and count > 1
        if study.selection.hyperparameters == "fixed" and is_open:
            raise KeyedError(
                ("methods", number),
                f"the sweep of {method.name} has {count} hyperparameters; the rule `fixed` needs "
                "`selected_hyperparameters: {learning_rate: ..., weight_decay: ...}` there",
            )
    return numbered


def _check_name(number: int, name: str, other: str | None) -> None:
    """Raise KeyedError if a method's name is too long, or that of an earlier method."""
    if other == name:
        raise KeyedError(
            ("methods", number),
            f"there is more than one method {name}; merge the entries, or distinguish them by "
            "`suffix`",
        )
    if other is not None:
        raise KeyedError(
            ("methods", number),
            f"{name} and {other} differ only in upper and lower case, which some file systems "
            "ignore; take another `suffix`",
        )
    if len(name) > MAX_NAME_LENGTH:
        raise KeyedError(
            ("methods", number),
            f"its name, {name}, has {len(name)} characters, too many for a file name; take a "
            f"shorter `suffix`, so that it has at most {MAX_NAME_LENGTH}",
        )


def _expand(entry: MethodConfig) -> list[Method]:
    """Return one method per rank of an entry, without its mitigation."""
    shared: dict[str, Any] = {
        "kind": entry.method,
        "embeddings": entry.embeddings,
        "embedding_lr_ratio": entry.embedding_lr_ratio,
        "hyperparameters": [
            Hyperparameters(learning_rate=rate, weight_decay=decay)
            for rate in entry.learning_rate
            for decay in entry.weight_decay
        ],
        "selected_hyperparameters": entry.selected_hyperparameters,
        "processes": entry.processes,
        "nodes": entry.nodes,
    }
    parts = _name_parts(entry)
    if entry.method == "full":
        name, label = _join([("full", "full"), *parts])
        return [Method(name=name, label=label, **shared)]
    budget = entry.adalora or (RankBudgetConfig() if VARIANTS[entry.variant].rank_budget else None)
    methods = []
    for rank in entry.rank or []:
        name, label = _join([_variant_name(entry, rank), *parts])
        # The initial rank must exceed the rank, so that the budget can fall.
        initial = max(rank + 1, math.ceil(budget.init_r_ratio * rank - 1e-9)) if budget else None
        methods.append(
            Method(
                name=name,
                label=label,
                variant=entry.variant,
                rank=rank,
                initial_rank=initial,
                alpha=2.0 * (initial or rank) if entry.alpha == "2r" else entry.alpha,
                dropout=entry.dropout,
                target_modules=entry.target_modules,
                loraplus_lr_ratio=entry.loraplus_lr_ratio,
                rank_budget=budget,
                second_stage=entry.second_stage,
                **shared,
            )
        )
    return methods


def _join(parts: list[tuple[str, str]]) -> tuple[str, str]:
    """Return the name and the label of a method from their parts."""
    return "-".join(name for name, _ in parts), ", ".join(label for _, label in parts)


def _variant_name(entry: MethodConfig, rank: int) -> tuple[str, str]:
    """Return name and label of an adapter: `dora-r8` and `dora 8`, `hybrid-r8` and `hybrid 8`."""
    plain = entry.variant == "lora"
    if entry.method == "hybrid":
        words = ["hybrid"] if plain else ["hybrid", entry.variant]
        return "-".join([*words, f"r{rank}"]), " ".join([*words, str(rank)])
    return f"{entry.variant}-r{rank}", f"rank {rank}" if plain else f"{entry.variant} {rank}"


def _name_parts(entry: MethodConfig) -> list[tuple[str, str]]:
    """Return the parts of name and label that distinguish methods of one rank."""
    parts: list[tuple[str, str]] = []
    if entry.target_modules in ("attention", "mlp"):
        parts.append((str(entry.target_modules), str(entry.target_modules)))
    if entry.loraplus_lr_ratio is not None:
        parts.append((f"plus{entry.loraplus_lr_ratio:g}", f"plus{entry.loraplus_lr_ratio:g}"))
    if entry.adalora and entry.adalora.name:
        parts.append((entry.adalora.name, entry.adalora.name))
    if entry.embedding_lr_ratio is not None:
        ratio = f"{entry.embedding_lr_ratio:g}"
        parts.append((f"embeddings{ratio}", f"embeddings at {ratio}"))
    elif entry.embeddings == "trained" and entry.method == "lora":
        parts.append(("embeddings", "embeddings trained"))
    elif entry.embeddings == "frozen" and entry.method == "full":
        parts.append(("frozen-embeddings", "embeddings frozen"))
    if stage := entry.second_stage:
        parts.append((stage.name, f"then {stage.suffix or stage.layers_name}"))
    if entry.suffix:
        parts.append((entry.suffix, entry.suffix))
    return parts


def _with_mitigation(method: Method, mitigation: MitigationConfig | None) -> Method:
    """Return the method with a mitigation, which also ends its name and label."""
    if mitigation is None:
        return method
    name, label = f"{method.name}-{mitigation.name}", f"{method.label}, {mitigation.name}"
    return method.model_copy(update={"name": name, "label": label, "mitigation": mitigation})


def run_name(
    method: str, seed: int, hyperparameters: Hyperparameters, duration: float | None = None
) -> str:
    """Return the name of a run, unique in the study: `lora-r8/seed0/lr0.0001-wd0`.

    The name of a cooldown branch ends in its duration: `lora-r8/seed0/lr0.0001-wd0/duration0.5`.
    """
    rate, decay = hyperparameters.learning_rate, hyperparameters.weight_decay
    name = f"{method}/seed{seed}/lr{rate:g}-wd{decay:g}"
    return name if duration is None else f"{name}/{duration_name(duration)}"


def method_of(name: str) -> str:
    """Return the method of a run or of a selected checkpoint: `lora-r8` of `lora-r8/seed0`."""
    return name.partition("/")[0]


def duration_name(duration: float) -> str:
    """Return a duration in epochs as part of the names of runs and folders: `duration0.5`."""
    return f"duration{duration:g}"


def selected_models(study: StudyConfig) -> list[str]:
    """Return the names of all selected checkpoints: METHOD/seedN."""
    return [f"{method.name}/seed{seed}" for method in expand_methods(study) for seed in study.seeds]


def scored_model_names(study: StudyConfig) -> list[str]:
    """Return the benchmarked models of a method: seedN, or seedN-durationD for all durations."""
    durations = study.training.durations if study.benchmarks.models == "durations" else []
    endings = [f"-{duration_name(duration)}" for duration in durations] or [""]
    return [f"seed{seed}{ending}" for seed in study.seeds for ending in endings]


def scored_models(study: StudyConfig) -> list[str]:
    """Return all benchmarked models, `base` and METHOD/NAME; none without benchmarks."""
    if not (study.benchmarks.tasks or study.benchmarks.refusals):
        return []
    names = scored_model_names(study)
    return [
        "base",
        *(f"{method.name}/{name}" for method in expand_methods(study) for name in names),
    ]
