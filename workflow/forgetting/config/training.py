"""Section `training`: batches, learning rate schedule, optimizer and durations of all methods."""

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

DecayRate = Annotated[Number, Field(ge=0, lt=1)]


class TrainingConfig(ConfigModel):
    """Training options, which apply to all methods."""

    epochs: PositiveFloat = Field(10.0, description="Passes over the new knowledge.")
    batch_size: PositiveInt = Field(32, description="Question-answer pairs per optimizer step.")
    micro_batch_size: PositiveInt = Field(
        32,
        description="Pairs per forward pass; the gradient does not depend on it. A run that goes "
        "out of memory continues with half of it.",
    )
    max_length: Annotated[int, Field(ge=2)] = Field(
        500,
        description="Longest training sequence, in tokens; texts are joined and cut into blocks of "
        "this length.",
    )
    packing: bool = Field(
        False,
        description="Pack several whole examples into a sequence of at most `max_length` tokens, "
        "with attention within each example only. `batch_size` and `micro_batch_size` then count "
        "packed sequences.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass and keep only the inputs of each "
        "block: less memory, a third more arithmetic, the same gradients.",
    )
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = Field(
        "linear",
        description="Learning rate after the warm-up: constant, or decayed to `min_lr_ratio`; "
        "inverse_sqrt and wsd end in a cooldown to `min_lr_ratio`.",
    )
    min_lr_ratio: Fraction = Field(
        0.0, description="Final learning rate as a fraction of the peak; not for constant."
    )
    decay_ratio: Fraction | None = Field(
        None,
        description="Fraction of all steps that is the linear cooldown to `min_lr_ratio` at the "
        "end of inverse_sqrt and wsd; 0.2 by default.",
    )
    decay_steps: PositiveInt | None = Field(
        None,
        description="Steps after the warm-up in which inverse_sqrt falls to 1/sqrt(2) of the peak "
        "(with `inverse_sqrt_floor` 0); by default as many as the warm-up.",
    )
    inverse_sqrt_floor: Fraction = Field(
        0.0, description="Asymptote of inverse_sqrt as a fraction of the peak."
    )
    durations: Annotated[list[PositiveFloat], AfterValidator(unique)] = Field(
        [],
        description="Durations in epochs, which may be fractions; the longest must be `epochs`. "
        "With wsd and inverse_sqrt (continued pretraining), all durations share a trunk, a run "
        "without cooldown. Each duration is a branch that leaves the trunk where its cooldown "
        "starts, and ends like a run with these `epochs`. With linear and cosine (instruction "
        "tuning), each duration is trained from the base model. The selected checkpoint is the "
        "end of a branch.",
    )
    warmup_epochs: NonNegativeFloat | None = Field(
        None,
        description="Epochs of linear warm-up; 1 by default, if neither `warmup_steps` nor "
        "`warmup_ratio` is set.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Steps of linear warm-up, instead of `warmup_epochs`."
    )
    warmup_ratio: Fraction | None = Field(
        None, description="Warm-up as a fraction of all steps, instead of `warmup_epochs`."
    )
    optimizer: Literal["adamw", "lionw", "adafactor"] = Field(
        "adamw",
        description="adamw; lionw: Lion with a weight decay that is not multiplied by the learning "
        "rate; adafactor: factored second moments, in transformers' implementation with a given "
        "learning rate.",
    )
    scale_parameter: bool = Field(
        False,
        description="adafactor only: multiply the step of each matrix by the root mean square of "
        "its weights, at least 1e-3. LoRA's B, which starts at 0, then hardly moves.",
    )
    betas: tuple[DecayRate, DecayRate] | None = Field(
        None,
        description="Decay rates of the moments: (0.9, 0.999) for adamw and (0.9, 0.95) for lionw "
        "by default; adafactor has none.",
    )
    decay_norms_and_biases: bool = Field(
        False,
        description="Apply the weight decay to norms and biases too, as LLM Foundry does; "
        "transformers' Trainer does not.",
    )
    max_grad_norm: PositiveFloat | None = Field(
        1.0, description="Maximum L2 norm of the gradient; `null` disables clipping."
    )
    batched_lora: Literal["auto", "never"] = Field(
        "auto",
        description="auto: train several runs of one method and seed in one forward and backward "
        "pass if that is faster. It needs at least four runs, and at most 1024 tokens (8192 on a "
        "GPU) in a step of one run, replayed rows not counted. A pass has as many runs as memory "
        "allows, at most `micro_batch_size`. It applies to lora, rslora and pissa, with or without "
        "replay. Other methods and mitigations, runs of several processes and runs with "
        "`durations` are trained one after the other. The numbers are the same up to rounding.",
    )

    @property
    def resolved_betas(self) -> tuple[float, float]:
        """Return `betas`, or the defaults of the optimizer."""
        return self.betas or ((0.9, 0.95) if self.optimizer == "lionw" else (0.9, 0.999))

    @property
    def resolved_decay_ratio(self) -> float:
        """Return `decay_ratio`, or the default of the schedule."""
        if not self.has_decay:
            return 0.0
        return 0.2 if self.decay_ratio is None else self.decay_ratio

    @property
    def has_decay(self) -> bool:
        """Return whether the schedule may end in a cooldown, so that durations share a trunk."""
        return self.schedule in ("inverse_sqrt", "wsd")

    @model_validator(mode="after")
    def _check_durations(self) -> TrainingConfig:
        if not self.durations:
            return self
        longest = max(self.durations)
        if self.schedule == "constant" or (self.has_decay and not self.resolved_decay_ratio):
            raise ValueError(
                "`durations` need a learning rate that falls at the end: take schedule linear or "
                "cosine, or wsd or inverse_sqrt with a `decay_ratio` above 0; with a constant "
                "learning rate every evaluation of one run is the end of a duration"
            )
        if longest > self.epochs:
            raise ValueError(
                f"`durations`: {longest:g} is more than `epochs`, {self.epochs:g}; make `epochs` "
                "as long as the longest duration"
            )
        if longest < self.epochs:
            raise ValueError(
                f"`durations`: the longest must be `epochs`, {self.epochs:g}, because no duration "
                f"uses the steps after {longest:g}"
            )
        if self.has_decay and self.warmup_ratio is not None:
            raise ValueError(
                "`durations` share one warm-up, but `warmup_ratio` depends on the duration; take "
                "`warmup_steps` or `warmup_epochs`"
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
            raise ValueError(f"the warm-up is set twice, by `{named[0]}` and `{named[1]}`")
        return self

    @model_validator(mode="after")
    def _check_keys_have_effect(self) -> TrainingConfig:
        for name in ("decay_steps", "inverse_sqrt_floor"):
            if getattr(self, name) and self.schedule != "inverse_sqrt":
                raise ValueError(f"schedule {self.schedule} has no `{name}`; inverse_sqrt does")
        if self.min_lr_ratio and self.schedule == "constant":
            raise ValueError("schedule constant has no `min_lr_ratio`")
        if self.decay_ratio is not None and not self.has_decay:
            raise ValueError(
                f"schedule {self.schedule} has no `decay_ratio`; inverse_sqrt and wsd do"
            )
        if self.betas and self.optimizer == "adafactor":
            raise ValueError("optimizer adafactor has no `betas`")
        if self.scale_parameter and self.optimizer != "adafactor":
            raise ValueError(f"optimizer {self.optimizer} has no `scale_parameter`; adafactor does")
        return self

    @model_validator(mode="before")
    @classmethod
    def _betas_as_tuple(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("betas"), list):
            return {**values, "betas": tuple(values["betas"])}
        return values
