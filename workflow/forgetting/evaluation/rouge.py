"""What ROUGE does not see of a probe's reference answers: their ends, and letters beyond a-z.

Letters are counted when data is prepared. Lengths are read from the items of the base, whose column
`reference_tokens` is the number of tokens that a model must generate for the whole reference.

ROUGE of one answer, the very numbers of `rouge_score`, several times faster.

The words are rouge_score's: lower-cased, split at all that is no a-z and 0-9, Porter-stemmed when
longer than three letters. A word is stemmed once per process, and the longest common subsequence
is found for all words of the reference at once, in the bits of an integer. For languages with other
letters there is a second tokenizer, `unicode`.
"""

from __future__ import annotations

import importlib
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec, module_from_spec
from itertools import groupby
from types import ModuleType
from typing import TYPE_CHECKING

from rouge_score.tokenize import tokenize

from forgetting.config.evaluation import RougeTokenizer
from forgetting.data.table_files import Locate, Row
from forgetting.errors import InputError


def _import_porter() -> ModuleType:
    """Import nltk's module of Porter's stemmer without the rest of nltk.

    The packages above it import all of nltk, which takes more than a second in every program that
    scores. They stand in empty while the module is imported, and are removed afterwards, so that
    whoever imports nltk later gets it whole.
    """
    name = "nltk.stem.porter"
    if "nltk" in sys.modules:
        return importlib.import_module(name)
    try:
        for package in ("nltk", "nltk.stem"):
            spec = find_spec(package)
            if spec is None:
                raise ModuleNotFoundError(f"no package {package}", name=package)
            sys.modules[package] = module_from_spec(spec)
        return importlib.import_module(name)
    finally:
        for loaded in [key for key in sys.modules if key.split(".")[0] == "nltk"]:
            del sys.modules[loaded]


class _Stemmer:
    """Porter's stemmer, which is most of the time of ROUGE, with a memory."""

    def __init__(self) -> None:
        self.stem = lru_cache(maxsize=2**16)(_import_porter().PorterStemmer().stem)


_STEMMER = _Stemmer()


# References are scored against anew at every evaluation.
@lru_cache(maxsize=2**14)
def tokenize_ascii(text: str, tokenizer: RougeTokenizer = "rouge_score") -> tuple[str, ...]:
    """Return what ROUGE compares of a text."""
    return tuple(tokenize(text, _STEMMER) if tokenizer == "rouge_score" else tokenize_unicode(text))


UNSPACED_SCRIPTS = (
    "CJK ",
    "IDEOGRAPHIC ",
    "HIRAGANA ",
    "KATAKANA",
    "THAI ",
    "LAO ",
    "KHMER ",
    "MYANMAR ",
    "TAI ",
    "NEW TAI LUE ",
    "AHOM ",
)
"""How Unicode names the letters of scripts that are written without spaces between words."""

ZERO_WIDTH_SPACE = "\u200b"


def tokenize_unicode(text: str) -> list[str]:
    """Return the words of a text in any script, case-folded and not stemmed.

    A word is a run of letters, numbers and combining marks. In scripts without spaces between words
    (Unicode Standard Annex 29, section 4: Chinese, Japanese, Thai, Lao, Khmer, Burmese) every
    letter with its marks is a word, as sacrebleu's tokenizer `zh` and multilingual BERT have it for
    Chinese. Of a text in plain English these are rouge_score's words before stemming.
    """
    found: list[str] = []
    before = "gap"
    for char in unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()):
        kind = _character_kind(char)
        if kind == "nothing":
            continue
        if (kind == "letter" and before == "letter") or (kind == "mark" and before != "gap"):
            found[-1] += char
        elif kind != "gap":
            found.append(char)
        # A mark belongs to the letter before it.
        before = before if kind == "mark" and before != "gap" else kind
    return found


@lru_cache(maxsize=2**12)
def _character_kind(char: str) -> str:
    """Return what a character does in a word: letter, word, mark, nothing or gap."""
    category = unicodedata.category(char)
    if category[0] in "LN":
        return "word" if unicodedata.name(char, "").startswith(UNSPACED_SCRIPTS) else "letter"
    if category[0] == "M":
        return "mark"
    return "nothing" if category == "Cf" and char != ZERO_WIDTH_SPACE else "gap"


def rouge_l(
    reference: str, generated: str, tokenizer: RougeTokenizer = "rouge_score"
) -> dict[str, float]:
    """ROUGE of a generated answer against the true one, each in [0, 1].

    ROUGE-L recall = LCS(reference, generated) / |reference|, in words (Lin 2004); the score of the
    papers. Recall forgives any length, so F1 stands beside it. ROUGE-1 counts common words in any
    order.
    """
    target, answer = tokenize_ascii(reference, tokenizer), tokenize_ascii(generated, tokenizer)
    common = common_subsequence(target, answer)
    precision, recall = common / max(len(answer), 1), common / max(len(target), 1)
    unigrams = sum((Counter(target) & Counter(answer)).values())
    return {
        "rougeL_recall": recall,
        "rougeL_f1": 2 * precision * recall / (precision + recall) if common else 0.0,
        "rouge1_recall": unigrams / max(len(target), 1),
    }


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, one addition for each word of the second.

    Bit i of `rest` is 0 where the longest subsequence common to one[:i+1] and the words so far is
    longer than that of one[:i] (Hyyrö 2004, *Bit-parallel LCS-length computation revisited*).
    """
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    every = rest = (1 << len(one)) - 1
    for word in other:
        matched = rest & places.get(word, 0)
        rest = ((rest + matched) | (rest - matched)) & every
    return len(one) - rest.bit_count()


if TYPE_CHECKING:
    import pandas as pd

TOKENIZED_LETTERS = re.compile(r"[a-z0-9]")
"""What rouge_score makes words of, after lower-casing; all else is dropped and parts words."""

NOTED, REFUSED = 0.05, 0.5
"""Shares of dropped letters above which there is a note, and above which ROUGE is refused."""

KNOWS_FRACTION = 0.1
"""ROUGE-L recall of the base below which a probe has next to nothing that could be forgotten."""

UNICODE = "evaluation.rouge_tokenizer: unicode"


def dropped_letters(texts: Iterable[str]) -> float:
    """Return the share of letters that rouge_score drops, since they are not among a-z.

    Letters, combining marks and the digits of other scripts are counted after lower-casing. The
    digits 0-9 are not: texts of any script have them.
    """
    letters = [c for text in texts for c in text.lower() if _is_letter(c)]
    return sum(TOKENIZED_LETTERS.match(c) is None for c in letters) / max(len(letters), 1)


def _is_letter(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] in "LM" or (category == "Nd" and not char.isascii())


def check_letters(
    rows: Sequence[Row], probe: str, tokenizer: RougeTokenizer, where: Locate
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
            _check_dropped_fraction(answer, tokenizer, where, key)
    return notes


def _check_dropped_fraction(
    answer: str, tokenizer: RougeTokenizer, where: Locate, row_id: str
) -> None:
    """Refuse an answer that has no word for ROUGE: its score would always be 0."""
    if tokenizer == "rouge_score" and not TOKENIZED_LETTERS.search(answer.lower()):
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
            f"evaluation.max_new_tokens: all {len(lengths)} reference answers of {probe} are "
            f"longer than {limit} tokens, so that ROUGE cannot tell when they are learnt; the "
            f"longest has {lengths[-1]}"
        )


def length_notes(base_items: pd.DataFrame, limit: int) -> list[str]:
    """Return a note on each probe with answers that cannot be generated whole.

    Args:
        base_items: probe, reference and reference_tokens of every question.
        limit: the study's evaluation.max_new_tokens.
    """
    notes = []
    asked = base_items.dropna(subset=["reference"])
    for probe, group in asked.groupby("probe", sort=False):
        name, cut = str(probe).replace("_", " "), int((group["reference_tokens"] > limit).sum())
        if cut:
            notes.append(
                f"{cut} of {len(group)} reference answers of {name} are longer than the {limit} "
                "tokens that are generated (evaluation.max_new_tokens): ROUGE recall cannot "
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
        "make evaluation.max_new_tokens larger"
    ]


def unknown_probe_warnings(base_items: pd.DataFrame, knowledge: Mapping[str, str]) -> list[str]:
    """Return a warning on each probe of old knowledge that the base does not know."""
    means = base_items.groupby("probe")["rougeL_recall"].mean()
    return [
        f"the base itself has a ROUGE-L recall of only {means[probe]:.2f} on probe `{probe}` of "
        "old knowledge: there is next to nothing to forget, and no method will be ranked by it; "
        "take a base that knows it, or questions and a prompt that the base can answer"
        for probe, kind in knowledge.items()
        if kind == "old" and means[probe] < KNOWS_FRACTION
    ]
