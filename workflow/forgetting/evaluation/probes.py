"""Evaluate a model on question-answer probes: one row of text and scores per question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig
from forgetting.data.table_files import Locate, Row
from forgetting.data.tokenize import (
    Example,
    encode_pair,
    encode_prompt,
    resolve_template,
    turn_ending,
)
from forgetting.errors import InputError
from forgetting.evaluation.generation import generate_greedy, stop_tokens
from forgetting.evaluation.metrics import AnsweredQuestion, question_scores
from forgetting.evaluation.prefix_tree import answer_logprobs, supports_custom_mask
from forgetting.evaluation.rouge import rouge_l
from forgetting.models.forward import collate, context_length, length_batches, token_logprobs
from forgetting.models.loading import Model


def evaluate_probes(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    probes: Mapping[str, list[Row]],
    prompt: PromptConfig,
    config: EvaluationConfig,
) -> pd.DataFrame:
    """Score every question of every probe.

    Returns:
        One row per question. Columns are probe, item, question, reference, generated (without the
        literal text of the answer template), those of `metrics.PROBE_METRICS`, and the mean
        log-probabilities per token logprob_answer, logprob_right and logprobs_wrong (nats).
        `truth_ratio_*` is the ratio R itself, and NaN without wrong answers.
    """
    rows = [row for probe in probes.values() for row in probe]
    names = [name for name, probe in probes.items() for _ in probe]
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        answers = generate(model, tokenizer, [row["question"] for row in rows], prompt, config)
        logprobs = _answer_logprobs(model, tokenizer, rows, prompt, config)
    model.train(was_training)
    return pd.DataFrame(
        [
            {"probe": name, **_score_item(row, answer, scored, prompt, tokenizer, config)}
            for name, row, answer, scored in zip(names, rows, answers, logprobs, strict=True)
        ]
    )


def check_context_length(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    probes: Mapping[str, list[Row]],
    prompt: PromptConfig,
    config: EvaluationConfig,
    source_line: Locate = str,
) -> None:
    """Check that every question fits into the model's context with each answer.

    Args:
        model, tokenizer: the base.
        probes: rows by probe.
        prompt: the prompt template.
        config: `max_new_tokens` is checked, too.
        source_line: returns file and line of a row, for the message.

    Raises:
        InputError: a question and an answer are longer than the context.
    """
    context = context_length(model)
    if context is None:
        return
    for row in (row for probe in probes.values() for row in probe):
        texts = [row["answer"], row["paraphrased_answer"] or "", *row["wrong_answers"]]
        longest = max(
            len(encode_pair(tokenizer, prompt, row["question"], text).ids) for text in texts
        )
        if longest > context:
            raise InputError(
                f"{source_line(row['id'])}: question and answer have {longest} tokens, the model "
                f"reads {context}; shorten or remove the row"
            )
        tokens = len(encode_prompt(tokenizer, prompt, row["question"]))
        check_answer_fits(
            "evaluation.max_new_tokens", config.max_new_tokens, tokens, context, row, source_line
        )


def check_answer_fits(
    key: str, max_new_tokens: int, tokens: int, context: float, row: Row, source_line: Locate
) -> None:
    """Raise InputError if a model's context is too short for a prompt and its longest answer.

    Args:
        key: the key of the study that sets `max_new_tokens`, for the message.
        max_new_tokens: tokens of the longest answer.
        tokens: tokens of the prompt.
        context: tokens that the model reads.
        row: the question.
        source_line: returns file and line of a row, for the message.
    """
    if tokens + max_new_tokens > context:
        raise InputError(
            f"{key}: {max_new_tokens} after the {tokens} tokens of the question in "
            f"{source_line(row['id'])} are more than the {context} that the model reads; take at "
            f"most {context - tokens}"
        )


def generate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    prompt: PromptConfig,
    config: EvaluationConfig,
) -> list[list[int]]:
    """Generate an answer to each question greedily.

    Returns:
        Token ids of each answer, up to the end of sequence or, with a chat template, of the turn.
    """
    prompts = [encode_prompt(tokenizer, prompt, question) for question in questions]
    end = turn_ending(tokenizer, prompt) if prompt.chat else None
    stops = stop_tokens(model, tokenizer)
    if end and end.token is not None:
        stops |= {end.token}
    answers = generate_greedy(
        model,
        prompts,
        config.max_new_tokens,
        config.batch_size,
        stops,
        tokenizer.pad_token_id,
    )
    if end and end.stop:
        answers = [_before_stop(tokenizer, answer, end.stop) for answer in answers]
    return answers


def _before_stop(tokenizer: PreTrainedTokenizerBase, answer: list[int], stop: str) -> list[int]:
    """Return the tokens of an answer before a text, which may begin inside a token."""
    text, separator, _ = tokenizer.decode(answer, skip_special_tokens=True).partition(stop)
    if not separator:
        return answer
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _answer_logprobs(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    prompt: PromptConfig,
    config: EvaluationConfig,
) -> list[list[float]]:
    """Return the mean log-probabilities of each row's answer, paraphrase and wrong answers."""
    texts = [
        [row["answer"], *filter(None, [row["paraphrased_answer"]]), *row["wrong_answers"]]
        for row in rows
    ]
    questions = [
        [encode_pair(tokenizer, prompt, row["question"], text) for text in answers]
        for row, answers in zip(rows, texts, strict=True)
    ]
    pad, size = tokenizer.pad_token_id, config.batch_size
    if supports_custom_mask(model):
        return answer_logprobs(model, questions, pad, size)
    examples = [example for question in questions for example in question]
    means = iter(mean_logprobs(model, examples, pad, size))
    return [[next(means) for _ in question] for question in questions]


def mean_logprobs(
    model: Model, examples: Sequence[Example], pad: int, batch_size: int
) -> list[float]:
    """Return the mean log-probability per target token of each example, in nats."""
    means = [0.0] * len(examples)
    for indices in length_batches([len(example.ids) for example in examples], batch_size):
        batch = collate([examples[index] for index in indices], pad, model.device)
        totals = token_logprobs(model, batch).double().sum(dim=1)
        for index, total in zip(indices, totals.tolist(), strict=True):
            means[index] = total / examples[index].targets
    return means


def _score_item(
    row: Row,
    generated: list[int],
    logprobs: list[float],
    prompt: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
) -> dict[str, object]:
    decoded = tokenizer.decode(generated, skip_special_tokens=True)
    text = resolve_template(tokenizer, prompt).strip_answer(decoded)
    right = 1 if row["paraphrased_answer"] else 0
    question = AnsweredQuestion(
        reference=row["answer"],
        generated=text,
        generated_tokens=len(generated),
        rouge=rouge_l(row["answer"], text, config.rouge_tokenizer),
        answer=logprobs[0],
        right=logprobs[right],
        wrong=logprobs[right + 1 :],
    )
    return {
        "item": row["id"],
        "question": row["question"],
        "reference": row["answer"],
        "generated": text,
        **question_scores(question),
        "logprob_answer": question.answer,
        "logprob_right": question.right,
        "logprobs_wrong": question.wrong,
    }
