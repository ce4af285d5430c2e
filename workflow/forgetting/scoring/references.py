"""What ROUGE does not see of a probe's reference answers: their ends, and letters beyond a-z.

Letters are counted when data is prepared. Lengths are read from the items of the base, whose column
`reference_tokens` is the number of tokens that a model must generate for the whole reference.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from forgetting.data.table_files import Row, Where
from forgetting.records import InputError
from forgetting.sections.measurement import RougeTokenizer

if TYPE_CHECKING:
    import pandas as pd

KEPT = re.compile(r"[a-z0-9]")
"""What rouge_score makes words of, after lower-casing; all else is dropped and parts words."""

NOTED, REFUSED = 0.05, 0.5
"""Shares of dropped letters above which there is a note, and above which ROUGE is refused."""

KNOWN = 0.1
"""ROUGE-L recall of the base below which a probe has next to nothing that could be forgotten."""

UNICODE = "measurement.rouge_tokenizer: unicode"


def dropped_letters(texts: Iterable[str]) -> float:
    """Return the share of letters that rouge_score drops, since they are not among a-z.

    Letters, combining marks and the digits of other scripts are counted after lower-casing. The
    digits 0-9 are not: texts of any script have them.
    """
    letters = [c for text in texts for c in text.lower() if _is_letter(c)]
    return sum(KEPT.match(c) is None for c in letters) / max(len(letters), 1)


def _is_letter(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] in "LM" or (category == "Nd" and not char.isascii())


def check_letters(
    rows: Sequence[Row], probe: str, tokenizer: RougeTokenizer, where: Where
) -> list[str]:
    """Return a note on each table of a probe if ROUGE drops part of the letters of its answers.

    Args:
        rows: those of the probe that are scored, table by table.
        where: for the messages.

    Raises:
        InputError: it drops most of them, or all of an answer.
    """
    notes = []
    for _, group in groupby(rows, key=lambda row: str(row["id"]).rpartition("/")[0]):
        answers = {row["id"]: row["answer"] for row in group}
        share = dropped_letters(answers.values()) if tokenizer == "rouge_score" else 0.0
        if share > NOTED:
            first = next(key for key, answer in answers.items() if dropped_letters([answer]))
            finding = (
                f"{share:.0%} of the letters in the answers of probe `{probe}` are not among a–z "
                f"and are dropped by the tokenizer of ROUGE (the first in {where(first)})"
            )
            if share > REFUSED:
                raise InputError(f"{finding}: its values would mean nothing; set {UNICODE}")
            notes.append(f"{finding}: its values there say little. {UNICODE} keeps them.")
        for key, answer in answers.items():
            _check_seen(answer, tokenizer, where, key)
    return notes


def _check_seen(answer: str, tokenizer: RougeTokenizer, where: Where, row_id: str) -> None:
    """Refuse an answer that has no word for ROUGE: its score would always be 0."""
    if tokenizer == "rouge_score" and not KEPT.search(answer.lower()):
        raise InputError(
            f"{where(row_id)}: `answer` has none of a–z and 0–9, of which ROUGE makes its words, "
            f"so that it would always score 0; take the row out, or set {UNICODE}"
        )
    if not any(map(str.isalnum, answer)):
        raise InputError(
            f"{where(row_id)}: `answer` has neither letters nor digits, so that its ROUGE would "
            "always be 0; take the row out"
        )


def check_references(tokens: Iterable[int], probe: str, limit: int) -> None:
    """Refuse to watch the ROUGE of answers none of which can be generated whole."""
    lengths = sorted(tokens)
    if lengths and lengths[0] > limit:
        raise InputError(
            f"measurement.max_new_tokens: all {len(lengths)} reference answers of {probe} are "
            f"longer than {limit} tokens, so that ROUGE cannot tell when they are learnt; the "
            f"longest has {lengths[-1]}"
        )


def length_notes(base_items: pd.DataFrame, limit: int) -> list[str]:
    """Return a note on each probe with answers that cannot be generated whole.

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
    return notes


def long_answer_warnings(rows: Sequence[Row], probe: str, limit: int) -> list[str]:
    """Return a warning on answers with more words than tokens are generated.

    No token spans two words. How many tokens they have is known once the base is scored.
    """
    lengths = [len(re.findall(r"\S+", row["answer"], re.ASCII)) for row in rows]
    cut = sum(length > limit for length in lengths)
    if not cut:
        return []
    return [
        f"{cut} of {len(rows)} answers of probe `{probe}` have more words than the {limit} tokens "
        f"that are generated, the longest {max(lengths)}: ROUGE recall cannot reach 1 on them; "
        "make measurement.max_new_tokens larger"
    ]


def unknown_probe_warnings(base_items: pd.DataFrame, knowledge: Mapping[str, str]) -> list[str]:
    """Return a warning on each probe of old knowledge that the base does not know."""
    means = base_items.groupby("probe")["rougeL_recall"].mean()
    return [
        f"the base itself has a ROUGE-L recall of only {means[probe]:.2f} on probe `{probe}` of "
        "old knowledge: there is next to nothing to forget, and no method will be ranked by it; "
        "take a base that knows it, or questions and a prompt that the base can answer"
        for probe, kind in knowledge.items()
        if kind == "old" and means[probe] < KNOWN
    ]
