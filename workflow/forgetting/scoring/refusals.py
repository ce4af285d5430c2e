"""Does a model refuse? Answers to harmful prompts, told apart by what refusals say.

Kalajdzievski 2024 (arXiv 2401.05605) counts how many of the base's refusals of AdvBench are lost in
fine-tuning, by hand. Here a matcher tells them, `refusal_phrases.begins_as_refusal`: metric
`refused`. Beside it stands `refused_keywords`, the share of answers that have one of the keywords
of Zou et al. 2023 (arXiv 2307.15043) anywhere, as published work counts. A matcher of phrases errs
both ways, so that the answers are kept for review.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pandas as pd
from transformers import PreTrainedTokenizerBase

from forgetting.data.rows import strip_answer
from forgetting.data.table_files import Row, Where
from forgetting.encoding.chat import literal
from forgetting.encoding.encode import encode_prompt
from forgetting.models.loading import Model
from forgetting.records import InputError
from forgetting.scoring.forward import context_length
from forgetting.scoring.probes import generate
from forgetting.scoring.refusal_phrases import begins_as_refusal, has_refusal_keyword
from forgetting.sections.measurement import Measurement
from forgetting.sections.prompt import Prompt
from forgetting.sections.refusals import REFUSALS, Refusals

METRIC = "refused"
KEYWORD_METRIC = "refused_keywords"


def ask(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    prompt: Prompt,
    settings: Refusals,
    batch_size: int,
    where: Where = str,
) -> pd.DataFrame:
    """Answers to the prompts: task, item, prompt, prompt_hash, response, and 1 or 0 by each metric.

    Raises:
        InputError: a prompt and its answer are longer than the model reads.
    """
    _check_room(model, tokenizer, rows, prompt, settings, where)
    measurement = Measurement(max_new_tokens=settings.max_new_tokens, batch_size=batch_size)
    was_training = model.training
    model.eval()
    answers = generate(model, tokenizer, [row["question"] for row in rows], prompt, measurement)
    model.train(was_training)
    around = literal(tokenizer, prompt)
    said = [
        strip_answer(around, tokenizer.decode(tokens, skip_special_tokens=True))
        for tokens in answers
    ]
    return pd.DataFrame(
        {
            "task": REFUSALS,
            "item": range(len(rows)),
            "prompt": [row["question"] for row in rows],
            "prompt_hash": [hashlib.sha256(row["question"].encode()).hexdigest() for row in rows],
            "response": said,
            "target": "",
            "choice": pd.array([pd.NA] * len(rows), dtype="Int64"),
            METRIC: [float(begins_as_refusal(text)) for text in said],
            KEYWORD_METRIC: [float(has_refusal_keyword(text)) for text in said],
        }
    )


def items(answers: pd.DataFrame) -> pd.DataFrame:
    """A row for each answer and metric: task, item, metric, value."""
    metrics = [METRIC, KEYWORD_METRIC]
    return answers.melt(["task", "item"], metrics, var_name="metric", value_name="value")


def scores(answers: pd.DataFrame) -> list[dict[str, object]]:
    """Rows of the table of scores: the share of refused prompts, and its standard error."""
    return [
        {
            "task": REFUSALS,
            "metric": metric,
            "main": metric == METRIC,
            "value": float(answers[metric].mean()),
            "stderr": float(answers[metric].sem()),
            "n": len(answers),
            "chance": float("nan"),
        }
        for metric in (METRIC, KEYWORD_METRIC)
    ]


def _check_room(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    prompt: Prompt,
    settings: Refusals,
    where: Where,
) -> None:
    room = context_length(model)
    if room is None:
        return
    for row in rows:
        tokens = len(encode_prompt(tokenizer, prompt, row["question"]))
        if tokens + settings.max_new_tokens > room:
            raise InputError(
                f"benchmarks.refusals.max_new_tokens: {settings.max_new_tokens} after the {tokens} "
                f"tokens of the question in {where(row['id'])} are more than the {room} that the "
                f"model reads; take at most {room - tokens}"
            )
