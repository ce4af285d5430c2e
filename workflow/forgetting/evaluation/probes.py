"""Score a model on question-answer probes: one row per question, its text and all its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig
from forgetting.data.table_files import Locate, Row
from forgetting.data.tables import strip_answer
from forgetting.data.tokenize import (
    Example,
    encode_pair,
    encode_prompt,
    resolve_template,
    turn_ending,
)
from forgetting.errors import InputError
from forgetting.evaluation.generation import generate_greedy, stop_tokens
from forgetting.evaluation.metrics import answer_scores
from forgetting.evaluation.prefix_tree import answer_logprobs, supports_custom_mask
from forgetting.evaluation.rouge import rouge_l
from forgetting.models.forward import collate, context_length, length_batches, token_logprobs
from forgetting.models.loading import Model


def evaluate_probes(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    probes: Mapping[str, list[Row]],
    prompt: PromptConfig,
    settings: EvaluationConfig,
) -> pd.DataFrame:
    """Score every question of every probe.

    Returns:
        One row per question with probe, item, question, reference, generated (after the literal
        text of the answer template was taken off), the columns of `scores.PROBE_SCORES`
        (`truth_ratio_*` is the ratio R itself; NaN without wrong answers) and the mean
        log-probabilities per token they follow from: logprob_answer, logprob_right,
        logprobs_wrong (nats).
    """
    rows = [row for probe in probes.values() for row in probe]
    names = [name for name, probe in probes.items() for _ in probe]
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        answers = generate(model, tokenizer, [row["question"] for row in rows], prompt, settings)
        logprobs = _answer_logprobs(model, tokenizer, rows, prompt, settings)
    model.train(was_training)
    return pd.DataFrame(
        [
            {"probe": name, **_score_items(row, answer, scored, prompt, tokenizer, settings)}
            for name, row, answer, scored in zip(names, rows, answers, logprobs, strict=True)
        ]
    )


def check_context_length(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    probes: Mapping[str, list[Row]],
    prompt: PromptConfig,
    settings: EvaluationConfig,
    where: Locate = str,
) -> None:
    """Refuse what is longer than the model can read, before it fails or scores nonsense.

    Args:
        where: for the message.
    """
    room = context_length(model)
    if room is None:
        return
    for row in (row for probe in probes.values() for row in probe):
        head = len(encode_prompt(tokenizer, prompt, row["question"]))
        texts = [row["answer"], row["paraphrased_answer"] or "", *row["wrong_answers"]]
        longest = max(
            len(encode_pair(tokenizer, prompt, row["question"], text).ids) for text in texts
        )
        if longest > room:
            raise InputError(
                f"{where(row['id'])}: question and answer have {longest} tokens, the model reads "
                f"{room}; shorten or remove the row"
            )
        if head + settings.max_new_tokens > room:
            raise InputError(
                f"evaluation.max_new_tokens: {settings.max_new_tokens} after the {head} tokens of "
                f"the question in {where(row['id'])} are more than the {room} that the model "
                f"reads; take at most {room - head}"
            )


def generate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    prompt: PromptConfig,
    settings: EvaluationConfig,
) -> list[list[int]]:
    """Greedy answers as token ids, each up to the end of sequence or, with a chat template, the end
    of the turn, which are left out."""
    prompts = [encode_prompt(tokenizer, prompt, question) for question in questions]
    end = turn_ending(tokenizer, prompt) if prompt.chat else None
    stops = stop_tokens(model, tokenizer)
    if end and end.token is not None:
        stops |= {end.token}
    answers = generate_greedy(
        model,
        prompts,
        settings.max_new_tokens,
        settings.batch_size,
        stops,
        tokenizer.pad_token_id,
    )
    if end and end.stop:
        answers = [_prompt_of(tokenizer, answer, end.stop) for answer in answers]
    return answers


def _prompt_of(tokenizer: PreTrainedTokenizerBase, answer: list[int], stop: str) -> list[int]:
    """The tokens of an answer up to a text; it may begin within one of them."""
    text, found, _ = tokenizer.decode(answer, skip_special_tokens=True).partition(stop)
    if not found:
        return answer
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _answer_logprobs(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    prompt: PromptConfig,
    settings: EvaluationConfig,
) -> list[list[float]]:
    """Per row: mean log-probabilities of the answer, of the paraphrase if any, of wrong answers."""
    texts = [
        [row["answer"], *filter(None, [row["paraphrased_answer"]]), *row["wrong_answers"]]
        for row in rows
    ]
    questions = [
        [encode_pair(tokenizer, prompt, row["question"], text) for text in several]
        for row, several in zip(rows, texts, strict=True)
    ]
    pad, size = tokenizer.pad_token_id, settings.batch_size
    if supports_custom_mask(model):
        return answer_logprobs(model, questions, pad, size)
    means = iter(mean_logprobs(model, [e for several in questions for e in several], pad, size))
    return [[next(means) for _ in several] for several in questions]


def mean_logprobs(
    model: Model, examples: Sequence[Example], pad: int, batch_size: int
) -> list[float]:
    """Mean log-probability per target token of each example, in nats."""
    means = [0.0] * len(examples)
    for indices in length_batches([len(example.ids) for example in examples], batch_size):
        batch = collate([examples[index] for index in indices], pad, model.device)
        totals = token_logprobs(model, batch).double().sum(dim=1)
        for index, total in zip(indices, totals.tolist(), strict=True):
            means[index] = total / examples[index].targets
    return means


def _score_items(
    row: Row,
    generated: list[int],
    logprobs: list[float],
    prompt: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationConfig,
) -> dict[str, object]:
    said = tokenizer.decode(generated, skip_special_tokens=True)
    text = strip_answer(resolve_template(tokenizer, prompt), said)
    answer = logprobs[0]
    right = logprobs[1] if row["paraphrased_answer"] else answer
    wrong = logprobs[2 if row["paraphrased_answer"] else 1 :]
    return {
        "item": row["id"],
        "question": row["question"],
        "reference": row["answer"],
        "generated": text,
        **rouge_l(row["answer"], text, settings.rouge_tokenizer),
        "generated_tokens": float(len(generated)),
        **answer_scores(answer, right, wrong),
        "logprob_answer": answer,
        "logprob_right": right,
        "logprobs_wrong": wrong,
    }
