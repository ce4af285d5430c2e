"""Section `methods`: variants of fine-tuning, each with a sweep over hyperparameters."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from forgetting.config.mitigations import MitigationConfig
from forgetting.config.types import (
    ConfigModel,
    Fraction,
    Name,
    NonNegativeFloat,
    Number,
    PositiveFloat,
    PositiveInt,
    as_list,
    unique,
)
from forgetting.config.variants import VARIANTS, VariantName, variants_where


class Hyperparameters(ConfigModel):
    """Learning rate and weight decay of a run."""

    learning_rate: PositiveFloat = Field(description="Peak learning rate.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Decoupled weight decay.")


class MethodConfig(ConfigModel):
    """A method of fine-tuning, with the learning rates and weight decays of its sweep."""

    method: Literal["lora", "full", "hybrid"] = Field(
        description="lora: train adapters of the linear layers; full: train all weights; hybrid: "
        "train adapters first, then the layers of `second_stage` in full."
    )
    variant: VariantName = Field(
        "lora",
        description="; ".join(f"{name}: {each.description}" for name, each in VARIANTS.items())
        + ".",
    )
    rank: Annotated[list[PositiveInt], BeforeValidator(as_list), AfterValidator(unique)] | None = (
        Field(None, description="Rank or ranks of the adapters; each makes a method.")
    )
    alpha: PositiveFloat | Literal["2r"] = Field(
        32.0,
        description="Numerator of the adapter's scale; `2r` is twice the rank (twice the initial "
        "rank for adalora).",
    )
    dropout: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.0, description="Dropout before the adapter's first matrix."
    )
    target_modules: (
        Literal["all-linear", "attention", "mlp"]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    ) = Field(
        "all-linear",
        description="Adapted linear layers of the language model: all except the LM head, those of "
        "the attention, those of the MLP, or a list of names. They include experts and routers, "
        "which only the variants lora and rslora without dropout can adapt.",
    )
    loraplus_lr_ratio: PositiveFloat | None = Field(
        None,
        description="LoRA+: ratio of the learning rate of B to that of A, which is "
        "`learning_rate` (arXiv 2402.12354 recommends 16).",
    )
    adalora: RankBudgetConfig | None = Field(
        None, description="Rank budget of variant adalora; the defaults apply if it is left out."
    )
    embeddings: Literal["frozen", "trained"] | None = Field(
        None,
        description="Whether the input embedding and the LM head are trained, in full. By default "
        "frozen for lora and trained for full.",
    )
    embedding_lr_ratio: PositiveFloat | None = Field(
        None,
        description="Ratio of the learning rate of trained embeddings to `learning_rate` "
        "(Biderman et al. 2024 suggest 0.1 to 0.5 with LoRA).",
    )
    second_stage: SecondStageConfig | None = Field(
        None, description="The second stage of method hybrid."
    )
    learning_rate: Annotated[
        list[PositiveFloat], BeforeValidator(as_list), AfterValidator(unique)
    ] = Field(min_length=1, description="Peak learning rates.")
    weight_decay: Annotated[
        list[NonNegativeFloat], BeforeValidator(as_list), AfterValidator(unique)
    ] = Field([0.0], min_length=1, description="Decoupled weight decays.")
    processes: PositiveInt | None = Field(
        None,
        description="Processes that train each run, one GPU each. By default as many as memory and "
        "the maximum runtime of a job require (docs/cluster.md). `full` shards weights, gradients "
        "and optimizer state over them; adapters share only the batch. The numbers are the same "
        "up to rounding (and the adapters' dropout). Without SLURM at most `--resources gpu=N` "
        "processes run, by default 1 if there is a GPU.",
    )
    nodes: PositiveInt | None = Field(
        None,
        description="Nodes of a SLURM cluster over which the processes are distributed. They must "
        "share a file system. By default 1 if `processes` is set. Without SLURM there is one node.",
    )
    selected_hyperparameters: Hyperparameters | None = Field(
        None, description="Select these hyperparameters of the sweep, whatever the rule."
    )
    mitigation: MitigationConfig | None = Field(
        None, description="Mitigation of forgetting, whose name ends the method's name."
    )
    suffix: Name | None = Field(
        None,
        description="Suffix of the method's name and label, before that of the mitigation. It "
        "distinguishes methods of one rank that differ in keys that are not part of the name, such "
        "as `alpha` or the names of layers.",
    )

    @model_validator(mode="after")
    def _check_method(self) -> MethodConfig:
        if self.method != "full" and not self.rank:
            raise ValueError(f"method {self.method} needs a `rank`")
        if self.method == "hybrid" and not self.second_stage:
            raise ValueError(
                "method hybrid needs a section `second_stage`: which layers are trained in full"
            )
        adapters = ("rank", "variant", "alpha", "dropout", "target_modules", "loraplus_lr_ratio")
        absent = {
            "lora": ("second_stage",),
            "full": (*adapters, "second_stage", "adalora"),
            "hybrid": ("embeddings", "embedding_lr_ratio", "adalora"),
        }
        for name in absent[self.method]:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"method {self.method} has no `{name}`")
        selected = self.selected_hyperparameters
        if selected and (
            selected.learning_rate not in self.learning_rate
            or selected.weight_decay not in self.weight_decay
        ):
            raise ValueError("`selected_hyperparameters` are not part of this method's sweep")
        return self

    @model_validator(mode="after")
    def _check_variant(self) -> MethodConfig:
        prunes = VARIANTS[self.variant].rank_budget
        if self.adalora and not prunes:
            raise ValueError(f"variant {self.variant} has no `adalora` section")
        if prunes and self.method == "hybrid":
            raise ValueError(
                "method hybrid has no variant adalora, which prunes ranks until the end; take "
                "another variant"
            )
        if prunes and self.loraplus_lr_ratio is not None:
            raise ValueError(
                "`loraplus_lr_ratio` is for adapters whose B starts at 0; A and B of adalora both "
                "start random and are kept orthogonal"
            )
        frozen = self.embeddings == "frozen" or (self.method == "lora" and not self.embeddings)
        if self.embedding_lr_ratio is not None and frozen:
            raise ValueError("`embedding_lr_ratio` needs `embeddings: trained`")
        return self

    @model_validator(mode="after")
    def _check_weight_penalties(self) -> MethodConfig:
        if self.mitigation and not VARIANTS[self.variant].linear_update:
            for name, section in self.mitigation.sections.items():
                if section.needs_weight_update:
                    raise ValueError(
                        f"mitigation.{name} needs the weight update, which is scale*B*A for "
                        f"variants {variants_where('linear_update')}, but not for {self.variant}"
                    )
        return self


_LAYERS = r"^(all|last [1-9][0-9]*)$"


class RankBudgetConfig(ConfigModel):
    """AdaLoRA's rank budget: the mean rank falls from an initial one to `rank` (arXiv 2303.10512).

    The rank is constant in the first fraction `tinit` and in the last fraction `tfinal` of the
    steps. Between them the budget falls with the cube of the remaining time, and the least
    important singular values are set to 0. The defaults are close to the paper's runs; peft's
    `tinit` and `tfinal` are 0 by default.
    """

    init_r_ratio: Annotated[Number, Field(gt=1, allow_inf_nan=False)] = Field(
        1.5, description="Ratio of the initial rank of each adapter to `rank`, rounded up."
    )
    tinit: Fraction = Field(0.1, description="Fraction of the steps before the budget falls.")
    tfinal: Fraction = Field(0.5, description="Fraction of the steps after the budget has fallen.")
    delta_t: PositiveInt = Field(
        1, description="Steps between two allocations of the budget (peft's deltaT)."
    )
    orth_reg_weight: NonNegativeFloat = Field(
        0.5,
        description="Weight of the penalty that keeps A and B orthogonal: the mean over all "
        "matrices of the Frobenius norm of A A^T - I or B^T B - I.",
    )

    @model_validator(mode="after")
    def _check_phases(self) -> RankBudgetConfig:
        if self.tinit + self.tfinal >= 1:
            raise ValueError(
                "`tinit` and `tfinal` leave no time for the rank budget to fall; their sum must "
                "be less than 1"
            )
        return self

    @property
    def name(self) -> str:
        """Return the values that differ from the defaults: `tinit0.2-delta10`."""
        changed = self.model_dump(exclude_defaults=True)
        return "-".join(f"{key.split('_')[0]}{value:g}" for key, value in changed.items())


def _layer_names(value: Any) -> Any:
    """Return the layers unchanged; raise one error for both allowed types instead of one each."""
    is_phrase = isinstance(value, str) and re.fullmatch(_LAYERS, value)
    is_list = isinstance(value, list) and value and all(isinstance(v, str) and v for v in value)
    if not (is_phrase or is_list):
        raise ValueError(
            f"expected all, last N (such as last 4) or a list of module names, found {value!r}"
        )
    return value


class SecondStageConfig(ConfigModel):
    """The second stage of a hybrid: the adapter is merged, and some layers are trained in full.

    One learning rate schedule spans both stages; the second stage has its own peak and a new
    optimizer. Its learning rate warms up to the schedule in as many steps as the first warm-up, or
    in half of the steps before a cooldown or the end, if these are fewer.
    """

    start: Annotated[Number, Field(gt=0, lt=1)] = Field(
        0.5, description="Fraction of the steps that train the adapter."
    )
    layers: Annotated[
        Annotated[str, Field(pattern=_LAYERS)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)],
        BeforeValidator(_layer_names),
    ] = Field(
        description="Layers that the second stage trains: `all`, the `last N` blocks, or modules "
        "by the end of their names, in which * matches any text: `mlp`, `layers.3.self_attn`, "
        "`lm_head`."
    )
    learning_rate: PositiveFloat = Field(description="Peak learning rate of the second stage.")
    suffix: Name | None = Field(
        None,
        description="Part of the method's name; by default it is made of the keys above.",
    )

    @property
    def layers_name(self) -> str:
        """Return the layers as part of a name: `last4`, `mlp-lm_head`."""
        if isinstance(self.layers, str):
            return self.layers.replace(" ", "")
        return "-".join(re.sub(r"[^A-Za-z0-9_.-]+", "_", layer) for layer in self.layers)

    @property
    def name(self) -> str:
        """Return the end of the method's name: `last4-at0.5-lr1e-05`."""
        return self.suffix or f"{self.layers_name}-at{self.start:g}-lr{self.learning_rate:g}"
