"""What every model is measured on, how and how often: probes and the general text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from forgetting.sections.fields import Count, Positive, Strict, Table, distinct, several

TEXT_PROBE = "general_text"
"""What the tables of results call the general text, in place of a probe's name."""


ALL_PROBES = "all_probes"
"""The same of what is computed from all probes together."""


class Probe(Strict):
    """A question-answer set on which every model of the study is measured."""

    table: Annotated[list[Table], BeforeValidator(several), AfterValidator(distinct)] = Field(
        description="Table or tables with question, answer, and for the truth ratio "
        "perturbed_answer (wrong answers) and, if there is one, paraphrased_answer."
    )
    knowledge: Literal["new", "old"] = Field(description="Is it trained on, or to be kept?")
    truth_ratio: bool = Field(True, description="Score wrong answers too; the rows must have them.")
    limit: Count | None = Field(
        None, description="At most so many rows, evenly spaced over the table."
    )


class GeneralText(Strict):
    """A text on which the predictions of every model are compared with the base's.

    Gives the forgetting cross-entropy of *Scaling Laws for Forgetting* (arXiv 2401.05605), hard and
    soft, the KL divergence, and the share of tokens on which model and base agree.
    """

    table: Table = Field(description="Rows with `text`; they are joined as they are.")
    block: Annotated[int, Field(ge=2)] = Field(
        512, description="Tokens that are read at once; what is left at the end is dropped."
    )
    limit: Count | None = Field(
        None, description="At most so many blocks, evenly spaced over the text."
    )
    batch_size: Count = Field(4, description="Blocks per forward pass.")


RougeTokenizer = Literal["rouge_score", "unicode"]


class Measurement(Strict):
    """How and how often the probes are scored."""

    every_epochs: Positive = Field(1.0, description="Epochs between two evaluations.")
    max_new_tokens: Count = Field(200, description="Longest generated answer, in tokens.")
    batch_size: Count = Field(64, description="Sequences per forward pass.")
    rouge_tokenizer: RougeTokenizer = Field(
        "rouge_score",
        description="What ROUGE takes for words. `rouge_score`: as published, runs of a–z and 0–9, "
        "Porter-stemmed; all other letters are lost. `unicode`: runs of letters, numbers and marks "
        "of any script, not stemmed; in scripts without spaces (Chinese, Japanese, Thai, Lao, "
        "Khmer, Burmese) every letter. Its numbers cannot be compared with published ones.",
    )
