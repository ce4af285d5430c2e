"""Section `methods.N.mitigation`: replay, KL penalty, EWC and L2-SP against forgetting."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from forgetting.config.types import ConfigModel, Name, NonNegativeFloat, Number, PositiveInt, Table


class MitigationSection(ConfigModel):
    """A mitigation of a method, and what the library has to know of it.

    Attributes:
        is_penalty: whether it adds to the loss; runs of such a method cannot share passes.
        needs_weight_update: whether it reads the change of each weight, scale*B*A of an adapter.
        needs_base_model: whether it reads the base model's predictions on the training tokens.
        bytes_per_weight: memory that it keeps for each weight that is trained or adapted.
        strength: the number in the method's name.
        tables: tables that it reads.
    """

    is_penalty: ClassVar[bool] = True
    needs_weight_update: ClassVar[bool] = False
    needs_base_model: ClassVar[bool] = False
    bytes_per_weight: ClassVar[float] = 0.0

    @property
    def strength(self) -> float:
        """Return the weight of the penalty, or the number that replaces it."""
        return float(getattr(self, "weight"))  # noqa: B009

    @property
    def tables(self) -> list[str]:
        """Return the tables that it reads."""
        table = getattr(self, "table", None)
        return [table] if table else []


class ReplayConfig(MitigationSection):
    """Replay: every batch also has rows of a general text.

    Replayed rows are added to the batch, so that the number of steps per epoch does not change. The
    loss of a step is the mean over all its target tokens, so that a long text counts more than a
    short answer. A `text` is trained on up to `training.max_length` tokens.
    """

    table: Table = Field(description="Rows with `text`, or with `question` and `answer`.")
    ratio: Annotated[Number, Field(gt=0, lt=1)] = Field(
        0.1,
        description="Fraction of replayed rows among all rows of a step; with `training.packing`, "
        "of packed sequences.",
    )
    is_penalty: ClassVar[bool] = False

    @property
    def strength(self) -> float:
        """Return the ratio."""
        return self.ratio


class KlConfig(MitigationSection):
    """Adds weight * KL(base || model), the mean over target tokens in nats, to the loss.

    This direction keeps all predictions that the base model considers probable (Hinton et al. 2015,
    arXiv 1503.02531).
    """

    weight: NonNegativeFloat = Field(
        description="Weight of the penalty; the loss is in nats per token."
    )
    tokens: Literal["all", "replay"] = Field(
        "all", description="Average over all target tokens, or over those of the replayed rows."
    )
    needs_base_model: ClassVar[bool] = True


class L2SpConfig(MitigationSection):
    """L2-SP: adds weight/2 * ||theta - theta0||^2 to the loss (Li et al. 2018, arXiv 1802.01483).

    For an adapter, theta - theta0 is the update scale*B*A of the adapted matrices. In both stages
    of a hybrid, theta0 is the base model.
    """

    weight: NonNegativeFloat = Field(
        description="Weight of the penalty; the loss is in nats per token."
    )
    needs_weight_update: ClassVar[bool] = True
    bytes_per_weight: ClassVar[float] = 4.0  # the base model's weights


class EwcConfig(MitigationSection):
    """EWC: adds weight/2 * sum_i F_i (theta_i - theta0_i)^2 (Kirkpatrick et al. 2017, equation 3).

    F_i is the diagonal of the base model's Fisher information per target token of a general text.
    Near the base model, the penalty is thus the diagonal approximation of KL(base || model) in nats
    per token. For an adapter, theta - theta0 is the update scale*B*A of the adapted matrices. In
    both stages of a hybrid, theta0 is the base model.
    """

    weight: NonNegativeFloat = Field(
        description="Weight of the penalty; the loss is in nats per token."
    )
    table: Table = Field(description="Rows with `text`, or with `question` and `answer`.")
    samples: PositiveInt = Field(
        128, description="Rows that estimate the information, evenly spaced over the table."
    )
    needs_weight_update: ClassVar[bool] = True
    bytes_per_weight: ClassVar[float] = 8.0  # the base model's weights and their information


class MitigationConfig(ConfigModel):
    """Mitigations of forgetting that a method applies in training."""

    replay: ReplayConfig | None = Field(None, description="Mix general text into the batches.")
    kl: KlConfig | None = Field(
        None, description="Keep the next-token predictions close to those of the base model."
    )
    ewc: EwcConfig | None = Field(
        None,
        description="Keep the weights close to those of the base model, weighted by their Fisher "
        "information; for variants lora and rslora, and full. It needs one or two more copies of "
        "the trained or adapted weights in memory.",
    )
    l2_sp: L2SpConfig | None = Field(
        None,
        description="Keep the weights close to those of the base model; for variants lora and "
        "rslora, and full.",
    )
    suffix: Name | None = Field(
        None,
        description="End of the method's name; by default it is made of the keys above.",
    )

    @model_validator(mode="after")
    def _check_not_empty(self) -> MitigationConfig:
        if not self.sections:
            raise ValueError("name at least one mitigation, or leave the section out")
        if self.kl and self.kl.tokens == "replay" and not self.replay:
            raise ValueError("`kl: {tokens: replay}` needs the section `replay`")
        return self

    @property
    def sections(self) -> dict[str, MitigationSection]:
        """Return the mitigations of the method by their keys, in the order of the fields."""
        return {key: value for key, value in self if isinstance(value, MitigationSection)}

    @property
    def tables(self) -> list[str]:
        """Return the tables that are read, each once."""
        read = [table for section in self.sections.values() for table in section.tables]
        return list(dict.fromkeys(read))

    @property
    def name(self) -> str:
        """Return the end of the method's name, such as `replay0.1-kl0.5`."""
        parts = [f"{key}{section.strength:g}" for key, section in self.sections.items()]
        return self.suffix or "-".join(parts)
