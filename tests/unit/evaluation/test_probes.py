"""The evaluation of a model on probes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgetting.analysis.intervals import wilson_interval
from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig
from forgetting.config.expand import Method
from forgetting.data.table_files import Row
from forgetting.data.tokenize import encode_pair, encode_prompt
from forgetting.errors import InputError
from forgetting.evaluation.metrics import PROBE_METRICS, mean_score
from forgetting.evaluation.probes import check_context_length, evaluate_probes, generate
from forgetting.evaluation.rouge import rouge_l
from forgetting.models.adapters import attach_adapter
from forgetting.models.forward import collate, token_logprobs
from forgetting.models.loading import load_base
from forgetting.results.trajectories import aggregate_items

pytestmark = pytest.mark.usefixtures("one_thread")

Rows = list[dict[str, Any]]
SETTINGS = EvaluationConfig(max_new_tokens=24, batch_size=64)
NUMBERS = [*PROBE_METRICS, "logprob_answer", "logprob_right"]


@pytest.fixture(scope="module")
def taught(
    one_thread: None,
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    rows: Rows,
) -> PreTrainedModel:
    """Return the tiny base after it memorised six of the ten answers."""
    model = load_base(base_folder, torch.device("cpu"))
    examples = [encode_pair(tokenizer, prompt, r["question"], r["answer"]) for r in rows[:6]]
    batch = collate(examples, tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = -token_logprobs(model, batch).sum() / batch.targets
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def probes(rows: Rows) -> dict[str, Rows]:
    """Return two probes, one of them without wrong answers."""
    bare = [row | {"paraphrased_answer": None, "wrong_answers": []} for row in rows[4:]]
    return {"new": rows[:7], "bare": bare}


@pytest.fixture(scope="module")
def items(
    taught: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, probes: Any
) -> pd.DataFrame:
    """Return the scores of the model that memorised answers."""
    return evaluate_probes(taught, tokenizer, probes, prompt, SETTINGS)


def test_every_question_has_one_row_in_order(items: pd.DataFrame, probes: dict[str, Rows]) -> None:
    expected = [(name, row["id"], row["question"]) for name, rows in probes.items() for row in rows]
    assert list(items[["probe", "item", "question"]].itertuples(index=False, name=None)) == expected


def test_memorised_answer_is_generated_and_ends(items: pd.DataFrame, rows: Rows) -> None:
    """A memorised answer is reproduced word for word; generation stops at the end token."""
    learnt = items[items["probe"] == "new"].head(6)
    assert learnt["generated"].tolist() == [row["answer"] for row in rows[:6]]
    assert (learnt["rougeL_recall"] == 1.0).all()
    assert (learnt["rougeL_f1"] == 1.0).all()
    assert (learnt["generated_tokens"] < SETTINGS.max_new_tokens).all()
    assert (learnt["probability"] > 0.9).all()


def test_zero_adapter_scores_equal_the_base(
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    probes: dict[str, Rows],
    tuning: Method,
) -> None:
    """A new adapter adds zero, so all items are bit-identical."""
    base = load_base(base_folder, torch.device("cpu"))
    before = evaluate_probes(base, tokenizer, probes, prompt, SETTINGS)
    adapted = attach_adapter(base, tuning, seed=3)
    after = evaluate_probes(adapted, tokenizer, probes, prompt, SETTINGS)
    pd.testing.assert_frame_equal(before, after, check_exact=True)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_changes_no_score(
    taught: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    probes: dict[str, Rows],
    items: pd.DataFrame,
    batch_size: int,
) -> None:
    settings = EvaluationConfig(max_new_tokens=24, batch_size=batch_size)
    other = evaluate_probes(taught, tokenizer, probes, prompt, settings)
    assert other["generated"].tolist() == items["generated"].tolist()
    for column in NUMBERS:
        ours, theirs = items[column].to_numpy(float), other[column].to_numpy(float)
        assert ours == pytest.approx(theirs, abs=1e-5, nan_ok=True), column


def _argmax(model: PreTrainedModel, ids: list[int], end: int, most: int) -> list[int]:
    """Return the greedy continuation of a sequence, computed without a cache."""
    tokens: list[int] = []
    while len(tokens) < most:
        logits = model(input_ids=torch.tensor([ids + tokens])).logits[0, -1]
        token = int(logits.argmax())
        if token == end:
            break
        tokens.append(token)
    return tokens


@pytest.mark.parametrize(
    "advice",
    [
        {},
        {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1},
        {"do_sample": True, "temperature": 5.0, "top_k": 50},
        {"max_length": 12, "min_new_tokens": 20},
        {"num_beams": 3, "length_penalty": 9.0},
        {"suppress_tokens": [5, 6, 7], "bad_words_ids": [[40]]},
    ],
    ids=lambda advice: next(iter(advice), "none"),
)
@torch.no_grad()
def test_generation_ignores_the_generation_config(
    taught: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
    advice: dict[str, Any],
) -> None:
    """Sampling in a model's generation_config.json does not change greedy answers."""
    for name, value in advice.items():
        monkeypatch.setattr(taught.generation_config, name, value, raising=False)
    questions = [row["question"] for row in rows]
    expected = [
        _argmax(taught, encode_prompt(tokenizer, prompt, q), tokenizer.eos_token_id, 24)
        for q in questions
    ]
    assert generate(taught, tokenizer, questions, prompt, SETTINGS) == expected


@torch.no_grad()
def test_generation_keeps_the_generation_config(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    rows: Rows,
    tuning: Method,
) -> None:
    """Checkpoints keep the generation config, so an evaluation must not change it."""
    base.generation_config.repetition_penalty = 5.0
    model = attach_adapter(base, tuning, seed=0).eval()
    question = rows[0]["question"]
    expected = _argmax(
        model, encode_prompt(tokenizer, prompt, question), tokenizer.eos_token_id, 24
    )
    assert generate(model, tokenizer, [question], prompt, SETTINGS) == [expected]
    assert base.generation_config.repetition_penalty == 5.0


def test_generated_tokens_never_exceed_the_limit(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, rows: Rows
) -> None:
    questions = [row["question"] for row in rows]
    for most in (1, 5):
        answers = generate(
            base, tokenizer, questions, prompt, EvaluationConfig(max_new_tokens=most)
        )
        assert max(map(len, answers)) == most


@torch.no_grad()
def test_logprobs_are_means_over_answer_and_end_tokens(
    taught: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    rows: Rows,
    items: pd.DataFrame,
) -> None:
    """They equal a computation of one text at a time; a paraphrase replaces the answer."""

    def mean_logprob(question: str, answer: str) -> float:
        example = encode_pair(tokenizer, prompt, question, answer)
        logits = taught(input_ids=torch.tensor([example.ids])).logits[0].double().log_softmax(-1)
        places = range(example.prompt_length, len(example.ids))
        return sum(float(logits[p - 1, example.ids[p]]) for p in places) / len(places)

    for row, item in zip(rows[:7], items.to_dict("records"), strict=False):
        question = row["question"]
        right = row["paraphrased_answer"] or row["answer"]
        wrong = [mean_logprob(question, answer) for answer in row["wrong_answers"]]
        assert item["logprob_answer"] == pytest.approx(
            mean_logprob(question, row["answer"]), abs=1e-5
        )
        assert item["logprob_right"] == pytest.approx(mean_logprob(question, right), abs=1e-5)
        assert item["logprobs_wrong"] == pytest.approx(wrong, abs=1e-5)


def test_scores_follow_from_texts_and_logprobs(items: pd.DataFrame) -> None:
    """Every score of an item can be recomputed from its row."""
    for item in items.to_dict("records"):
        assert {name: item[name] for name in ("rougeL_recall", "rougeL_f1", "rouge1_recall")} == (
            rouge_l(item["reference"], item["generated"])
        )
        p = math.exp(item["logprob_answer"])
        assert item["probability"] == pytest.approx(p)
        if item["probe"] == "bare":
            assert math.isnan(item["normalised_probability"])
            assert math.isnan(item["truth_ratio_arithmetic"])
            assert math.isnan(item["truth_ratio_geometric"])
            continue
        wrong = [math.exp(logprob) for logprob in item["logprobs_wrong"]]
        right = math.exp(item["logprob_right"])
        assert item["normalised_probability"] == pytest.approx(p / (p + sum(wrong)))
        assert item["truth_ratio_arithmetic"] == pytest.approx(sum(wrong) / len(wrong) / right)
        assert item["truth_ratio_geometric"] == pytest.approx(
            math.prod(wrong) ** (1 / len(wrong)) / right
        )


def test_aggregates_follow_from_the_items(items: pd.DataFrame) -> None:
    """They are means over questions, of max(0, 1 - R) for truth ratios."""
    table = aggregate_items(items, {"new": "new", "bare": "old"})
    assert set(table[table["probe"] == "bare"]["metric"]) == {
        "rougeL_recall",
        "rougeL_f1",
        "rouge1_recall",
        "generated_tokens",
        "probability",
    }
    assert set(table[table["probe"] == "new"]["metric"]) == set(PROBE_METRICS)
    for row in table.to_dict("records"):
        values = [float(v) for v in items[items["probe"] == row["probe"]][row["metric"]]]
        if row["metric"].startswith("truth_ratio"):
            values = [max(0.0, 1.0 - value) for value in values]
        assert row["value"] == pytest.approx(sum(values) / len(values))
        assert row["n"] == len(values)
        assert row["knowledge"] == {"new": "new", "bare": "old"}[row["probe"]]
        assert row["low"] <= row["value"] + 1e-12
        assert row["value"] <= row["high"] + 1e-12
        if row["metric"] != "generated_tokens":
            assert (row["low"], row["high"]) == wilson_interval(values)
        if row["metric"] in ("rougeL_recall", "probability"):
            assert mean_score(items, row["probe"], row["metric"]) == row["value"]


def test_evaluation_restores_the_mode_of_the_model(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    rows: Rows,
    tuning: Method,
) -> None:
    """Dropout is off in the evaluation and on in the training after it."""
    model = attach_adapter(base, tuning, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    settings = EvaluationConfig(max_new_tokens=2)
    model.train()
    first, second = (
        evaluate_probes(model, tokenizer, {"p": rows[:2]}, prompt, settings) for _ in "ab"
    )
    assert model.training
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    model.eval()
    evaluate_probes(model, tokenizer, {"p": rows[:1]}, prompt, settings)
    assert not model.training


def test_text_beyond_the_context_is_refused(
    base: Any, tokenizer: Any, prompt: PromptConfig, rows: list[Row]
) -> None:
    """Without the check some models raise an index error, and others return wrong scores."""
    room = base.config.max_position_embeddings
    with pytest.raises(InputError, match=r"evaluation\.max_new_tokens"):
        check_context_length(
            base, tokenizer, {"p": rows}, prompt, EvaluationConfig(max_new_tokens=room)
        )
    long = [rows[0] | {"answer": "word " * room}]
    with pytest.raises(InputError, match=r"^made/0 in a file: question and answer have"):
        settings = EvaluationConfig(max_new_tokens=1)
        check_context_length(
            base, tokenizer, {"p": long}, prompt, settings, lambda name: f"{name} in a file"
        )
    check_context_length(
        base, tokenizer, {"p": rows[:1]}, prompt, EvaluationConfig(max_new_tokens=1)
    )
