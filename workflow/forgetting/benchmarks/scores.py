"""Turn the harness's output into tables of scores, items and responses, and score programs.

The harness scores one list of log-likelihoods in several ways, and each may choose another answer.
With l the log-likelihood of a choice in nats, given the prompt, the predicted choice maximises

- `acc_norm`: l / its number of characters
- `acc_bytes`: l / its number of UTF-8 bytes
- `acc_mutual_info`: l - its log-likelihood without the question
- every other metric, such as `acc`: l

as in `ConfigurableTask.process_results` of lm-evaluation-harness 0.4; of equal choices the first is
taken. So an accuracy item scores 1 exactly where the predicted choice is right, and agreement with
the base refers to the same answers as the accuracy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pandas as pd

from forgetting.benchmarks.programs import PassRate, Program, pass_at_k
from forgetting.benchmarks.registry import main_metric
from forgetting.benchmarks.task_definitions import read_task_definition
from forgetting.benchmarks.tasks import TaskSpec

SCORE_COLUMNS = ("task", "metric", "main", "value", "stderr", "n", "chance")
ITEM_COLUMNS = ("task", "item", "metric", "value")
RESPONSE_COLUMNS = ("task", "item", "prompt_hash", "response", "target", "choice")
UNLIKELY = -1e6
"""Log-likelihood of a choice that a blind guesser does not take; its probability is 0."""


def predicted_choice(task: Any, sample: Mapping[str, Any], metric: str) -> int | None:
    """Return the index of the predicted choice; None if the task has no choices.

    For a task that scores a single continuation: 1 if greedy decoding gives it, otherwise 0.

    Args:
        task: the harness's task.
        sample: the harness's log of one item.
        metric: `name,filter`.
    """
    if task.OUTPUT_TYPE == "loglikelihood":
        return int(sample["resps"][0][0][1])
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    likelihoods = np.array([float(answer[0][0]) for answer in sample["resps"]])
    return argmax_choice(likelihoods, task.doc_to_choice(sample["doc"]), metric.partition(",")[0])


def argmax_choice(likelihoods: np.ndarray, choices: list[str], metric: str) -> int:
    """Return the index of the choice that maximises a metric's score.

    Args:
        likelihoods: log-likelihoods of the choices in nats, (choices,). For `acc_mutual_info` those
            without the question follow, (2 * choices,).
        choices: the texts.
        metric: the name without filter.
    """
    conditional, unconditional = likelihoods[: len(choices)], likelihoods[len(choices) :]
    if metric == "acc_mutual_info":
        return int(np.argmax(conditional - unconditional))
    lengths = {
        "acc_norm": [len(choice) for choice in choices],
        "acc_bytes": [len(choice.encode()) for choice in choices],
    }
    # The harness divides by zero for an empty choice, too.
    with np.errstate(divide="ignore", invalid="ignore"):
        return int(np.argmax(conditional / np.array(lengths.get(metric, 1.0), dtype=float)))


PASSING, FAILING = "distinct_passing", "distinct_failing"
"""Numbers of distinct answers to an item among those that pass and those that fail (Biderman et al.
2024, arXiv 2405.09673: fine-tuning reduces the diversity of answers)."""


class ProgramEnd(Protocol):
    """Outcome of a program."""

    @property
    def passed(self) -> bool:
        """Return whether the program and its tests finished without an exception."""
        ...


def program_items(
    programs: Sequence[Program],
    outcomes: Sequence[ProgramEnd],
    rates: Mapping[str, PassRate] | None = None,
) -> pd.DataFrame:
    """Return every pass@k of each item and, for several answers, their diversity.

    Returns:
        Columns task, item, metric, value.

    Raises:
        ValueError: the numbers of programs and outcomes differ.
    """
    if len(programs) != len(outcomes):
        raise ValueError(f"{len(programs)} programs, but {len(outcomes)} outcomes")
    answers: dict[tuple[str, int], list[tuple[str, bool]]] = {}
    for program, outcome in zip(programs, outcomes, strict=True):
        of_item = answers.setdefault((program.task, program.item), [])
        of_item.append((program.program, outcome.passed))
    rows = [
        {"task": task, "item": item, "metric": metric, "value": value}
        for (task, item), of_item in answers.items()
        for metric, value in _program_metrics(of_item, (rates or {}).get(task, PassRate())).items()
    ]
    return pd.DataFrame(rows, columns=list(ITEM_COLUMNS))


def _program_metrics(answers: Sequence[tuple[str, bool]], rate: PassRate) -> dict[str, float]:
    n, correct = len(answers), sum(passed for _, passed in answers)
    metrics = {f"pass@{k},{rate.filter}": pass_at_k(n, correct, k) for k in rate.draws if k <= n}
    if n > 1:
        for name, passing in ((PASSING, True), (FAILING, False)):
            texts = {text for text, passed in answers if passed is passing}
            metrics[f"{name},{rate.filter}"] = float(len(texts))
    return metrics


def score_programs(
    programs: Sequence[Program],
    outcomes: Sequence[ProgramEnd],
    rates: Mapping[str, PassRate] | None = None,
) -> pd.DataFrame:
    """Return the mean of each metric of each task over its items, in `SCORE_COLUMNS`.

    The standard error is s / sqrt(n) with s the sample standard deviation over items, as in the
    harness. It is missing for a single item.
    """
    rows = []
    main: set[str] = set()
    items = program_items(programs, outcomes, rates)
    for (task, metric), group in items.groupby(["task", "metric"], sort=False):
        values = group["value"].to_numpy(dtype=float)
        n = len(values)
        error = float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
        rows.append(
            {
                "task": task,
                "metric": metric,
                "main": task not in main,
                "value": float(values.mean()),
                "stderr": error,
                "n": n,
                "chance": 0.0 if str(metric).startswith("pass@") else math.nan,
            }
        )
        main.add(str(task))
    return pd.DataFrame(rows, columns=list(SCORE_COLUMNS))


@dataclass
class BenchmarkResult:
    """Tables of one model's answers.

    Attributes:
        scores: one row per task and metric (`SCORE_COLUMNS`). `main` marks the metric to plot;
            `stderr` is NaN for a single item.
        items: one row per task, item and metric (`ITEM_COLUMNS`); `item` is the row's number.
        responses: one row per task and item (`RESPONSE_COLUMNS`). `response` is the generated text,
            or the log-likelihoods of the choices in nats as a JSON list. `choice` is the choice
            that the main metric predicts; it is missing for a text.
        programs: programs to run; their tasks have no rows in scores and items yet.
        rates: scoring of the programs, by task.
        notes: sentences about deviations from the protocol.
        examples: number of solved examples in the prompts, by task.
        versions: the harness's version of each task's definition.
    """

    scores: pd.DataFrame
    items: pd.DataFrame
    responses: pd.DataFrame
    programs: list[Program] = field(default_factory=list)
    rates: dict[str, PassRate] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    examples: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def benchmark_tables_of(
    tasks: Mapping[str, Any], specs: Sequence[TaskSpec], results: Any, notes: list[str]
) -> BenchmarkResult:
    """Return the output of the harness's `evaluate` as tables and programs."""
    scores: list[dict[str, Any]] = []
    items: list[dict[str, Any]] = []
    responses: list[dict[str, Any]] = []
    programs: list[Program] = []
    rates: dict[str, PassRate] = {}
    for spec in specs:
        samples = results["samples"][spec.name]
        first, metric = samples[0]["filter"], main_metric(spec.name, spec.metric)
        responses += [
            _response(spec.name, sample)
            | {"choice": predicted_choice(tasks[spec.name], sample, metric)}
            for sample in samples
            if sample["filter"] == first
        ]
        if getattr(tasks[spec.name], "UNSAFE_CODE", False):
            for sample in samples:
                programs += _programs_of_item(spec.name, sample)
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
    """Return how a task is scored: by the k of the study, or of the definition, or by pass@1."""
    definition = read_task_definition(spec.name)
    draws = spec.draws or (definition.draws if spec.sampling is None else (1,))
    return PassRate(draws, definition.filters[0])


def _chance(spec: TaskSpec, task: Any, samples: Sequence[Mapping[str, Any]]) -> float:
    """Return the score of blind guessing, computed by the task if the level is unknown.

    A guesser puts all probability on one random choice; the task scores each guess. The mean is
    1 / choices for plain accuracy, and the share of true answers for TruthfulQA's mc2.
    """
    level, metric = spec.chance_level, main_metric(spec.name, spec.metric).partition(",")[0]
    accuracy = metric in ("acc", "acc_norm")
    if not math.isnan(level) or task.OUTPUT_TYPE != "multiple_choice" or not accuracy:
        return level
    # With mutual information, every choice is also scored without its question.
    has_unconditional = "acc_mutual_info" in task._metric_fn_list
    means = []
    for sample in samples:
        choices = len(sample["resps"]) // (2 if has_unconditional else 1)
        unconditional = [(0.0, False)] * (len(sample["resps"]) - choices)
        guesses = [
            [(0.0 if choice == guess else UNLIKELY, False) for choice in range(choices)]
            + unconditional
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
    if main not in metrics:  # the definition's own functions name the metrics
        main = next(iter(metrics), "")
    rows = []
    for key in metrics:
        metric, _, filter_name = key.partition(",")
        error = result.get(f"{metric}_stderr,{filter_name}")
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


def _programs_of_item(task: str, sample: Mapping[str, Any]) -> list[Program]:
    """Return every answer to one item as the task's filter builds it: a program with its tests."""
    answers = sample["filtered_resps"][0]
    item = int(sample["doc_id"])
    task_id = str(sample["doc"].get("task_id", f"{task}/{item}"))
    return [
        Program(task, task_id, item, number, program, str(sample["target"]))
        for number, program in enumerate([answers] if isinstance(answers, str) else answers)
    ]
