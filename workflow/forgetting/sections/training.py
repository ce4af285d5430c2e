"""The optimization that all methods share: batches, schedule, optimizer, budgets."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from forgetting.sections.fields import (
    Count,
    NotNegative,
    Number,
    Positive,
    Share,
    Strict,
    distinct,
)

Decay = Annotated[Number, Field(ge=0, lt=1)]


class Training(Strict):
    """The optimization that all methods share."""

    epochs: Positive = Field(10.0, description="Passes over the new knowledge.")
    batch_size: Count = Field(32, description="Question-answer pairs per optimizer step.")
    micro_batch_size: Count = Field(
        32,
        description="Pairs per forward pass; the gradient does not depend on it. Where memory runs "
        "out with them, the run goes on with half as many.",
    )
    max_length: Annotated[int, Field(ge=2)] = Field(
        500,
        description="Longest training sequence, in tokens; texts are joined and cut into so long "
        "blocks.",
    )
    packing: bool = Field(
        False,
        description="Put several examples to a sequence of at most `max_length` tokens, whole and "
        "each blind to the others; `batch_size` and `micro_batch_size` then count such sequences.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Keep only what enters each block for the backward pass, and compute the rest "
        "again: less memory, a third more arithmetic, the same gradients.",
    )
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt", "trapezoid"] = Field(
        "linear",
        description="Course of the learning rate after the warm-up: as it is, down to `floor`, or "
        "(inverse_sqrt, trapezoid) down to `floor` in a cooldown at the end.",
    )
    floor: Share = Field(
        0.0, description="Share of the peak at which the learning rate ends; not for constant."
    )
    cooldown: Share | None = Field(
        None,
        description="Share of all steps in which inverse_sqrt or trapezoid fall linearly to the "
        "floor at the end; 0.2 by default.",
    )
    decay_steps: Count | None = Field(
        None,
        description="Steps after the warm-up in which inverse_sqrt falls to 1/sqrt(2) of the peak "
        "(with `decay_floor` 0); as many as the warm-up by default.",
    )
    decay_floor: Share = Field(
        0.0, description="Share of the peak that inverse_sqrt falls to in the long run."
    )
    budgets: Annotated[list[Positive], AfterValidator(distinct)] = Field(
        [],
        description="Durations, in epochs, the longest of which is `epochs`; 0.01 is a hundredth "
        "of one. With trapezoid and inverse_sqrt (continued pretraining) one run without cooldown "
        "is the trunk of all; for each duration a branch leaves it where its own cooldown starts, "
        "and ends as the run that is trained with these `epochs` alone. With linear and cosine "
        "(instruction tuning) such runs have nothing in common, and each is trained from the base. "
        "What is selected is the end of a branch.",
    )
    warmup_epochs: NotNegative | None = Field(
        None,
        description="Epochs of linear warm-up: 1 by default, where neither `warmup_steps` nor "
        "`warmup_share` is given.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Steps of linear warm-up, in place of `warmup_epochs`."
    )
    warmup_share: Share | None = Field(
        None, description="Share of all steps that is warm-up, in place of `warmup_epochs`."
    )
    optimizer: Literal["adamw", "lionw", "adafactor"] = Field(
        "adamw",
        description="adamw; lionw: Lion with a weight decay that the rate does not multiply; "
        "adafactor: factored second moments, transformers' implementation with a given learning "
        "rate.",
    )
    scale_parameter: bool = Field(
        False,
        description="adafactor only: multiply the step of each matrix by the root mean square of "
        "its weights, at least 1e-3. LoRA's B starts at 0 and hardly moves then.",
    )
    betas: tuple[Decay, Decay] | None = Field(
        None,
        description="Decay rates of the moments: (0.9, 0.999) for adamw and (0.9, 0.95) for lionw "
        "by default; adafactor has none.",
    )
    decay_vectors: bool = Field(
        False,
        description="Apply the weight decay to norms and biases too, as LLM Foundry does; "
        "transformers' Trainer does not.",
    )
    gradient_clip: Positive | None = Field(1.0, description="Largest L2 norm of the gradient.")
    fused: Literal["auto", "never"] = Field(
        "auto",
        description="auto: train the runs of one method and seed in shared forward and backward "
        "passes where that is faster: where there are at least four runs and a step of one has at "
        "most 1024 tokens (8192 on a GPU), replayed rows apart; as many to a pass as memory holds, "
        "at most `micro_batch_size`. Of lora, rslora and pissa, with or without replay; other "
        "methods and mitigations, runs of several processes and those with `budgets` are trained "
        "one after the other. The numbers are the same up to rounding.",
    )

    @property
    def decay_rates(self) -> tuple[float, float]:
        """`betas`, or the optimizer's usual ones."""
        return self.betas or ((0.9, 0.95) if self.optimizer == "lionw" else (0.9, 0.999))

    @property
    def cooldown_share(self) -> float:
        """`cooldown`, or the usual one of the schedule."""
        if not self.has_cooldown:
            return 0.0
        return 0.2 if self.cooldown is None else self.cooldown

    @property
    def has_cooldown(self) -> bool:
        """May the schedule end in a cooldown, before which all durations have the same rates?"""
        return self.schedule in ("inverse_sqrt", "trapezoid")

    @model_validator(mode="after")
    def _budgets_end_at_the_floor(self) -> Training:
        if not self.budgets:
            return self
        longest = max(self.budgets)
        if self.schedule == "constant" or (self.has_cooldown and not self.cooldown_share):
            raise ValueError(
                "`budgets` are runs whose rates fall to the end, each in its own time: take "
                "schedule linear or cosine, or trapezoid or inverse_sqrt with a `cooldown` above "
                "0; with a rate that does not fall, every evaluation of one run ends a duration"
            )
        if longest > self.epochs:
            raise ValueError(
                f"`budgets`: {longest:g} epochs are more than the {self.epochs:g} `epochs` of the "
                "trunk; make `epochs` as long"
            )
        if longest < self.epochs:
            raise ValueError(
                f"`budgets`: the longest must be `epochs`, {self.epochs:g}; nobody would use what "
                f"is trained after {longest:g}"
            )
        if self.has_cooldown and self.warmup_share is not None:
            raise ValueError(
                "`budgets` share one warm-up, of which `warmup_share` would give each another; "
                "take `warmup_steps` or `warmup_epochs`"
            )
        return self

    @model_validator(mode="after")
    def _one_warm_up(self) -> Training:
        named = [
            name
            for name in ("warmup_epochs", "warmup_steps", "warmup_share")
            if getattr(self, name) is not None
        ]
        if len(named) > 1:
            raise ValueError(f"the warm-up is given twice, by `{named[0]}` and `{named[1]}`")
        return self

    @model_validator(mode="after")
    def _keys_have_effect(self) -> Training:
        for name in ("decay_steps", "decay_floor"):
            if getattr(self, name) and self.schedule != "inverse_sqrt":
                raise ValueError(f"{self.schedule} has no `{name}`; inverse_sqrt does")
        if self.floor and self.schedule == "constant":
            raise ValueError("a constant rate has no `floor`")
        if self.cooldown is not None and not self.has_cooldown:
            raise ValueError(f"{self.schedule} has no `cooldown`; inverse_sqrt and trapezoid do")
        if self.betas and self.optimizer == "adafactor":
            raise ValueError("adafactor has no `betas`")
        if self.scale_parameter and self.optimizer != "adafactor":
            raise ValueError(f"{self.optimizer} has no `scale_parameter`; adafactor does")
        return self

    @model_validator(mode="before")
    @classmethod
    def _betas_as_tuple(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("betas"), list):
            return {**values, "betas": tuple(values["betas"])}
        return values
