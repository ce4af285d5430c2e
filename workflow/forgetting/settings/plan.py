"""From a study to its methods, cohorts and runs: pure expansion, no input or output."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from forgetting.sections.fields import LONGEST_NAME, AtKey, Strict
from forgetting.sections.method import Method, Setting
from forgetting.sections.mitigation import Mitigation
from forgetting.sections.variants import Budget, Then
from forgetting.settings.study import Study


class Tuning(Strict):
    """One method of the report: full fine-tuning, or adapters of one variant and rank."""

    name: str
    kind: Literal["lora", "full", "hybrid"]
    label: str
    variant: Literal["lora", "rslora", "dora", "pissa", "adalora"] = "lora"
    rank: int | None = None
    initial_rank: int | None = None
    """Of adalora, the rank of every adapter at the start; `rank` is the mean at the end."""
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    lora_plus_ratio: float | None = None
    budget: Budget | None = None
    embeddings: Literal["frozen", "trained"] | None = None
    embedding_ratio: float | None = None
    then: Then | None = None
    settings: list[Setting]
    fixed: Setting | None = None
    mitigation: Mitigation | None = None
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
        return self.alpha / (math.sqrt(self.rank) if self.variant == "rslora" else self.rank)

    @property
    def trains_embeddings(self) -> bool:
        """Are the input embedding and the LM head trained?"""
        return (self.embeddings or ("trained" if self.kind == "full" else "frozen")) == "trained"


def tunings(study: Study) -> list[Tuning]:
    """The study's methods, one per rank, in the order of the file."""
    return [tuning for _, tuning in numbered_tunings(study)]


def numbered_tunings(study: Study) -> list[tuple[int, Tuning]]:
    """The same, each with the number of its entry in the file."""
    found = [
        (number, _mitigated(tuning, method.mitigation))
        for number, method in enumerate(study.methods)
        for tuning in _expand(method)
    ]
    names: dict[str, str] = {}
    for number, tuning in found:
        other = names.get(tuning.name.casefold())
        names[tuning.name.casefold()] = tuning.name
        if other is not None and other != tuning.name:
            raise AtKey(
                ("methods", number),
                f"{tuning.name} and {other} differ only in upper and lower case, and some file "
                "systems take them for one folder; take another `suffix`",
            )
        if other is not None:
            raise AtKey(
                ("methods", number),
                f"{tuning.name} stands there more than once; merge the entries, or tell "
                "them apart by `suffix`",
            )
        if len(tuning.name) > LONGEST_NAME:
            raise AtKey(
                ("methods", number),
                f"its name, {tuning.name}, has {len(tuning.name)} characters, and file names are "
                f"made of it; take a `suffix` so short that it has at most {LONGEST_NAME}",
            )
        several = tuning.fixed is None and len(tuning.settings) > 1
        if study.selection.hyperparameters == "fixed" and several:
            raise AtKey(
                ("methods", number),
                f"{tuning.name} has {len(tuning.settings)} settings; the rule `fixed` needs "
                "`fixed: {learning_rate: ..., weight_decay: ...}` there",
            )
    return found


def _expand(method: Method) -> list[Tuning]:
    shared: dict[str, Any] = {
        "kind": method.method,
        "embeddings": method.embeddings,
        "embedding_ratio": method.embedding_ratio,
        "settings": [
            Setting(learning_rate=rate, weight_decay=decay)
            for rate in method.learning_rate
            for decay in method.weight_decay
        ],
        "fixed": method.fixed,
        "processes": method.processes,
        "nodes": method.nodes,
    }
    more = _differences(method)
    if method.method == "full":
        names = ["full", *(name for name, _ in more)]
        labels = ["full", *(label for _, label in more)]
        return [Tuning(name="-".join(names), label=", ".join(labels), **shared)]
    budget = method.budget or (Budget() if method.variant == "adalora" else None)
    found = []
    for rank in method.rank or []:
        first = _first_words(method, rank)
        # At least one more than the rank, so that the budget can fall.
        initial = max(rank + 1, math.ceil(budget.initial_ratio * rank - 1e-9)) if budget else None
        found.append(
            Tuning(
                name="-".join([first[0], *(name for name, _ in more)]),
                label=", ".join([first[1], *(label for _, label in more)]),
                variant=method.variant,
                rank=rank,
                initial_rank=initial,
                alpha=2.0 * (initial or rank) if method.alpha == "2r" else method.alpha,
                dropout=method.dropout,
                target_modules=method.target_modules,
                lora_plus_ratio=method.lora_plus_ratio,
                budget=budget,
                then=method.then,
                **shared,
            )
        )
    return found


def _first_words(method: Method, rank: int) -> tuple[str, str]:
    """Name and label of an adapter: `dora-r8` and `dora 8`, `hybrid-r8` and `hybrid 8`."""
    plain = method.variant == "lora"
    if method.method == "hybrid":
        words = ["hybrid"] if plain else ["hybrid", method.variant]
        return "-".join([*words, f"r{rank}"]), " ".join([*words, str(rank)])
    return f"{method.variant}-r{rank}", f"rank {rank}" if plain else f"{method.variant} {rank}"


def _differences(method: Method) -> list[tuple[str, str]]:
    """What sets a method apart from others of its rank, as parts of its name and of its label."""
    more: list[tuple[str, str]] = []
    if method.target_modules in ("attention", "mlp"):
        more.append((str(method.target_modules), str(method.target_modules)))
    if method.lora_plus_ratio is not None:
        more.append((f"plus{method.lora_plus_ratio:g}", f"plus{method.lora_plus_ratio:g}"))
    if method.budget and method.budget.name:
        more.append((method.budget.name, method.budget.name))
    if method.embedding_ratio is not None:
        ratio = f"{method.embedding_ratio:g}"
        more.append((f"embeddings{ratio}", f"embeddings at {ratio}"))
    elif method.embeddings == "trained" and method.method == "lora":
        more.append(("embeddings", "embeddings trained"))
    elif method.embeddings == "frozen" and method.method == "full":
        more.append(("frozen-embeddings", "embeddings frozen"))
    if method.then:
        more.append((method.then.name, f"then {method.then.suffix or method.then.layers_name}"))
    if method.suffix:
        more.append((method.suffix, method.suffix))
    return more


def _mitigated(tuning: Tuning, mitigation: Mitigation | None) -> Tuning:
    if mitigation is None:
        return tuning
    named = {
        "name": f"{tuning.name}-{mitigation.name}",
        "label": f"{tuning.label}, {mitigation.name}",
    }
    return tuning.model_copy(update={**named, "mitigation": mitigation})


def run_name(tuning: str, seed: int, setting: Setting, budget: float | None = None) -> str:
    """Name of one training, unique in the study: `lora-r8/seed0/lr0.0001-wd0`.

    The branch of a budget ends in it: `lora-r8/seed0/lr0.0001-wd0/budget0.5`.
    """
    name = f"{tuning}/seed{seed}/lr{setting.learning_rate:g}-wd{setting.weight_decay:g}"
    return name if budget is None else f"{name}/{budget_name(budget)}"


def budget_name(budget: float) -> str:
    """A budget of so many epochs in the names of runs and folders: `budget0.5`."""
    return f"budget{budget:g}"


def selected_models(study: Study) -> list[str]:
    """Every checkpoint that is selected: METHOD/seedN."""
    return [f"{tuning.name}/seed{seed}" for tuning in tunings(study) for seed in study.seeds]


def scored_names(study: Study) -> list[str]:
    """What is benchmarked of each method: seedN, or seedN-budgetD where all ends are."""
    budgets = study.training.budgets if study.benchmarks.models == "budgets" else []
    ends = [f"-{budget_name(budget)}" for budget in budgets] or [""]
    return [f"seed{seed}{end}" for seed in study.seeds for end in ends]


def scored_models(study: Study) -> list[str]:
    """Every model with results of benchmarks: `base`, or METHOD/NAME; none without benchmarks."""
    if not (study.benchmarks.tasks or study.benchmarks.refusals):
        return []
    names = scored_names(study)
    return ["base", *(f"{tuning.name}/{name}" for tuning in tunings(study) for name in names)]
