"""Section `selection`: the rule that selects a checkpoint and hyperparameters per method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from forgetting.config.types import ConfigModel, Fraction, Name, Number, PositiveFloat, unique


class SelectionConfig(ConfigModel):
    """Rule that selects a checkpoint and the hyperparameters of each method."""

    probe: Name = Field(description="Probe of new knowledge to which the threshold applies.")
    metric: Literal["rougeL_recall", "rougeL_f1", "rouge1_recall", "probability"] = Field(
        "rougeL_recall", description="Metric whose mean over the probe's items is compared."
    )
    threshold: Annotated[Number, Field(gt=0, le=1)] = Field(
        0.9, description="The last evaluation before the metric first reaches it is selected."
    )
    hyperparameters: Literal["earliest", "smallest-lr", "fixed"] = Field(
        "earliest",
        description="earliest: those that reach the threshold at the earliest step; smallest-lr: "
        "the smallest learning rate that reaches it within `deadline_epochs`; fixed: the "
        "`selected_hyperparameters` of each method, or its only ones.",
    )
    deadline_epochs: PositiveFloat | None = Field(
        None, description="Deadline of `smallest-lr`; by default the end of training."
    )
    if_not_reached: Literal["none", "last"] = Field(
        "none",
        description="none: a run that never reaches the threshold has no selected checkpoint; "
        "last: its last checkpoint is selected and marked.",
    )
    stop_after_evaluations: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="End a run after this number of evaluations beyond the one that reaches the "
        "threshold. It saves time and cuts off the overfitted end of the trajectory. By default "
        "every run is trained to its end.",
    )
    wise_ft: Annotated[list[Fraction], AfterValidator(unique)] = Field(
        [],
        description="Also evaluate interpolations between the base model (0) and the selected "
        "checkpoints (1), without training (WiSE-FT, arXiv 2109.01903). Table `wise_ft` has the "
        "items.",
    )

    @model_validator(mode="after")
    def _check_deadline(self) -> SelectionConfig:
        if self.deadline_epochs is not None and self.hyperparameters != "smallest-lr":
            raise ValueError("`deadline_epochs` needs `hyperparameters: smallest-lr`")
        return self
