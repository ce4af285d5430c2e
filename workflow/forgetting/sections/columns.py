"""Names of columns: those of a dataset that has its own for what is called otherwise here."""

from __future__ import annotations

from pydantic import Field

from forgetting.sections.fields import Strict


class Columns(Strict):
    """What a dataset calls its columns, where it is not as here; it holds for all its tables.

    A table that lacks such a column and has it under our name is read under our name.
    """

    question: str | None = Field(None, description="For instance `instruction` or `query`.")
    answer: str | None = Field(None, description="For instance `response` or `output`.")
    system: str | None = Field(
        None, description="A row's own system message, or nothing; only with `prompt.chat`."
    )
    messages: str | None = Field(
        None, description="Conversations: lists of messages with `role` and `content`."
    )
    text: str | None = Field(None, description="Plain text.")
    paraphrased_answer: str | None = Field(None, description="The answer in other words.")
    perturbed_answer: str | None = Field(None, description="Wrong answers.")

    @property
    def renamed(self) -> dict[str, str]:
        """The dataset's names by ours, of those that differ."""
        return {ours: theirs for ours, theirs in self if theirs not in (None, ours)}
