"""Churn: how many answers are no longer the base's own, with gains and losses apart.

A score may stand still while half the answers change hands (Kalajdzievski 2024, arXiv 2401.05605,
figure 4). Of the items that a model and the base answered, with v and b their scores in [0, 1]:

- agreement: share of items with the same answer, be it right or wrong
- gained: mean of max(0, v - b)
- lost: mean of max(0, b - v), so that gained - lost is the change of the mean score

A benchmark may be asked twice of a checkpoint: of all its items by a benchmark job (column `asked`:
`job`), and of its first items by the training, at every evaluation (`training`, as the probes
are). Both have rows of their own, each against the base's answers to the same items, so that
neither the course has a gap at the selected checkpoint nor its items change there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from forgetting.analysis.intervals import wilson_interval

BOUNDED = ("agreement", "gained", "lost")
COLUMNS = (
    *("run", "step", "epoch", "probe", "answer", "asked", "n", "value", "base_value"),
    *(f"{share}{end}" for share in BOUNDED for end in ("", "_low", "_high")),
)


def churn_table(
    items: pd.DataFrame,
    responses: pd.DataFrame,
    benchmark_items: pd.DataFrame,
    course: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """One row per evaluation of a run, probe (or benchmark) and kind of answer.

    Kinds of answer: `generated`, scored by ROUGE-L recall (on benchmarks by the main metric), and
    the same only if the text is; `choice`, the likeliest per token of the right answer and the
    wrong ones, scored 1 if right. Of a benchmark's choices it is the one that the reported metric
    takes (`forgetting.benchmarks.scores`): of `acc_norm` the likeliest per character.

    Args:
        items: the items of all runs, the base among them as run `base`.
        responses: run, step, task, item, response, choice of the benchmark jobs.
        benchmark_items: run, step, task, item, value of their main metric.
        course: what benchmarks were asked at every evaluation (`course.course_items`).
    """
    parts = [
        _generated_answers(items),
        _choice_answers(items),
        _benchmarks(responses, benchmark_items, items),
    ]
    if course is not None:
        asked = _response_rows(bounded_metrics(course).rename(columns={"task": "probe"}))
        parts.append(asked.assign(asked="training"))
    answered = pd.concat([part for part in parts if len(part)])
    is_base = answered["run"] == "base"
    key = ["probe", "answer", "asked", "item"]
    base = answered[is_base][[*key, "said", "score"]]
    paired = answered[~is_base].merge(base, on=key, suffixes=("", "_base"))
    place = ["run", "step", "epoch", "probe", "answer", "asked"]
    groups = paired.groupby(place, sort=False, dropna=False)
    rows = [dict(zip(COLUMNS, (*where, *_bounded(group)), strict=True)) for where, group in groups]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def bounded_metrics(items: pd.DataFrame) -> pd.DataFrame:
    """The items of benchmarks and metrics all of whose values are shares of right answers.

    Others, such as perplexities and BLEU of 0 to 100, are neither gained nor lost.
    """
    others = ~items["value"].between(0.0, 1.0)
    return items[~others.groupby([items["task"], items["metric"]]).transform("any")]


def _bounded(group: pd.DataFrame) -> list[float]:
    change = (group["score"] - group["score_base"]).to_numpy(dtype=float)
    found: list[float] = [len(group), group["score"].mean(), group["score_base"].mean()]
    agreement = (group["said"] == group["said_base"]).to_numpy(dtype=float)
    for values in (agreement, change.clip(min=0.0), (-change).clip(min=0.0)):
        found += [float(values.mean()), *wilson_interval(values)]
    return found


def _answers(rows: pd.DataFrame, kind: str, said: Sequence[Any], score: Any) -> pd.DataFrame:
    kept = rows[["run", "step", "epoch", "probe", "item"]]
    return kept.assign(answer=kind, asked="training", said=said, score=score)


def _generated_answers(items: pd.DataFrame) -> pd.DataFrame:
    rows = items.dropna(subset=["rougeL_recall"])
    said = rows["generated"].str.split().str.join(" ")
    return _answers(rows, "generated", said, rows["rougeL_recall"])


def _choice_answers(items: pd.DataFrame) -> pd.DataFrame:
    """Answer 0 is the right one."""
    asked = [
        isinstance(wrong, list | np.ndarray) and len(wrong) > 0 for wrong in items["logprobs_wrong"]
    ]
    rows = items[asked]
    choices = [
        int(np.argmax([right, *wrong]))
        for right, wrong in zip(rows["logprob_right"], rows["logprobs_wrong"], strict=True)
    ]
    said = [str(choice) for choice in choices]
    return _answers(rows, "choice", said, [float(choice == 0) for choice in choices])


def _benchmarks(
    responses: pd.DataFrame, items: pd.DataFrame, evaluated: pd.DataFrame
) -> pd.DataFrame:
    """The answers that benchmark jobs have, with the epochs of the evaluations of these models."""
    if responses.empty or items.empty:
        return pd.DataFrame()
    key = ["run", "step", "task", "item"]
    rows = responses.merge(items[[*key, "value"]], on=key).rename(columns={"task": "probe"})
    epochs = evaluated[["run", "step", "epoch"]].drop_duplicates(["run", "step"])
    rows = rows.merge(epochs.astype({"step": rows["step"].dtype}), on=["run", "step"], how="left")
    return _response_rows(rows).assign(asked="job")


def _response_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """What benchmarks were answered: the number of a choice, or what was written."""
    was_choice = rows["choice"].notna()
    texts = rows["response"].str.split().str.join(" ")
    said = texts.where(~was_choice, rows["choice"].astype("string"))
    answered = _answers(rows, "generated", said, rows["value"])
    return answered.assign(answer=np.where(was_choice, "choice", "generated"))
