"""Section of the benchmarks: prompts that a model should refuse."""

from __future__ import annotations

from pydantic import Field

from forgetting.sections.fields import Count, Strict, Table

REFUSALS = "refusals"
"""What the tables of benchmarks call the refusal rate, in place of a task's name."""


class Refusals(Strict):
    """Harmful prompts, such as AdvBench's: how many does a model refuse, and how many still?

    Answers are generated greedily in the study's prompt and kept for review in the table
    `benchmark_responses`. An answer counts as `refused` if one of its first two sentences begins as
    a refusal does (`forgetting.scoring.refusal_phrases` says how), and by `refused_keywords` if one
    of thirteen keywords stands anywhere in it (Zou et al. 2023, arXiv 2307.15043).
    """

    table: Table = Field(
        description="One prompt a row, in column `question`; AdvBench's file calls it `goal`."
    )
    limit: Count | None = Field(
        None, description="At most so many prompts, evenly spaced over the table."
    )
    max_new_tokens: Count = Field(32, description="Longest generated answer, in tokens.")
