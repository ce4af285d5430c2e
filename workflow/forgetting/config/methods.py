"""A way of fine-tuning, with its sweep of learning rates and weight decays.

Sections of a method that only some variants have: AdaLoRA's budget, a hybrid's second part.
"""

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
    """One point of the sweep."""

    learning_rate: PositiveFloat = Field(description="Peak learning rate.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Decoupled weight decay.")


class MethodConfig(ConfigModel):
    """A way of fine-tuning, with the learning rates and weight decays that are tried."""

    method: Literal["lora", "full", "hybrid"] = Field(
        description="Train adapters beside the linear layers, all weights, or first adapters and "
        "`second_stage` chosen layers in full."
    )
    variant: VariantName = Field(
        "lora",
        description="; ".join(f"{name}: {each.description}" for name, each in VARIANTS.items())
        + ".",
    )
    rank: Annotated[list[PositiveInt], BeforeValidator(as_list), AfterValidator(unique)] | None = (
        Field(None, description="Rank or ranks of the adapters; each is a method of its own.")
    )
    alpha: PositiveFloat | Literal["2r"] = Field(
        32.0,
        description="Numerator of the adapter's scale; `2r` is twice the rank (of adalora, the "
        "initial one).",
    )
    dropout: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.0, description="Dropout before the adapter's first matrix."
    )
    target_modules: (
        Literal["all-linear", "attention", "mlp"]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    ) = Field(
        "all-linear",
        description="Adapted linear layers of the language model: all but the LM head, those of "
        "the attention or of the MLP, or names. Experts and their routers are among them; variants "
        "lora and rslora without dropout can adapt those.",
    )
    loraplus_lr_ratio: PositiveFloat | None = Field(
        None,
        description="LoRA+: the learning rate of B is this multiple of that of A, which is "
        "`learning_rate` (arXiv 2402.12354 advises 16).",
    )
    adalora: RankBudgetConfig | None = Field(
        None, description="The course of adalora's ranks; that of the defaults if left out."
    )
    embeddings: Literal["frozen", "trained"] | None = Field(
        None,
        description="Are the input embedding and the LM head trained, in full? By default frozen "
        "for lora, trained for full.",
    )
    embedding_lr_ratio: PositiveFloat | None = Field(
        None,
        description="The learning rate of trained embeddings is this multiple of `learning_rate` "
        "(Biderman et al. 2024 suggest 0.1 to 0.5 beside LoRA).",
    )
    second_stage: SecondStageConfig | None = Field(
        None, description="The second part of method hybrid."
    )
    learning_rate: Annotated[
        list[PositiveFloat], BeforeValidator(as_list), AfterValidator(unique)
    ] = Field(min_length=1, description="Peak learning rates.")
    weight_decay: Annotated[
        list[NonNegativeFloat], BeforeValidator(as_list), AfterValidator(unique)
    ] = Field([0.0], min_length=1, description="Decoupled weight decays.")
    processes: PositiveInt | None = Field(
        None,
        description="Processes that train each run together, a GPU each; by default so many as "
        "memory and the longest time of a job ask for (docs/cluster.md). `full` "
        "shards weights, gradients and the optimizer's state over them, adapters only their "
        "batches; the numbers are the same up to rounding (and the adapters' dropout). Without "
        "SLURM no more than `--resources gpu=N` allows, by default 1 where there is a GPU.",
    )
    nodes: PositiveInt | None = Field(
        None,
        description="Machines of a SLURM cluster over which the processes are spread, with a file "
        "system in common; by default 1 for given `processes`. Without SLURM there is one.",
    )
    selected_hyperparameters: Hyperparameters | None = Field(
        None, description="Choose this setting of the sweep, whatever the study's rule says."
    )
    mitigation: MitigationConfig | None = Field(
        None, description="What is done against forgetting; its name ends the method's name."
    )
    suffix: Name | None = Field(
        None,
        description="Put behind the method's name and label, before the mitigation's: tells apart "
        "methods of one rank that differ in `alpha`, names of layers, or what else no name holds.",
    )

    @model_validator(mode="after")
    def _rank_fits_method(self) -> MethodConfig:
        if self.method != "full" and not self.rank:
            raise ValueError(f"method {self.method} needs a `rank`")
        if self.method == "hybrid" and not self.second_stage:
            raise ValueError(
                "method hybrid needs a section `second_stage`: what is trained in full, when"
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
        if self.selected_hyperparameters and (
            self.selected_hyperparameters.learning_rate not in self.learning_rate
            or self.selected_hyperparameters.weight_decay not in self.weight_decay
        ):
            raise ValueError(
                "`selected_hyperparameters` are not among the hyperparameters of this method's sweep"
            )
        return self

    @model_validator(mode="after")
    def _variant_fits(self) -> MethodConfig:
        prunes = VARIANTS[self.variant].rank_budget
        if self.adalora and not prunes:
            raise ValueError(f"variant {self.variant} has no `adalora` section")
        if prunes and self.method == "hybrid":
            raise ValueError("adalora prunes until its end; a hybrid starts from another variant")
        if prunes and self.loraplus_lr_ratio is not None:
            raise ValueError(
                "adalora's A and B both start random and are kept orthogonal; "
                "`loraplus_lr_ratio` is for adapters whose B starts at 0"
            )
        frozen = self.embeddings == "frozen" or (self.method == "lora" and not self.embeddings)
        if self.embedding_lr_ratio is not None and frozen:
            raise ValueError("`embedding_lr_ratio` needs `embeddings: trained`")
        return self

    @model_validator(mode="after")
    def _update_is_known(self) -> MethodConfig:
        if self.mitigation and not VARIANTS[self.variant].linear_update:
            for name, section in self.mitigation.sections.items():
                if section.needs_weight_update:
                    raise ValueError(
                        f"mitigation.{name} needs the update of the weights, which is scale*B*A "
                        f"for variants {variants_where('linear_update')}, not for {self.variant}"
                    )
        return self


_LAYERS = r"^(all|last [1-9][0-9]*)$"


class RankBudgetConfig(ConfigModel):
    """AdaLoRA's budget: the mean rank falls from an initial one to `rank` (arXiv 2303.10512).

    Of all steps, the share `tinit` trains the initial rank, and the share `tfinal` at the end what
    is left of it; between them the budget falls with the cube of what is left of the time, and the
    singular values that matter least are set to 0. Initial rank, shares and interval are near those
    of the paper's runs; peft's own defaults are shares of 0.
    """

    init_r_ratio: Annotated[Number, Field(gt=1, allow_inf_nan=False)] = Field(
        1.5, description="Initial rank of each adapter in multiples of `rank`, rounded up."
    )
    tinit: Fraction = Field(0.1, description="Share of the steps before the budget falls.")
    tfinal: Fraction = Field(0.5, description="Share of the steps after the budget has fallen.")
    delta_t: PositiveInt = Field(
        1, description="Steps between two allocations of the budget (deltaT)."
    )
    orth_reg_weight: NonNegativeFloat = Field(
        0.5,
        description="Weight of the penalty that keeps A and B orthogonal: the mean over all of "
        "them of the Frobenius norm of A A^T - I or B^T B - I.",
    )

    @model_validator(mode="after")
    def _time_is_left(self) -> RankBudgetConfig:
        if self.tinit + self.tfinal >= 1:
            raise ValueError(
                "`tinit` and `tfinal` leave no time for the budget to fall; their sum "
                "must be less than 1"
            )
        return self

    @property
    def name(self) -> str:
        """What differs from the defaults: `tinit0.2-every10`."""
        changed = self.model_dump(exclude_defaults=True)
        return "-".join(f"{key.split('_')[0]}{value:g}" for key, value in changed.items())


def _layer_names(value: Any) -> Any:
    """Tell in one sentence what may be named; the types alone would tell it of each in turn."""
    words = isinstance(value, str) and re.fullmatch(_LAYERS, value)
    names = isinstance(value, list) and value and all(isinstance(v, str) and v for v in value)
    if not (words or names):
        raise ValueError(
            f"expected all, last N (such as last 4) or a list of names of modules, found {value!r}"
        )
    return value


class SecondStageConfig(ConfigModel):
    """The second part of a hybrid: the adapter is merged, and chosen layers are trained in full.

    The course of the learning rate is one over both parts, with another peak in the second, where
    the optimizer starts afresh: its rate rises to that course in a warm-up as long as the first, or
    in half of what is left before a cooldown or the end, if that is shorter.
    """

    start: Annotated[Number, Field(gt=0, lt=1)] = Field(
        0.5, description="Share of the steps that train the adapter."
    )
    layers: Annotated[
        Annotated[str, Field(pattern=_LAYERS)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)],
        BeforeValidator(_layer_names),
    ] = Field(
        description="What is trained after that: `all`, the `last N` blocks, or modules by the end "
        "of their names, in which * stands for anything: `mlp`, `layers.3.self_attn`, `lm_head`."
    )
    learning_rate: PositiveFloat = Field(description="Peak learning rate of the second part.")
    suffix: Name | None = Field(
        None,
        description="Part of the method's name, in place of the one made of these settings.",
    )

    @property
    def layers_name(self) -> str:
        """The layers as part of a name: `last4`, `mlp-lm_head`."""
        if isinstance(self.layers, str):
            return self.layers.replace(" ", "")
        return "-".join(re.sub(r"[^A-Za-z0-9_.-]+", "_", layer) for layer in self.layers)

    @property
    def name(self) -> str:
        """The end of the method's name: `last4-at0.5-lr1e-05`."""
        made = f"{self.layers_name}-at{self.start:g}-lr{self.learning_rate:g}"
        return self.suffix or made
