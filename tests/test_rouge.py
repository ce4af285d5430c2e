"""ROUGE is rouge_score's, to the last bit, whatever a model writes, and fast."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from forgetting.scoring.rouge import common_subsequence, rouge

ALPHABET = [*"abcde ,.é1ß\n", "writing ", "writers ", "İ", "中文", "\u2028", "😀"]


def _theirs(reference: str, generated: str) -> dict[str, float]:
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = scorer.score(target=reference, prediction=generated)
    return {
        "rougeL_recall": scores["rougeL"].recall,
        "rougeL_f1": scores["rougeL"].fmeasure,
        "rouge1_recall": scores["rouge1"].recall,
    }


def test_equals_rouge_score_on_any_text() -> None:
    """Repeated words, foreign letters, nothing at all: the same floats."""
    draw = random.Random(0)
    for _ in range(1500):
        one, other = ("".join(draw.choices(ALPHABET, k=draw.randint(0, 60))) for _ in "ab")
        assert rouge(one, other) == _theirs(one, other)
        assert rouge(one, one) == _theirs(one, one)


def test_the_longest_common_subsequence_by_the_textbook() -> None:
    """Against the quadratic table, also beyond 64 words."""
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


@pytest.mark.real_data
def test_scores_four_thousand_answers_in_two_seconds(real_data: Path) -> None:
    """Of one core; no two texts are the same, so that nothing but words is remembered."""
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
        rouge(gold, generated)
    assert time.process_time() - started < 2.0
