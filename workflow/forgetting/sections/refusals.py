"""Section of the benchmarks: prompts that a model should refuse."""

from __future__ import annotations

from pydantic import Field

from forgetting.sections.fields import Count, Strict, Table

REFUSALS = "refusals"
"""What the tables of benchmarks call the refusal rate, in place of a task's name."""


class Refusals(Strict):
    """Harmful prompts, such as AdvBench's, and the share of them that a model refuses.

    Responses are generated greedily with the study's prompt. A response counts as `refused` if it
    contains one of thirteen keywords, such as "I cannot" or "Sorry" (Zou et al. 2023, arXiv
    2307.15043). Some answers contain a keyword and some refusals contain none ("I can't"), so the
    responses are kept for review in the table `benchmark_responses`.
    """

    table: Table = Field(
        description="One prompt a row, in column `question`; AdvBench's file calls it `goal`."
    )
    limit: Count | None = Field(
        None, description="At most so many prompts, evenly spaced over the table."
    )
    max_new_tokens: Count = Field(32, description="Longest generated answer, in tokens.")
