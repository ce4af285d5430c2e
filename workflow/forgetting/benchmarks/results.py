"""Tables of what the harness found, item by item, and of what is still to be run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from forgetting.benchmarks.choices import chosen
from forgetting.benchmarks.definitions import read_definition
from forgetting.benchmarks.known import main_metric
from forgetting.benchmarks.programs import PassRate, Program
from forgetting.benchmarks.tasks import TaskSpec

SCORE_COLUMNS = ("task", "metric", "main", "value", "stderr", "n", "chance")
ITEM_COLUMNS = ("task", "item", "metric", "value")
RESPONSE_COLUMNS = ("task", "item", "prompt_hash", "response", "target", "choice")
UNLIKELY = -1e6
"""Log-likelihood of a choice that a blind guesser does not take; its probability is 0."""


@dataclass
class BenchmarkResult:
    """Tables of one model's answers.

    scores: one row per task and metric (`SCORE_COLUMNS`); `main` marks the metric to draw,
        `stderr` is NaN for a single item.
    items: one row per task, item and metric (`ITEM_COLUMNS`), `item` being the row's number.
    responses: one row per task and item (`RESPONSE_COLUMNS`): the generated text, or the
        log-likelihoods of the choices in nats as a JSON list, whose chosen one is `choice`, by
        the main metric (`forgetting.benchmarks.choices`); of a text, `choice` is missing.
    programs: what is still to be run; their tasks have no rows in scores and items yet.
    rates: how the programs of each task are scored.
    notes: sentences on what deviates from the protocol.
    examples: solved examples in the prompts of each task.
    versions: of each task's definition, as the harness has them.
    """

    scores: pd.DataFrame
    items: pd.DataFrame
    responses: pd.DataFrame
    programs: list[Program] = field(default_factory=list)
    rates: dict[str, PassRate] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    examples: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def tables_of(
    tasks: Mapping[str, Any], specs: Sequence[TaskSpec], results: Any, notes: list[str]
) -> BenchmarkResult:
    """What the harness's `evaluate` returned, with its samples, as tables and programs."""
    scores: list[dict[str, Any]] = []
    items: list[dict[str, Any]] = []
    responses: list[dict[str, Any]] = []
    programs: list[Program] = []
    rates: dict[str, PassRate] = {}
    for spec in specs:
        samples = results["samples"][spec.name]
        first, metric = samples[0]["filter"], main_metric(spec.name, spec.metric)
        responses += [
            _response(spec.name, sample) | {"choice": chosen(tasks[spec.name], sample, metric)}
            for sample in samples
            if sample["filter"] == first
        ]
        if getattr(tasks[spec.name], "UNSAFE_CODE", False):
            for sample in samples:
                programs += _programs(spec.name, sample)
            rates[spec.name] = _pass_rate(spec)
        else:
            chance = _chance(spec, tasks[spec.name], samples)
            scores += _score_rows(spec, results["results"][spec.name], chance)
            items += [row for sample in samples for row in _item_rows(spec.name, sample)]
    return BenchmarkResult(
        pd.DataFrame(scores, columns=list(SCORE_COLUMNS)),
        pd.DataFrame(items, columns=list(ITEM_COLUMNS)),
        pd.DataFrame(responses, columns=list(RESPONSE_COLUMNS)).astype({"choice": "Int64"}),
        programs,
        rates,
        notes,
        {name: int(task.config.num_fewshot) for name, task in tasks.items()},
        {name: str(task.VERSION) for name, task in tasks.items()},
    )


def _pass_rate(spec: TaskSpec) -> PassRate:
    """The k that the study names; else those of the definition, or 1 where the study samples."""
    own = read_definition(spec.name)
    draws = spec.draws or (own.draws if spec.sampling is None else (1,))
    return PassRate(draws, own.filters[0])


def _chance(spec: TaskSpec, task: Any, samples: Sequence[Mapping[str, Any]]) -> float:
    """Return the score of blind guessing: what is known, or for accuracies what the task gives.

    A guesser puts all probability on one choice, drawn at random; the task scores each choice. For
    plain accuracy the mean is 1 / choices; for TruthfulQA's mc2 it is the share of true answers.
    """
    level, metric = spec.chance_level, main_metric(spec.name, spec.metric).partition(",")[0]
    accuracy = metric in ("acc", "acc_norm")
    if not math.isnan(level) or task.OUTPUT_TYPE != "multiple_choice" or not accuracy:
        return level
    # The metric of mutual information also scores every choice without its question.
    without_question = "acc_mutual_info" in task._metric_fn_list
    means = []
    for sample in samples:
        choices = len(sample["resps"]) // (2 if without_question else 1)
        rest = [(0.0, False)] * (len(sample["resps"]) - choices)
        guesses = [
            [(0.0 if choice == guess else UNLIKELY, False) for choice in range(choices)] + rest
            for guess in range(choices)
        ]
        scored = [task.process_results(sample["doc"], guess)[metric] for guess in guesses]
        means.append(math.fsum(scored) / choices)
    return math.fsum(means) / len(means)


def _score_rows(spec: TaskSpec, result: Mapping[str, Any], chance: float) -> list[dict[str, Any]]:
    metrics = [
        key
        for key, value in result.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    ]
    main = main_metric(spec.name, spec.metric)
    if main not in metrics:  # a definition whose own functions name the metrics
        main = next(iter(metrics), "")
    rows = []
    for key in metrics:
        metric, _, kind = key.partition(",")
        error = result.get(f"{metric}_stderr,{kind}")
        rows.append(
            {
                "task": spec.name,
                "metric": key,
                "main": key == main,
                "value": float(result[key]),
                "stderr": float(error) if isinstance(error, int | float) else math.nan,
                "n": int(result["sample_len"]),
                "chance": chance,
            }
        )
    return rows


def _item_rows(task: str, sample: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for metric in sample["metrics"]:
        if isinstance(sample[metric], int | float):
            yield {
                "task": task,
                "item": int(sample["doc_id"]),
                "metric": f"{metric},{sample['filter']}",
                "value": float(sample[metric]),
            }


def _response(task: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    first = sample["resps"][0][0]
    if isinstance(first, str):
        answers = sample["resps"][0]
        text = first if len(answers) == 1 else json.dumps(answers, ensure_ascii=False)
    elif isinstance(first, Sequence):
        text = json.dumps([float(choice[0][0]) for choice in sample["resps"]])
    else:
        text = json.dumps(first)
    return {
        "task": task,
        "item": int(sample["doc_id"]),
        "prompt_hash": sample["prompt_hash"],
        "response": text,
        "target": str(sample["target"]),
    }


def _programs(task: str, sample: Mapping[str, Any]) -> list[Program]:
    """Every answer to one item as a program with its tests, as the task's own filter built it."""
    answers = sample["filtered_resps"][0]
    item = int(sample["doc_id"])
    task_id = str(sample["doc"].get("task_id", f"{task}/{item}"))
    return [
        Program(task, task_id, item, number, program, str(sample["target"]))
        for number, program in enumerate([answers] if isinstance(answers, str) else answers)
    ]
