"""From a study to its methods, cohorts and runs: pure expansion, no input or output."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from forgetting.fields import Strict
from forgetting.study import Method, Mitigation, Setting, Study


class Tuning(Strict):
    """One method of the report: full fine-tuning, or adapters of one variant and rank."""

    name: str
    kind: Literal["lora", "full"]
    label: str
    variant: Literal["lora", "rslora", "dora", "pissa"] = "lora"
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    lora_plus_ratio: float | None = None
    settings: list[Setting]
    fixed: Setting | None = None
    mitigation: Mitigation | None = None
    processes: int = Field(1, exclude=True)
    """Not among what a job is told, since it changes no number: how the job is started."""

    @property
    def scale(self) -> float:
        """What multiplies B·A: alpha/r, or alpha/sqrt(r) for rslora (Kalajdzievski 2023)."""
        if self.rank is None or self.alpha is None:
            raise ValueError(f"{self.name} has no adapter")
        return self.alpha / (math.sqrt(self.rank) if self.variant == "rslora" else self.rank)


def tunings(study: Study) -> list[Tuning]:
    """The study's methods, one per rank, in the order of the file."""
    found = [
        _mitigated(tuning, method.mitigation)
        for method in study.methods
        for tuning in _expand(method)
    ]
    names = [tuning.name for tuning in found]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"methods: {min(repeated)} stands there more than once; merge the entries, or tell "
            "their mitigations apart by `suffix`"
        )
    if study.selection.hyperparameters == "fixed":
        for tuning in found:
            if tuning.fixed is None and len(tuning.settings) > 1:
                raise ValueError(
                    f"methods: {tuning.name} has {len(tuning.settings)} settings; the rule `fixed` "
                    "needs `fixed: {learning_rate: ..., weight_decay: ...}` there"
                )
    return found


def _expand(method: Method) -> list[Tuning]:
    settings = [
        Setting(learning_rate=rate, weight_decay=decay)
        for rate in method.learning_rate
        for decay in method.weight_decay
    ]
    if method.method == "full":
        return [
            Tuning(
                name="full",
                kind="full",
                label="full",
                settings=settings,
                fixed=method.fixed,
                processes=method.processes,
            )
        ]
    more: list[str] = []
    if method.target_modules in ("attention", "mlp"):
        more.append(str(method.target_modules))
    if method.lora_plus_ratio is not None:
        more.append(f"plus{method.lora_plus_ratio:g}")
    return [
        Tuning(
            name="-".join([f"{method.variant}-r{rank}", *more]),
            kind="lora",
            label=", ".join(
                [f"rank {rank}" if method.variant == "lora" else f"{method.variant} {rank}", *more]
            ),
            variant=method.variant,
            rank=rank,
            alpha=2.0 * rank if method.alpha == "2r" else method.alpha,
            dropout=method.dropout,
            target_modules=method.target_modules,
            lora_plus_ratio=method.lora_plus_ratio,
            settings=settings,
            fixed=method.fixed,
            processes=method.processes,
        )
        for rank in method.rank or []
    ]


def _mitigated(tuning: Tuning, mitigation: Mitigation | None) -> Tuning:
    if mitigation is None:
        return tuning
    named = {
        "name": f"{tuning.name}-{mitigation.name}",
        "label": f"{tuning.label}, {mitigation.name}",
    }
    return tuning.model_copy(update={**named, "mitigation": mitigation})


def run_name(tuning: str, seed: int, setting: Setting) -> str:
    """Name of one training, unique in the study: `lora-r8/seed0/lr0.0001-wd0`."""
    return f"{tuning}/seed{seed}/lr{setting.learning_rate:g}-wd{setting.weight_decay:g}"
