"""Scores equal TOFU's: on its logs, by hand, and by invariants."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from forgetting.config.evaluation import ALL_PROBES
from forgetting.evaluation.metrics import (
    AnsweredQuestion,
    item_scores,
    normalised_probability,
    question_scores,
    truth_ratio_arithmetic,
    truth_ratio_geometric,
)
from forgetting.evaluation.rouge import rouge_l
from forgetting.results.trajectories import aggregate_items

LOGS = ["retain", "forget10", "real_authors", "world_facts"]
KNOWLEDGE = {"retain": "new", "real_authors": "old", "world_facts": "old"}
METRICS = (
    "rougeL_recall",
    "probability",
    "normalised_probability",
    "truth_ratio_geometric",
    "truth_ratio_arithmetic",
)
# Means over the first 300, all 100, all 117 questions: ROUGE-L recall, p(a), normalised p, truth
# ratio by geometric and by arithmetic mean; as printed for TOFU's own Phi-1.5, weight decay 0.01.
PUBLISHED = {
    "retain": (0.9293, 0.9261, None, 0.4827, 0.4591),
    "real_authors": (0.4157, 0.0729, 0.3774, 0.4560, 0.4039),
    "world_facts": (0.7774, 0.0396, 0.4090, 0.4923, 0.4380),
}


def _scores(
    answer: float,
    right: float,
    wrong: list[float],
    reference: str = "",
    generated: str = "",
) -> dict[str, float]:
    """Return all scores of a question, given log-probabilities of its answers and its text."""
    rouge = rouge_l(reference, generated)
    return question_scores(AnsweredQuestion(reference, generated, 0, rouge, answer, right, wrong))


@pytest.fixture(scope="module")
def logs(real_data: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the logged answers and losses of TOFU's fine-tuned Phi-1.5 per question."""
    folder = real_data / "tofu_golden_phi"
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").open(encoding="utf-8")]
        for name in LOGS
    }


@pytest.mark.real_data
@pytest.mark.parametrize("name", LOGS)
def test_rouge_equals_the_logged_recalls_exactly(
    logs: dict[str, list[dict[str, Any]]], name: str
) -> None:
    for item in logs[name]:
        scores = rouge_l(item["gold"], item["generated"])
        assert scores["rougeL_recall"] == item["rougeL_recall"]
        assert scores["rouge1_recall"] == item["rouge1_recall"]


@pytest.mark.real_data
@pytest.mark.parametrize("name", LOGS)
def test_logged_truth_ratio_equals_the_geometric_one(
    logs: dict[str, list[dict[str, Any]]], name: str
) -> None:
    """It is R = exp(right loss - mean wrong loss), which falls as knowledge grows, not 1/R."""
    for item in logs[name]:
        wrong = [-loss for loss in item["average_perturb_loss"]]
        ours = truth_ratio_geometric(-item["avg_paraphrased_loss"], wrong)
        assert ours == pytest.approx(item["truth_ratio"], rel=1e-5)


@pytest.mark.real_data
@pytest.mark.parametrize("name", LOGS)
def test_logged_losses_are_means_over_tokens(
    logs: dict[str, list[dict[str, Any]]], name: str
) -> None:
    """A loss times its number of tokens is the sum of -log p of the answer."""
    for item in logs[name]:
        ours = _scores(-item["gt_loss"] / item["num_token_gt"], 0.0, [])
        assert ours["probability"] == pytest.approx(math.exp(-item["avg_gt_loss"]), rel=1e-5)
        sums = zip(item["perturb_loss"], item["num_token_perturb"], strict=True)
        means = [loss / tokens for loss, tokens in sums]
        assert means == pytest.approx(item["average_perturb_loss"], rel=1e-5)


@pytest.fixture(scope="module")
def table(logs: dict[str, list[dict[str, Any]]]) -> pd.DataFrame:
    """Return the rows of the trajectory for TOFU's model."""
    items = [
        {
            "probe": name,
            "item": f"{name}/{number}",
            **_scores(
                -item["avg_gt_loss"],
                -item["avg_paraphrased_loss"],
                [-loss for loss in item["average_perturb_loss"]],
                item["gold"],
                item["generated"],
            ),
        }
        for name in KNOWLEDGE
        for number, item in enumerate(logs[name])
    ]
    return aggregate_items(pd.DataFrame(items), KNOWLEDGE)


@pytest.mark.real_data
@pytest.mark.parametrize("name", PUBLISHED)
def test_means_equal_the_published_table(table: pd.DataFrame, name: str) -> None:
    """Logged losses give the printed digits."""
    values = table[table["probe"] == name].set_index("metric")["value"]
    for metric, published in zip(METRICS, PUBLISHED[name], strict=True):
        if published is not None:
            assert round(float(values[metric]), 4) == published, metric


@pytest.mark.real_data
def test_model_utility_equals_the_published_one(table: pd.DataFrame) -> None:
    """It has nine scores of retain, real authors and world facts, with the geometric ratio."""
    row = table[(table["probe"] == ALL_PROBES) & (table["metric"] == "model_utility_geometric")]
    assert round(float(row["value"].iloc[0]), 4) == 0.5221
    assert int(row["n"].iloc[0]) == 517


@pytest.mark.parametrize(
    ("reference", "generated", "recall", "f1", "unigrams"),
    [
        # 3 of 4 reference tokens in order; 3 of 5 generated ones: F1 = 2 * .75 * .6 / 1.35.
        ("the cat sat down", "the black cat sat still", 0.75, 2 / 3, 0.75),
        # In reverse order the longest common subsequence has one token; unigrams are unchanged.
        ("red green blue", "blue green red", 1 / 3, 1 / 3, 1.0),
        # Case and punctuation do not count, and the stemmer unites forms of a word.
        ("Writers, writing!", "writer write", 1.0, 1.0, 1.0),
        ("Paris", "", 0.0, 0.0, 0.0),
        # A long answer lowers F1 and not recall.
        ("Paris", "Paris " + "is a town " * 10, 1.0, 2 * (1 / 31) / (1 + 1 / 31), 1.0),
    ],
)
def test_rouge_by_hand(
    reference: str, generated: str, recall: float, f1: float, unigrams: float
) -> None:
    scores = rouge_l(reference, generated)
    assert scores["rougeL_recall"] == pytest.approx(recall)
    assert scores["rougeL_f1"] == pytest.approx(f1)
    assert scores["rouge1_recall"] == pytest.approx(unigrams)


def test_probabilities_and_ratios_by_hand() -> None:
    """p(right) = 1/2, p(wrong) = 1/4 and 1/16."""
    right, wrong = math.log(1 / 2), [math.log(1 / 4), math.log(1 / 16)]
    assert normalised_probability(right, wrong) == pytest.approx((1 / 2) / (1 / 2 + 5 / 16))
    assert truth_ratio_arithmetic(right, wrong) == pytest.approx((5 / 32) / (1 / 2))
    assert truth_ratio_geometric(right, wrong) == pytest.approx((1 / 8) / (1 / 2))


def test_question_scores_use_answer_and_paraphrase() -> None:
    """p is of the answer and R of the paraphrase; without wrong answers there is no R."""
    answer, right, wrong = math.log(1 / 8), math.log(1 / 2), [math.log(1 / 4), math.log(1 / 16)]
    scores = _scores(answer, right, wrong)
    assert {name: scores[name] for name in METRICS[1:]} == pytest.approx(
        {
            "probability": 1 / 8,
            "normalised_probability": (1 / 8) / (1 / 8 + 5 / 16),
            "truth_ratio_arithmetic": (5 / 32) / (1 / 2),
            "truth_ratio_geometric": (1 / 8) / (1 / 2),
        }
    )
    alone = _scores(answer, right, [])
    assert alone["probability"] == pytest.approx(1 / 8)
    assert all(math.isnan(alone[name]) for name in METRICS[2:])


def test_geometric_ratio_never_exceeds_the_arithmetic() -> None:
    draw = random.Random(0)
    for _ in range(500):
        right = -draw.expovariate(0.5)
        wrong = [-draw.expovariate(0.3) for _ in range(draw.randint(1, 5))]
        geometric, arithmetic = (
            truth_ratio_geometric(right, wrong),
            truth_ratio_arithmetic(right, wrong),
        )
        assert geometric <= arithmetic * (1 + 1e-12)
        assert 0 <= normalised_probability(right, wrong) <= 1


def test_truth_ratios_agree_on_equal_wrong_answers() -> None:
    for wrong in ([-1.5], [-1.5] * 3):
        assert truth_ratio_geometric(-0.7, wrong) == pytest.approx(
            truth_ratio_arithmetic(-0.7, wrong)
        )
    # One wrong answer as likely as the right one: no knowledge, R = 1, half the probability.
    assert truth_ratio_arithmetic(-2.0, [-2.0]) == 1.0
    assert normalised_probability(-2.0, [-2.0]) == 0.5


@pytest.mark.parametrize(
    ("right", "wrong", "added"),
    [
        (-5000.0, [-10.0, -20.0], 0.0),
        (-5000.0, [-6000.0, -10.0], 0.0),
        (-5000.0, [-9000.0, -8000.0], 1.0),
        (-1.0, [-9000.0, -8000.0], 1.0),
    ],
)
def test_diverged_model_is_scored(right: float, wrong: list[float], added: float) -> None:
    """Losses of thousands of nats per token, as after a too high learning rate, raise no error."""
    assert normalised_probability(right, wrong) == pytest.approx(added)
    for ratio in (truth_ratio_arithmetic, truth_ratio_geometric):
        assert max(0.0, 1.0 - ratio(right, wrong)) == pytest.approx(added)


def test_nan_logprobs_give_nan_scores() -> None:
    """Weights that are NaN give NaN, neither 0 nor 1."""
    for right, wrong in ((math.nan, [-1.0, -2.0]), (-1.0, [math.nan, -2.0])):
        for score in (normalised_probability, truth_ratio_arithmetic, truth_ratio_geometric):
            assert math.isnan(score(right, wrong))


def test_item_scores_of_truth_ratios() -> None:
    items = pd.DataFrame(
        {"truth_ratio_arithmetic": [0.25, 1.0, 4.0, math.nan], "rougeL_recall": [0.1, 0.2, 0.3, 1]}
    )
    assert item_scores(items, "truth_ratio_arithmetic").dropna().tolist() == [0.75, 0.0, 0.0]
    assert item_scores(items, "rougeL_recall").tolist() == [0.1, 0.2, 0.3, 1.0]
