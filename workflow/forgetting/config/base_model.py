"""The model that is fine-tuned: a folder, a hub's, or a small one that is pretrained here."""

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
    """Shape of a small Llama-architecture model, and course of its training from scratch."""

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
    warmup: Fraction = Field(0.05, description="Share of the steps in which the rate rises.")

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> SmallModelConfig:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of twice the heads, "
                f"{self.num_heads}"
            )
        return self


class PretrainConfig(SmallModelConfig):
    """A small base model, trained from scratch on tables of the study."""

    documents: list[Table] = Field(
        min_length=1,
        description="Tables of training documents: rows with `text`, or with `question` and "
        "`answer`, which are put into the study's prompt.",
    )
    limit: PositiveInt | None = Field(
        None, description="At most so many documents, evenly spaced over the tables."
    )


class BaseModelConfig(ConfigModel):
    """The model that is fine-tuned; its scores are the zero point of forgetting."""

    model: str | None = Field(
        None, description="A folder in Hugging Face form, or OWNER/NAME on the hub."
    )
    revision: GitCommit | None = Field(None, description="Commit of the hub model.")
    pretrain: PretrainConfig | None = Field(None, description="Train the base here instead.")

    @model_validator(mode="after")
    def _one_origin(self) -> BaseModelConfig:
        if (self.model is None) == (self.pretrain is None):
            raise ValueError("the base needs either `model` or `pretrain`")
        return self


def is_local(model: str) -> bool:
    """Is the model given as a folder, rather than by its name on the hub?"""
    return model.startswith((".", "/", "~")) or Path(model).is_dir()
