"""What ROUGE does not see of a probe's reference answers: their ends, and letters beyond a-z.

Reads the items of the base, whose column `reference_tokens` is what a model must generate to say
the whole reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import pandas as pd

from forgetting.records import InputError

SEEN = re.compile(r"[a-z0-9]")
"""What rouge_score makes words of, after lower-casing; all else is dropped and parts words."""

MUCH = 0.05
"""Share of ignored letters from which on the report says so."""


def ignored_letters(references: Iterable[str]) -> float:
    """Share of letters and digits that ROUGE drops, since they are not in a-z and 0-9."""
    letters = [c for text in references for c in text.lower() if c.isalnum()]
    return sum(SEEN.match(c) is None for c in letters) / max(len(letters), 1)


def check_references(tokens: Iterable[int], probe: str, limit: int) -> None:
    """Refuse to watch the ROUGE of answers none of which can be generated whole."""
    lengths = sorted(tokens)
    if lengths and lengths[0] > limit:
        raise InputError(
            f"measurement.max_new_tokens: all {len(lengths)} reference answers of {probe} are "
            f"longer than {limit} tokens, so that ROUGE cannot tell when they are learnt; the "
            f"longest has {lengths[-1]}"
        )


def reference_notes(base_items: pd.DataFrame, limit: int) -> list[str]:
    """A sentence for each probe of which ROUGE misses something.

    Args:
        base_items: probe, reference and reference_tokens of every question.
        limit: the study's measurement.max_new_tokens.
    """
    notes = []
    asked = base_items.dropna(subset=["reference"])
    for probe, group in asked.groupby("probe", sort=False):
        name, cut = str(probe).replace("_", " "), int((group["reference_tokens"] > limit).sum())
        if cut:
            notes.append(
                f"{cut} of {len(group)} reference answers of {name} are longer than the {limit} "
                "tokens that are generated (measurement.max_new_tokens): ROUGE recall cannot "
                "reach 1 on them."
            )
        share = ignored_letters(group["reference"])
        if share > MUCH:
            notes.append(
                f"ROUGE ignores {share:.0%} of the letters in the reference answers of {name}, "
                "which are not among a–z and 0–9: its values there say little."
            )
    return notes
