"""The model that is fine-tuned: a folder, a hub's, or a small one that is pretrained here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from forgetting.sections.fields import Commit, Count, NotNegative, Positive, Share, Strict, Table


class SmallModel(Strict):
    """Shape of a small Llama-architecture model, and course of its training from scratch."""

    hidden_size: Count = Field(192, description="Width of the residual stream.")
    intermediate_size: Count = Field(512, description="Width of the MLP.")
    layers: Count = Field(4, description="Number of transformer blocks.")
    heads: Count = Field(4, description="Number of attention heads.")
    vocabulary: Annotated[int, Field(ge=300)] = Field(
        2048, description="Tokens of the byte-level BPE that is trained on the documents."
    )
    context: Count = Field(2048, description="Longest sequence that the model accepts, in tokens.")
    block: Count = Field(256, description="Length of a packed training sequence, in tokens.")
    batch_tokens: Count = Field(4096, description="Tokens per optimizer step.")
    epochs: Positive = Field(1.0, description="Passes over the documents.")
    learning_rate: Positive = Field(3e-3, description="Peak learning rate of AdamW.")
    weight_decay: NotNegative = Field(0.1, description="Decoupled weight decay of AdamW.")
    warmup: Share = Field(0.05, description="Share of the steps in which the rate rises.")

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> SmallModel:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of twice the heads, {self.heads}"
            )
        return self


class Pretraining(SmallModel):
    """A small base model, trained from scratch on tables of the study."""

    documents: list[Table] = Field(
        min_length=1,
        description="Tables of training documents: rows with `text`, or with `question` and "
        "`answer`, which are put into the study's prompt.",
    )
    limit: Count | None = Field(
        None, description="At most so many documents, evenly spaced over the tables."
    )


class Base(Strict):
    """The model that is fine-tuned; its scores are the zero point of forgetting."""

    model: str | None = Field(
        None, description="A folder in Hugging Face form, or OWNER/NAME on the hub."
    )
    revision: Commit | None = Field(None, description="Commit of the hub model.")
    pretrain: Pretraining | None = Field(None, description="Train the base here instead.")

    @model_validator(mode="after")
    def _one_origin(self) -> Base:
        if (self.model is None) == (self.pretrain is None):
            raise ValueError("the base needs either `model` or `pretrain`")
        return self
