"""Section `base`: the model that is fine-tuned, from a folder, the hub, or pretrained here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from forgetting.config.types import (
    ConfigModel,
    Fraction,
    GitCommit,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Table,
)


class SmallModelConfig(ConfigModel):
    """Shape of a small Llama-architecture model, and how it is trained from scratch."""

    hidden_size: PositiveInt = Field(192, description="Width of the residual stream.")
    intermediate_size: PositiveInt = Field(512, description="Width of the MLP.")
    num_layers: PositiveInt = Field(4, description="Number of transformer blocks.")
    num_heads: PositiveInt = Field(4, description="Number of attention heads.")
    vocab_size: Annotated[int, Field(ge=300)] = Field(
        2048, description="Tokens of the byte-level BPE that is trained on the documents."
    )
    max_position_embeddings: PositiveInt = Field(
        2048, description="Longest sequence that the model accepts, in tokens."
    )
    block_size: PositiveInt = Field(
        256, description="Length of a packed training sequence, in tokens."
    )
    batch_tokens: PositiveInt = Field(4096, description="Tokens per optimizer step.")
    epochs: PositiveFloat = Field(1.0, description="Passes over the documents.")
    learning_rate: PositiveFloat = Field(3e-3, description="Peak learning rate of AdamW.")
    weight_decay: NonNegativeFloat = Field(0.1, description="Decoupled weight decay of AdamW.")
    warmup: Fraction = Field(
        0.05, description="Fraction of the steps in which the learning rate rises."
    )

    @model_validator(mode="after")
    def _check_head_size(self) -> SmallModelConfig:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of twice num_heads, "
                f"{self.num_heads}"
            )
        return self


class PretrainConfig(SmallModelConfig):
    """A small base model, trained from scratch on tables of the study."""

    documents: list[Table] = Field(
        min_length=1,
        description="Tables of training documents. Rows have `text`, or `question` and `answer`, "
        "which are put into the study's prompt.",
    )
    limit: PositiveInt | None = Field(
        None, description="Maximum number of documents, evenly spaced over the tables."
    )


class BaseModelConfig(ConfigModel):
    """The model that is fine-tuned. Forgetting is measured against its scores."""

    model: str | None = Field(
        None, description="A folder in Hugging Face format, or OWNER/NAME on the hub."
    )
    revision: GitCommit | None = Field(None, description="Commit of the hub model.")
    pretrain: PretrainConfig | None = Field(
        None, description="Train a small base model from scratch instead."
    )

    @model_validator(mode="after")
    def _check_one_origin(self) -> BaseModelConfig:
        if (self.model is None) == (self.pretrain is None):
            raise ValueError("the base model needs either `model` or `pretrain`")
        return self


def is_local(model: str) -> bool:
    """Return whether the model is a folder rather than a name on the hub."""
    return model.startswith((".", "/", "~")) or Path(model).is_dir()
