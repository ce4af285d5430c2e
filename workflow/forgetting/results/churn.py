"""Churn: the share of answers that differ from the base's, with gains and losses.

A mean score may stay the same while half of the answers change (Kalajdzievski 2024, arXiv
2401.05605, figure 4). Let v and b be the scores in [0, 1] of a model and of the base on the items
that both answered:

- agreement: share of items with the same answer, right or wrong
- gained: mean of max(0, v - b)
- lost: mean of max(0, b - v), so that gained - lost is the change of the mean score

A checkpoint may be evaluated on a benchmark twice. A benchmark job evaluates all items (column
`evaluated_by`: `job`). The training evaluates the first items at every evaluation, and the probes
(`training`). Each has rows of its own, against the base's answers to the same items, so that a
trajectory has no gap at the selected checkpoint and its items do not change there.

Choices may be right by luck. `chance_corrected` has the correction of post-forget
(arXiv 2510.17776). It assumes that knowledge before and after is independent and that each guess is
drawn anew. A model that repeats its guess makes the corrected values too low, so the raw ones count
first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from forgetting.analysis.intervals import wilson_interval

BOUNDED = ("agreement", "gained", "lost")
CORRECTED = ("gained_corrected", "lost_corrected")
POSSIBLE = ("gained_possible", "lost_possible")
CHURN_COLUMNS = (
    *("run", "step", "epoch", "probe", "answer", "evaluated_by", "n", "value", "base_value"),
    *(f"{share}{end}" for share in (*BOUNDED, *CORRECTED) for end in ("", "_low", "_high")),
    *POSSIBLE,
)
_DRAWS = 1000
"""Resamples of items for the intervals of corrected values."""


def churn_table(
    items: pd.DataFrame,
    responses: pd.DataFrame,
    benchmark_items: pd.DataFrame,
    trajectory_items: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Return one row per evaluation of a run, probe (or benchmark) and kind of answer.

    Kinds of answer: `generated` answers are scored by ROUGE-L recall, or by a benchmark's main
    metric, and agree if their texts are equal. `choice` is the answer with the highest mean
    log-probability per token among the right answer and the wrong ones, scored 1 if right. For a
    benchmark it is the choice of the reported metric (`forgetting.benchmarks.scores`): for
    `acc_norm` the one with the highest log-probability per character.

    Args:
        items: the items of all runs and of the base, which is run `base`.
        responses: run, step, task, item, response, choice of the benchmark jobs.
        benchmark_items: run, step, task, item, value of their main metric.
        trajectory_items: the items of in-training benchmarks (`benchmark_trajectory_items`).
    """
    parts = [
        _generated_answers(items),
        _choice_answers(items),
        _benchmark_answers(responses, benchmark_items, items),
    ]
    if trajectory_items is not None:
        bounded = bounded_metrics(trajectory_items).rename(columns={"task": "probe"})
        parts.append(_response_answers(bounded, "training"))
    answers = pd.concat([part for part in parts if len(part)])
    is_base = answers["run"] == "base"
    key = ["probe", "answer", "evaluated_by", "item"]
    base = answers[is_base][[*key, "text", "score"]]
    paired = answers[~is_base].merge(base, on=key, suffixes=("", "_base"))
    group_columns = ["run", "step", "epoch", "probe", "answer", "evaluated_by"]
    groups = paired.groupby(group_columns, sort=False, dropna=False)
    rows = [
        dict(zip(CHURN_COLUMNS, (*names, *_churn_values(group)), strict=True))
        for names, group in groups
    ]
    return pd.DataFrame(rows, columns=list(CHURN_COLUMNS))


def bounded_metrics(items: pd.DataFrame) -> pd.DataFrame:
    """Return the items of those tasks and metrics whose values all lie in [0, 1].

    Other values, such as perplexities and BLEU of 0 to 100, are neither gained nor lost.
    """
    outside = ~items["value"].between(0.0, 1.0)
    return items[~outside.groupby([items["task"], items["metric"]]).transform("any")]


def _churn_values(group: pd.DataFrame) -> list[float]:
    """Return n, both means, `BOUNDED` and `CORRECTED` with their intervals, and `POSSIBLE`."""
    change = (group["score"] - group["score_base"]).to_numpy(dtype=float)
    agreement = (group["text"] == group["text_base"]).to_numpy(dtype=float)
    numbers: list[float] = [len(group), group["score"].mean(), group["score_base"].mean()]
    for values in (agreement, change.clip(min=0.0), (-change).clip(min=0.0)):
        numbers += [float(values.mean()), *wilson_interval(values)]
    columns = (group[name].to_numpy(dtype=float) for name in ("score_base", "score", "options"))
    return numbers + chance_corrected(*columns)


def chance_corrected(before: np.ndarray, after: np.ndarray, options: np.ndarray) -> list[float]:
    """Return gains and losses without those of lucky guesses, with 95 % intervals.

    Of n items with k options, let b and a be the shares right before and after. Who does not know
    guesses one of k options, so luck alone makes (1 - b)(1 - a)/(k - 1) right before and wrong
    after, and as many the reverse. It is subtracted from both shares. Items with different k are
    corrected apart and averaged. At most (k b - 1)/(k - 1) can be lost, and the same of a gained.

    The values may be below 0; arXiv 2510.17776 reports them as 0. The intervals are percentiles
    over resampled items of the values before any such cut.

    Args:
        before: scores of the base, 0 or 1.
        after: scores of the model, 0 or 1.
        options: number of options of each item, at least 2.

    Returns:
        Gained with low and high, lost with low and high, the most that can be gained and lost. All
        are NaN if an item has no options or a score between 0 and 1.
    """
    is_right = np.stack([before, after], axis=1)
    if not (np.isin(is_right, (0.0, 1.0)).all() and (options >= 2).all()):
        return [math.nan] * (3 * len(CORRECTED) + len(POSSIBLE))
    kinds, kind = np.unique(options, return_inverse=True)
    outcome = kind * 4 + (2 * before + after).astype(int)
    counts = np.bincount(outcome, minlength=4 * len(kinds))
    drawn = np.random.default_rng(0).multinomial(len(before), counts / len(before), _DRAWS)
    values = _corrected(np.vstack([counts, drawn]).reshape(-1, len(kinds), 4), kinds)
    low, high = np.quantile(values[1:], (0.025, 0.975), axis=0)
    numbers = [
        float(number) for column in zip(values[0], low, high, strict=True) for number in column
    ]
    for right in (after, before):
        shares = np.bincount(kind, right) / np.bincount(kind)
        possible = ((kinds * shares - 1) / (kinds - 1)).clip(min=0.0)
        numbers.append(float(np.average(possible, weights=np.bincount(kind))))
    return numbers


def _corrected(counts: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Return the corrected shares gained and lost, (draws, 2).

    Args:
        counts: items wrong both times, gained, lost and right both times, (draws, kinds, 4).
        kinds: number of options.
    """
    wrong, gained, lost, _ = np.moveaxis(counts, 2, 0)
    items = counts.sum(axis=2)
    lucky = (wrong + gained) * (wrong + lost) / (items.clip(min=1) * (kinds - 1))
    changed = np.stack([gained - lucky, lost - lucky], axis=2).sum(axis=1)
    shares: np.ndarray = changed / items.sum(axis=1, keepdims=True)
    return shares


def _answers(
    rows: pd.DataFrame,
    kind: str,
    texts: Sequence[Any],
    scores: Any,
    options: Any = math.nan,
) -> pd.DataFrame:
    key = rows[["run", "step", "epoch", "probe", "item"]]
    answers = key.assign(answer=kind, evaluated_by="training", text=texts, score=scores)
    return answers.assign(options=options)


def _generated_answers(items: pd.DataFrame) -> pd.DataFrame:
    rows = items.dropna(subset=["rougeL_recall"])
    texts = rows["generated"].str.split().str.join(" ")
    return _answers(rows, "generated", texts, rows["rougeL_recall"])


def _choice_answers(items: pd.DataFrame) -> pd.DataFrame:
    """Return the choices of the model; choice 0 is the right answer."""
    has_choices = [
        isinstance(wrong, list | np.ndarray) and len(wrong) > 0 for wrong in items["logprobs_wrong"]
    ]
    rows = items[has_choices]
    choices = [
        int(np.argmax([right, *wrong]))
        for right, wrong in zip(rows["logprob_right"], rows["logprobs_wrong"], strict=True)
    ]
    texts = [str(choice) for choice in choices]
    scores = [float(choice == 0) for choice in choices]
    options = [1.0 + len(wrong) for wrong in rows["logprobs_wrong"]]
    return _answers(rows, "choice", texts, scores, options)


def _benchmark_answers(
    responses: pd.DataFrame, items: pd.DataFrame, evaluations: pd.DataFrame
) -> pd.DataFrame:
    """Return the answers of the benchmark jobs, with the epochs of the models' evaluations."""
    if responses.empty or items.empty:
        return pd.DataFrame()
    key = ["run", "step", "task", "item"]
    rows = responses.merge(items[[*key, "value"]], on=key).rename(columns={"task": "probe"})
    epochs = evaluations[["run", "step", "epoch"]].drop_duplicates(["run", "step"])
    rows = rows.merge(epochs.astype({"step": rows["step"].dtype}), on=["run", "step"], how="left")
    return _response_answers(rows, "job")


def _response_answers(rows: pd.DataFrame, evaluated_by: str) -> pd.DataFrame:
    """Return the answers to benchmarks: the number of the choice, or the generated text.

    The response to a choice is a list of log-likelihoods, one for each option.
    """
    is_choice = rows["choice"].notna()
    texts = rows["response"].str.split().str.join(" ")
    texts = texts.where(~is_choice, rows["choice"].astype("string"))
    options = (rows["response"].str.count(",") + 1.0).where(is_choice)
    answers = _answers(rows, "generated", texts, rows["value"], options)
    kinds = np.where(is_choice, "choice", "generated")
    return answers.assign(answer=kinds, evaluated_by=evaluated_by)
