"""ROUGE of one answer, the very numbers of `rouge_score`, several times faster.

The words are rouge_score's: lower-cased, split at all that is no a-z and 0-9, Porter-stemmed when
longer than three letters. A word is stemmed once per process, and the longest common subsequence
is found for all words of the reference at once, in the bits of an integer. For languages with other
letters there is a second tokenizer, `unicode`.
"""

from __future__ import annotations

import importlib
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec, module_from_spec
from types import ModuleType

from rouge_score.tokenize import tokenize

from forgetting.sections.measurement import RougeTokenizer


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
def words(text: str, tokenizer: RougeTokenizer = "rouge_score") -> tuple[str, ...]:
    """Return what ROUGE compares of a text."""
    return tuple(tokenize(text, _STEMMER) if tokenizer == "rouge_score" else unicode_words(text))


UNSPACED = (
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


def unicode_words(text: str) -> list[str]:
    """Return the words of a text in any script, case-folded and not stemmed.

    A word is a run of letters, numbers and combining marks. In scripts without spaces between words
    (Unicode Standard Annex 29, section 4: Chinese, Japanese, Thai, Lao, Khmer, Burmese) every
    letter with its marks is a word, as sacrebleu's tokenizer `zh` and multilingual BERT have it for
    Chinese. Of a text in plain English these are rouge_score's words before stemming.
    """
    found: list[str] = []
    before = "gap"
    for char in unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()):
        kind = _kind(char)
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
def _kind(char: str) -> str:
    """Return what a character does in a word: letter, word, mark, nothing or gap."""
    category = unicodedata.category(char)
    if category[0] in "LN":
        return "word" if unicodedata.name(char, "").startswith(UNSPACED) else "letter"
    if category[0] == "M":
        return "mark"
    return "nothing" if category == "Cf" and char != ZERO_WIDTH_SPACE else "gap"


def rouge(
    reference: str, generated: str, tokenizer: RougeTokenizer = "rouge_score"
) -> dict[str, float]:
    """ROUGE of a generated answer against the true one, each in [0, 1].

    ROUGE-L recall = LCS(reference, generated) / |reference|, in words (Lin 2004); the score of the
    papers. Recall forgives any length, so F1 stands beside it. ROUGE-1 counts common words in any
    order.
    """
    target, answer = words(reference, tokenizer), words(generated, tokenizer)
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
