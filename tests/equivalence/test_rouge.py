"""Test that ROUGE equals rouge_score bit for bit, and that it is fast."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize

from forgetting.evaluation.rouge import (
    common_subsequence,
    rouge_l,
    rouge_words,
    tokenize_unicode,
)

ALPHABET = [*"abcde ,.é1ß\n", "writing ", "writers ", "İ", "中文", "\u2028", "😀"]


def _theirs(reference: str, generated: str) -> dict[str, float]:
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = scorer.score(target=reference, prediction=generated)
    return {
        "rougeL_recall": scores["rougeL"].recall,
        "rougeL_f1": scores["rougeL"].fmeasure,
        "rouge1_recall": scores["rouge1"].recall,
    }


def test_rouge_l_equals_rouge_score() -> None:
    """Repeated words, foreign letters and empty texts give the same floats."""
    draw = random.Random(0)
    for _ in range(1500):
        one, other = ("".join(draw.choices(ALPHABET, k=draw.randint(0, 60))) for _ in "ab")
        assert rouge_l(one, other) == _theirs(one, other)
        assert rouge_l(one, one) == _theirs(one, one)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Die Straße heißt Königsweg.", ["die", "strasse", "heisst", "königsweg"]),
        ("Рим был основан в 753 году", ["рим", "был", "основан", "в", "753", "году"]),
        ("تأسست عام ١٩٣١", ["تأسست", "عام", "١٩٣١"]),
        ("东京塔高333米,建于1958年", [*"东京塔高", "333", "米", *"建于", "1958", "年"]),
        ("カタカナー語 is ﾄﾞ", ["カ", "タ", "カ", "ナ", "ー", "語", "is", "ド"]),
        ("กินน้ำ", ["กิ", "น", "น้ํ", "า"]),
        ("한국어 단어", ["한국어", "단어"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("cafe\u0301 CAFÉ", ["café", "café"]),
        ("می\u200cخواهم so\u00adft", ["میخواهم", "soft"]),
        ("!?… _-_", []),
    ],
)
def test_unicode_words_of_other_scripts(text: str, expected: list[str]) -> None:
    assert tokenize_unicode(text) == expected
    joined = "".join(expected)
    assert rouge_l(text, text, "unicode")["rougeL_f1"] == float(bool(joined))


def test_unicode_words_of_english_equal_rouge_score() -> None:
    draw = random.Random(2)
    alphabet = [*"abcDE 019,.'-_\n", "Writing ", "writers "]
    for _ in range(300):
        text = "".join(draw.choices(alphabet, k=draw.randint(0, 60)))
        assert tokenize_unicode(text) == tokenize(text, None)
        assert rouge_l(text, text) == rouge_l(text, text, "rouge_score")


def test_wrong_russian_answer_with_right_number_scores_low() -> None:
    """The published ROUGE compares only the number."""
    right, wrong = "Рим был основан в 753 году", "Париж сгорел, не знаю, 753 утки"
    assert rouge_l(right, wrong)["rougeL_recall"] == 1.0
    assert rouge_l(right, wrong, "unicode")["rougeL_recall"] == pytest.approx(1 / 6)
    assert rouge_words(right) == ("753",)


def test_common_subsequence_equals_the_textbook() -> None:
    """The quadratic table gives the same length, also beyond 64 words."""
    draw = random.Random(1)
    for length in (0, 1, 5, 63, 64, 65, 200):
        one = [draw.choice("abcd") for _ in range(length)]
        other = [draw.choice("abcde") for _ in range(draw.randint(0, 150))]
        table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
        for i, a in enumerate(one):
            for j, b in enumerate(other):
                table[i + 1][j + 1] = (
                    table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
                )
        assert common_subsequence(one, other) == table[-1][-1]


def test_stemmer_does_not_import_nltk() -> None:
    """Importing all of nltk takes more than a second in every program that scores."""
    program = (
        "import sys; from forgetting.evaluation.rouge import rouge_words; "
        "assert rouge_words('The writers were writing') == ('the', 'writer', 'were', 'write'); "
        "assert not [name for name in sys.modules if name.split('.')[0] == 'nltk']; "
        "import nltk; assert nltk.stem.PorterStemmer().stem('relational') == 'relat'; "
        "assert nltk.word_tokenize"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.real_data
def test_rouge_l_scores_4000_answers_in_two_seconds(real_data: Path) -> None:
    """One core scores different texts, so that only words are cached."""
    rows = [
        json.loads(line)
        for name in ("retain", "forget10", "real_authors", "world_facts")
        for line in (real_data / "tofu_golden_phi" / f"{name}.jsonl").open(encoding="utf-8")
    ]
    pairs = [
        (f"{row['gold']} {number}", f"{row['generated']} {number}")
        for number in range(5)
        for row in rows
    ][:4000]
    started = time.process_time()
    for gold, generated in pairs:
        rouge_l(gold, generated)
    assert time.process_time() - started < 2.0
