"""Which checkpoint and which hyper-parameters stand for a method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from forgetting.config.types import ConfigModel, Fraction, Name, Number, PositiveFloat, unique


class SelectionConfig(ConfigModel):
    """Which checkpoint, and which hyper-parameters, stand for a method."""

    probe: Name = Field(description="The probe of the new knowledge that the threshold is on.")
    metric: Literal["rougeL_recall", "rougeL_f1", "rouge1_recall", "probability"] = Field(
        "rougeL_recall", description="Mean of this metric over the probe's items is compared."
    )
    threshold: Annotated[Number, Field(gt=0, le=1)] = Field(
        0.9, description="The last evaluation before the metric first reaches it is selected."
    )
    hyperparameters: Literal["earliest", "smallest-lr", "fixed"] = Field(
        "earliest",
        description="earliest: the setting that reaches the threshold at the earliest step; "
        "smallest-lr: the smallest rate that reaches it within `deadline_epochs`; "
        "fixed: the setting named in each method, or its only one.",
    )
    deadline_epochs: PositiveFloat | None = Field(
        None, description="Deadline of `smallest-lr`; without it the whole training."
    )
    if_not_reached: Literal["none", "last"] = Field(
        "none",
        description="A run that never reaches the threshold has no selected checkpoint, or, "
        "marked as such, its last one.",
    )

    stop_after_evaluations: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="End a run so many evaluations after the one that reaches the threshold. Saves "
        "time and cuts the trajectory's overfit end off; without it every run goes to its end.",
    )
    wise_ft: Annotated[list[Fraction], AfterValidator(unique)] = Field(
        [],
        description="Measure selected checkpoints also with these shares of their update, from 0, "
        "the base, to 1; no training (WiSE-FT, arXiv 2109.01903). Table `wise_ft` has the items.",
    )

    @model_validator(mode="after")
    def _deadline_has_rule(self) -> SelectionConfig:
        if self.deadline_epochs is not None and self.hyperparameters != "smallest-lr":
            raise ValueError("`deadline_epochs` belongs to `hyperparameters: smallest-lr`")
        return self
