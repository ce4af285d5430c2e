"""The optimization that all methods share: batches, schedule, optimizer, durations."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from forgetting.config.types import (
    ConfigModel,
    Fraction,
    NonNegativeFloat,
    Number,
    PositiveFloat,
    PositiveInt,
    unique,
)

Schedule = Annotated[Number, Field(ge=0, lt=1)]


class TrainingConfig(ConfigModel):
    """The optimization that all methods share."""

    epochs: PositiveFloat = Field(10.0, description="Passes over the new knowledge.")
    batch_size: PositiveInt = Field(32, description="Question-answer pairs per optimizer step.")
    micro_batch_size: PositiveInt = Field(
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
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = Field(
        "linear",
        description="The learning rate after the warm-up: constant, or decayed to `min_lr_ratio`; "
        "inverse_sqrt and wsd end in a cooldown to `min_lr_ratio`.",
    )
    min_lr_ratio: Fraction = Field(
        0.0, description="Share of the peak at which the learning rate ends; not for constant."
    )
    decay_ratio: Fraction | None = Field(
        None,
        description="Share of all steps in which inverse_sqrt or wsd fall linearly to the "
        "floor at the end; 0.2 by default.",
    )
    decay_steps: PositiveInt | None = Field(
        None,
        description="Steps after the warm-up in which inverse_sqrt falls to 1/sqrt(2) of the peak "
        "(with `inverse_sqrt_floor` 0); as many as the warm-up by default.",
    )
    inverse_sqrt_floor: Fraction = Field(
        0.0, description="Share of the peak that inverse_sqrt falls to in the long run."
    )
    durations: Annotated[list[PositiveFloat], AfterValidator(unique)] = Field(
        [],
        description="Durations, in epochs, the longest of which is `epochs`; 0.01 is a hundredth "
        "of one. With wsd and inverse_sqrt (continued pretraining) one run without cooldown "
        "is the trunk of all; for each duration a branch leaves it where its own cooldown starts, "
        "and ends as the run that is trained with these `epochs` alone. With linear and cosine "
        "(instruction tuning) such runs have nothing in common, and each is trained from the base. "
        "What is selected is the end of a branch.",
    )
    warmup_epochs: NonNegativeFloat | None = Field(
        None,
        description="Epochs of linear warm-up: 1 by default, where neither `warmup_steps` nor "
        "`warmup_ratio` is given.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Steps of linear warm-up, in place of `warmup_epochs`."
    )
    warmup_ratio: Fraction | None = Field(
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
    betas: tuple[Schedule, Schedule] | None = Field(
        None,
        description="Decay rates of the moments: (0.9, 0.999) for adamw and (0.9, 0.95) for lionw "
        "by default; adafactor has none.",
    )
    decay_norms_and_biases: bool = Field(
        False,
        description="Apply the weight decay to norms and biases too, as LLM Foundry does; "
        "transformers' Trainer does not.",
    )
    max_grad_norm: PositiveFloat | None = Field(1.0, description="Largest L2 norm of the gradient.")
    batched_lora: Literal["auto", "never"] = Field(
        "auto",
        description="auto: train the runs of one method and seed in shared forward and backward "
        "passes where that is faster: where there are at least four runs and a step of one has at "
        "most 1024 tokens (8192 on a GPU), replayed rows apart; as many to a pass as memory holds, "
        "at most `micro_batch_size`. Of lora, rslora and pissa, with or without replay; other "
        "methods and mitigations, runs of several processes and those with `durations` are trained "
        "one after the other. The numbers are the same up to rounding.",
    )

    @property
    def resolved_betas(self) -> tuple[float, float]:
        """`betas`, or the optimizer's usual ones."""
        return self.betas or ((0.9, 0.95) if self.optimizer == "lionw" else (0.9, 0.999))

    @property
    def resolved_decay_ratio(self) -> float:
        """`decay_ratio`, or the usual one of the schedule."""
        if not self.has_decay:
            return 0.0
        return 0.2 if self.decay_ratio is None else self.decay_ratio

    @property
    def has_decay(self) -> bool:
        """May the schedule end in a cooldown, before which all durations have the same rates?"""
        return self.schedule in ("inverse_sqrt", "wsd")

    @model_validator(mode="after")
    def _check_durations(self) -> TrainingConfig:
        if not self.durations:
            return self
        longest = max(self.durations)
        if self.schedule == "constant" or (self.has_decay and not self.resolved_decay_ratio):
            raise ValueError(
                "`durations` are runs whose rates fall to the end, each in its own time: take "
                "schedule linear or cosine, or wsd or inverse_sqrt with a `decay_ratio` above "
                "0; with a rate that does not fall, every evaluation of one run ends a duration"
            )
        if longest > self.epochs:
            raise ValueError(
                f"`durations`: {longest:g} epochs are more than the {self.epochs:g} "
                "`epochs` of the trunk; make `epochs` as long"
            )
        if longest < self.epochs:
            raise ValueError(
                f"`durations`: the longest must be `epochs`, {self.epochs:g}; nobody would "
                f"use what is trained after {longest:g}"
            )
        if self.has_decay and self.warmup_ratio is not None:
            raise ValueError(
                "`durations` share one warm-up, of which `warmup_ratio` would give each another; "
                "take `warmup_steps` or `warmup_epochs`"
            )
        return self

    @model_validator(mode="after")
    def _check_single_warmup(self) -> TrainingConfig:
        named = [
            name
            for name in ("warmup_epochs", "warmup_steps", "warmup_ratio")
            if getattr(self, name) is not None
        ]
        if len(named) > 1:
            raise ValueError(f"the warm-up is given twice, by `{named[0]}` and `{named[1]}`")
        return self

    @model_validator(mode="after")
    def _check_keys_have_effect(self) -> TrainingConfig:
        for name in ("decay_steps", "inverse_sqrt_floor"):
            if getattr(self, name) and self.schedule != "inverse_sqrt":
                raise ValueError(f"{self.schedule} has no `{name}`; inverse_sqrt does")
        if self.min_lr_ratio and self.schedule == "constant":
            raise ValueError("a constant rate has no `min_lr_ratio`")
        if self.decay_ratio is not None and not self.has_decay:
            raise ValueError(f"{self.schedule} has no `decay_ratio`; inverse_sqrt and wsd do")
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
