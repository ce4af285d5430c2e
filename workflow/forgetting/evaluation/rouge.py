"""ROUGE of one answer, and checks of what ROUGE cannot measure on reference answers.

The scores equal those of `rouge_score`, several times faster. Its words are lower-cased runs of a-z
and 0-9; words longer than three letters are Porter-stemmed. Each word is stemmed once per process,
and the longest common subsequence is computed bit-parallel. A second tokenizer, `unicode`, serves
languages with other letters.

ROUGE misses letters beyond a-z and the ends of long references. Letters are counted when data is
prepared. Lengths come from the base's items: `reference_tokens` is the number of tokens that a
model must generate for the whole reference.
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
from forgetting.data.table_files import Locate, Row, table_of_row
from forgetting.errors import InputError


def _import_porter() -> ModuleType:
    """Import nltk's module of Porter's stemmer without the rest of nltk.

    The packages above it import all of nltk, which takes more than a second in every program that
    scores. Empty packages replace them during the import and are removed afterwards, so that a
    later import of nltk is complete.
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
    """Porter's stemmer with a cache, because stemming takes most of the time of ROUGE."""

    def __init__(self) -> None:
        self.stem = lru_cache(maxsize=2**16)(_import_porter().PorterStemmer().stem)


_STEMMER = _Stemmer()


# Every evaluation tokenizes the same references.
@lru_cache(maxsize=2**14)
def rouge_words(text: str, tokenizer: RougeTokenizer = "rouge_score") -> tuple[str, ...]:
    """Return the words of a text that ROUGE compares."""
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
"""Prefixes of the Unicode names of letters whose scripts have no spaces between words."""

ZERO_WIDTH_SPACE = "\u200b"


def tokenize_unicode(text: str) -> list[str]:
    """Return the words of a text in any script, case-folded and not stemmed.

    A word is a run of letters, numbers and combining marks. In scripts without spaces between words
    (Unicode Standard Annex 29, section 4: Chinese, Japanese, Thai, Lao, Khmer, Burmese) every
    letter with its marks is a word, as in sacrebleu's tokenizer `zh` and multilingual BERT. Plain
    English gives rouge_score's words before stemming.
    """
    words: list[str] = []
    previous = "gap"
    for char in unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()):
        kind = _character_kind(char)
        if kind == "nothing":
            continue
        if (kind == "letter" and previous == "letter") or (kind == "mark" and previous != "gap"):
            words[-1] += char
        elif kind != "gap":
            words.append(char)
        # A mark belongs to the letter before it.
        previous = previous if kind == "mark" and previous != "gap" else kind
    return words


@lru_cache(maxsize=2**12)
def _character_kind(char: str) -> str:
    """Return the role of a character in a word: letter, word, mark, nothing or gap."""
    category = unicodedata.category(char)
    if category[0] in "LN":
        return "word" if unicodedata.name(char, "").startswith(UNSPACED_SCRIPTS) else "letter"
    if category[0] == "M":
        return "mark"
    return "nothing" if category == "Cf" and char != ZERO_WIDTH_SPACE else "gap"


def rouge_l(
    reference: str, generated: str, tokenizer: RougeTokenizer = "rouge_score"
) -> dict[str, float]:
    """Return ROUGE of a generated answer against the reference, each value in [0, 1].

    ROUGE-L recall = LCS(reference, generated) / |reference|, in words (Lin 2004), is the score of
    the papers. Recall does not penalise long answers, so F1 is returned, too. ROUGE-1 counts common
    words in any order.
    """
    target, answer = rouge_words(reference, tokenizer), rouge_words(generated, tokenizer)
    common = common_subsequence(target, answer)
    precision, recall = common / max(len(answer), 1), common / max(len(target), 1)
    unigrams = sum((Counter(target) & Counter(answer)).values())
    return {
        "rougeL_recall": recall,
        "rougeL_f1": 2 * precision * recall / (precision + recall) if common else 0.0,
        "rouge1_recall": unigrams / max(len(target), 1),
    }


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, with one addition per word of `other`.

    Bit i of `bits` is 0 if the longest subsequence common to one[:i+1] and the words so far is
    longer than that of one[:i] (Hyyrö 2004, *Bit-parallel LCS-length computation revisited*).
    """
    occurrences: dict[str, int] = {}
    for position, word in enumerate(one):
        occurrences[word] = occurrences.get(word, 0) | 1 << position
    all_bits = bits = (1 << len(one)) - 1
    for word in other:
        matched = bits & occurrences.get(word, 0)
        bits = ((bits + matched) | (bits - matched)) & all_bits
    return len(one) - bits.bit_count()


if TYPE_CHECKING:
    import pandas as pd

TOKENIZED_LETTERS = re.compile(r"[a-z0-9]")
"""The characters of rouge_score's words, after lower-casing; all others separate words."""

NOTE_ABOVE, REFUSE_ABOVE = 0.05, 0.5
"""Fractions of dropped letters above which there is a note, and above which ROUGE is refused."""

KNOWS_FRACTION = 0.1
"""Minimal ROUGE-L recall of the base on a probe that can show forgetting."""

UNICODE = "evaluation.rouge_tokenizer: unicode"


def dropped_letters(texts: Iterable[str]) -> float:
    """Return the fraction of letters that rouge_score drops because they are not a-z.

    Letters, combining marks and the digits of other scripts are counted after lower-casing. The
    digits 0-9 are not counted, because texts of any script have them.
    """
    letters = [c for text in texts for c in text.lower() if _is_letter(c)]
    return sum(TOKENIZED_LETTERS.match(c) is None for c in letters) / max(len(letters), 1)


def _is_letter(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] in "LM" or (category == "Nd" and not char.isascii())


def check_letters(
    rows: Sequence[Row], probe: str, tokenizer: RougeTokenizer, source_line: Locate
) -> list[str]:
    """Return a note on each table of a probe if ROUGE drops part of the letters of its answers.

    Args:
        rows: the scored rows of the probe, table by table.
        probe: its name.
        tokenizer: ROUGE's tokenizer.
        source_line: returns file and line of a row, for the messages.

    Raises:
        InputError: ROUGE drops most letters of a table, or all of an answer.
    """
    notes = []
    for _, group in groupby(rows, key=lambda row: table_of_row(row["id"])):
        answers = {row["id"]: row["answer"] for row in group}
        fraction = dropped_letters(answers.values()) if tokenizer == "rouge_score" else 0.0
        if fraction > NOTE_ABOVE:
            first = next(key for key, answer in answers.items() if dropped_letters([answer]))
            finding = (
                f"{fraction:.0%} of the letters in the answers of probe `{probe}` are not among "
                f"a–z and are dropped by the tokenizer of ROUGE (the first in {source_line(first)})"
            )
            if fraction > REFUSE_ABOVE:
                raise InputError(f"{finding}: its values would mean nothing; set {UNICODE}")
            notes.append(f"{finding}: its values there say little. {UNICODE} keeps them.")
        for key, answer in answers.items():
            _check_has_words(answer, tokenizer, source_line, key)
    return notes


def _check_has_words(
    answer: str, tokenizer: RougeTokenizer, source_line: Locate, row_id: str
) -> None:
    """Raise `InputError` if an answer has no word for ROUGE, so that it always scores 0."""
    if tokenizer == "rouge_score" and not TOKENIZED_LETTERS.search(answer.lower()):
        raise InputError(
            f"{source_line(row_id)}: `answer` has none of the characters of ROUGE's words, a–z and "
            f"0–9, so that it would always score 0; remove the row, or set {UNICODE}"
        )
    if not any(map(str.isalnum, answer)):
        raise InputError(
            f"{source_line(row_id)}: `answer` has neither letters nor digits, so that its ROUGE "
            "would always be 0; remove the row"
        )


def check_references(tokens: Iterable[int], probe: str, limit: int) -> None:
    """Raise `InputError` if all reference answers are too long to be generated.

    Args:
        tokens: length of each reference.
        probe: the probe whose ROUGE selects the checkpoint.
        limit: the study's evaluation.max_new_tokens.
    """
    lengths = sorted(tokens)
    if lengths and lengths[0] > limit:
        raise InputError(
            f"evaluation.max_new_tokens: all {len(lengths)} reference answers of {probe} are "
            f"longer than {limit} tokens, so that ROUGE cannot show when they are learnt; the "
            f"longest has {lengths[-1]}"
        )


def length_notes(base_items: pd.DataFrame, limit: int) -> list[str]:
    """Return a note on each probe with answers that are too long to be generated.

    Args:
        base_items: probe, reference and reference_tokens of every question.
        limit: the study's evaluation.max_new_tokens.
    """
    notes = []
    questions = base_items.dropna(subset=["reference"])
    for probe, group in questions.groupby("probe", sort=False):
        name, cut = str(probe).replace("_", " "), int((group["reference_tokens"] > limit).sum())
        if cut:
            notes.append(
                f"{cut} of {len(group)} reference answers of {name} are longer than the {limit} "
                "tokens that are generated (evaluation.max_new_tokens): ROUGE recall cannot "
                "reach 1 on them."
            )
    return notes


def long_answer_warnings(rows: Sequence[Row], probe: str, limit: int) -> list[str]:
    """Return a warning if answers have more words than `limit`, the tokens that are generated.

    No token spans two words. The number of tokens is known once the base is evaluated.
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
    """Return a warning on each probe of retained knowledge that the base does not know."""
    means = base_items.groupby("probe")["rougeL_recall"].mean()
    return [
        f"the base itself has a ROUGE-L recall of only {means[probe]:.2f} on probe `{probe}` of "
        "old knowledge: there is next to nothing to forget, and no method will be ranked by it; "
        "take a base that knows it, or questions and a prompt that the base can answer"
        for probe, kind in knowledge.items()
        if kind == "old" and means[probe] < KNOWS_FRACTION
    ]
