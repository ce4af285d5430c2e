"""A way of fine-tuning, with its sweep of learning rates and weight decays."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from forgetting.sections.fields import (
    Count,
    Name,
    NotNegative,
    Number,
    Positive,
    Strict,
    distinct,
    several,
)
from forgetting.sections.mitigation import Mitigation
from forgetting.sections.variants import Budget, Then


class Setting(Strict):
    """One point of the sweep."""

    learning_rate: Positive = Field(description="Peak learning rate.")
    weight_decay: NotNegative = Field(0.0, description="Decoupled weight decay.")


class Method(Strict):
    """A way of fine-tuning, with the learning rates and weight decays that are tried."""

    method: Literal["lora", "full", "hybrid"] = Field(
        description="Train adapters beside the linear layers, all weights, or first adapters and "
        "`then` chosen layers in full."
    )
    variant: Literal["lora", "rslora", "dora", "pissa", "adalora"] = Field(
        "lora",
        description="lora: scale alpha/r; rslora: alpha/sqrt(r) (arXiv 2312.03732); "
        "dora: weight-decomposed (arXiv 2402.09353); pissa: starts from the largest singular "
        "values (arXiv 2404.02948); adalora: spends a budget of ranks where it matters, scale "
        "alpha over the initial rank (arXiv 2303.10512).",
    )
    rank: Annotated[list[Count], BeforeValidator(several), AfterValidator(distinct)] | None = Field(
        None, description="Rank or ranks of the adapters; each is a method of its own."
    )
    alpha: Positive | Literal["2r"] = Field(
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
    lora_plus_ratio: Positive | None = Field(
        None,
        description="LoRA+: the learning rate of B is this multiple of that of A, which is "
        "`learning_rate` (arXiv 2402.12354 advises 16).",
    )
    budget: Budget | None = Field(
        None, description="The course of adalora's ranks; that of the defaults if left out."
    )
    embeddings: Literal["frozen", "trained"] | None = Field(
        None,
        description="Are the input embedding and the LM head trained, in full? By default frozen "
        "for lora, trained for full.",
    )
    embedding_ratio: Positive | None = Field(
        None,
        description="The learning rate of trained embeddings is this multiple of `learning_rate` "
        "(Biderman et al. 2024 suggest 0.1 to 0.5 beside LoRA).",
    )
    then: Then | None = Field(None, description="The second part of method hybrid.")
    learning_rate: Annotated[list[Positive], BeforeValidator(several), AfterValidator(distinct)] = (
        Field(min_length=1, description="Peak learning rates.")
    )
    weight_decay: Annotated[
        list[NotNegative], BeforeValidator(several), AfterValidator(distinct)
    ] = Field([0.0], min_length=1, description="Decoupled weight decays.")
    processes: Count | None = Field(
        None,
        description="Processes that train each run together, a GPU each; by default so many as "
        "memory and the longest time of a job ask for (docs/cluster.md). `full` "
        "shards weights, gradients and the optimizer's state over them, adapters only their "
        "batches; the numbers are the same up to rounding (and the adapters' dropout). Without "
        "SLURM no more than `--resources gpu=N` allows, by default 1 where there is a GPU.",
    )
    nodes: Count | None = Field(
        None,
        description="Machines of a SLURM cluster over which the processes are spread, with a file "
        "system in common; by default 1 for given `processes`. Without SLURM there is one.",
    )
    fixed: Setting | None = Field(
        None, description="Choose this setting of the sweep, whatever the study's rule says."
    )
    mitigation: Mitigation | None = Field(
        None, description="What is done against forgetting; its name ends the method's name."
    )
    suffix: Name | None = Field(
        None,
        description="Put behind the method's name and label, before the mitigation's: tells apart "
        "methods of one rank that differ in `alpha`, names of layers, or what else no name holds.",
    )

    @model_validator(mode="after")
    def _rank_fits_method(self) -> Method:
        if self.method != "full" and not self.rank:
            raise ValueError(f"method {self.method} needs a `rank`")
        if self.method == "hybrid" and not self.then:
            raise ValueError("method hybrid needs a section `then`: what is trained in full, when")
        adapters = ("rank", "variant", "alpha", "dropout", "target_modules", "lora_plus_ratio")
        absent = {
            "lora": ("then",),
            "full": (*adapters, "then", "budget"),
            "hybrid": ("embeddings", "embedding_ratio", "budget"),
        }
        for name in absent[self.method]:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"method {self.method} has no `{name}`")
        if self.fixed and (
            self.fixed.learning_rate not in self.learning_rate
            or self.fixed.weight_decay not in self.weight_decay
        ):
            raise ValueError("`fixed` is not one of the settings of this method's sweep")
        return self

    @model_validator(mode="after")
    def _variant_fits(self) -> Method:
        if self.budget and self.variant != "adalora":
            raise ValueError(f"variant {self.variant} has no `budget`; adalora has")
        if self.variant == "adalora" and self.method == "hybrid":
            raise ValueError("adalora prunes until its end; a hybrid starts from another variant")
        if self.variant == "adalora" and self.lora_plus_ratio is not None:
            raise ValueError(
                "adalora's A and B both start random and are kept orthogonal; `lora_plus_ratio` is "
                "for adapters whose B starts at 0"
            )
        frozen = self.embeddings == "frozen" or (self.method == "lora" and not self.embeddings)
        if self.embedding_ratio is not None and frozen:
            raise ValueError("`embedding_ratio` needs `embeddings: trained`")
        return self

    @model_validator(mode="after")
    def _update_is_known(self) -> Method:
        # What moves the weights of other variants is not scale*B*A alone.
        if self.mitigation and self.variant not in ("lora", "rslora"):
            for name in ("ewc", "l2_sp"):
                if getattr(self.mitigation, name):
                    raise ValueError(
                        f"mitigation.{name} needs the update of the weights, which is scale*B*A "
                        f"for variants lora and rslora, not for {self.variant}"
                    )
        return self
