"""Tables of what the harness found, item by item, and of what is still to be run.

Tables of what the programs of a model came to: pass@k and diversity, by item and by task.

Which choice of an item a model takes, by the metric that is reported of the task.

The harness scores one list of log-likelihoods in several ways, each of which may choose another
answer. With l the log-likelihood of a choice in nats, given the prompt, the chosen one has the
largest

- `acc_norm`: l / number of its characters
- `acc_bytes`: l / number of its bytes in UTF-8
- `acc_mutual_info`: l - its log-likelihood without the question
- every other metric, `acc` among them: l

as `ConfigurableTask.process_results` of lm-evaluation-harness 0.4 has it, the first of equals. So
an item of accuracy scores 1 exactly where the chosen one is right, and what agreement with the base
tells is of the same answers as the accuracy beside it.
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


def predicted_choice(task: Any, sample: Mapping[str, Any], metric: str) -> int | None:
    """The number of the choice; None where the model was not asked to choose.

    Of a single continuation that is scored: 1 if each of its tokens is the likeliest, else 0.

    Args:
        task: the harness's.
        sample: what it logs of an item.
        metric: `name,filter`.
    """
    if task.OUTPUT_TYPE == "loglikelihood":
        return int(sample["resps"][0][0][1])
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    likelihoods = np.array([float(answer[0][0]) for answer in sample["resps"]])
    return argmax_choice(likelihoods, task.doc_to_choice(sample["doc"]), metric.partition(",")[0])


def argmax_choice(likelihoods: np.ndarray, choices: list[str], metric: str) -> int:
    """The number of the choice that a metric takes.

    Args:
        likelihoods: of the choices in nats, (choices,); twice as many with those without the
            question behind them, which `acc_mutual_info` has the harness ask for.
    """
    with_question, without = likelihoods[: len(choices)], likelihoods[len(choices) :]
    if metric == "acc_mutual_info":
        return int(np.argmax(with_question - without))
    lengths = {
        "acc_norm": [len(choice) for choice in choices],
        "acc_bytes": [len(choice.encode()) for choice in choices],
    }
    # Of an empty choice, the harness's quotient of nothing by nothing is no number either.
    with np.errstate(divide="ignore", invalid="ignore"):
        return int(np.argmax(with_question / np.array(lengths.get(metric, 1.0), dtype=float)))


PASSING, FAILING = "distinct_passing", "distinct_failing"
"""Of several answers to an item, how many differ, among those that pass and those that fail
(Biderman et al. 2024, arXiv 2405.09673: fine-tuning makes answers alike)."""


class ProgramEnd(Protocol):
    """What is asked of an outcome."""

    @property
    def passed(self) -> bool:
        """Whether the program and its tests came to their end."""
        ...


def program_items(
    programs: Sequence[Program],
    outcomes: Sequence[ProgramEnd],
    rates: Mapping[str, PassRate] | None = None,
) -> pd.DataFrame:
    """task, item, metric, value: every pass@k of each item; of several answers the diversity too.

    Raises `ValueError` if programs and outcomes do not come in pairs.
    """
    if len(programs) != len(outcomes):
        raise ValueError(f"{len(programs)} programs, but {len(outcomes)} outcomes")
    answers: dict[tuple[str, int], list[tuple[str, bool]]] = {}
    for program, outcome in zip(programs, outcomes, strict=True):
        mine = answers.setdefault((program.task, program.item), [])
        mine.append((program.program, outcome.passed))
    rows = [
        {"task": task, "item": item, "metric": metric, "value": value}
        for (task, item), several in answers.items()
        for metric, value in _metrics(several, (rates or {}).get(task, PassRate())).items()
    ]
    return pd.DataFrame(rows, columns=["task", "item", "metric", "value"])


def _metrics(answers: Sequence[tuple[str, bool]], rate: PassRate) -> dict[str, float]:
    n, right = len(answers), sum(passed for _, passed in answers)
    found = {f"pass@{k},{rate.filter}": pass_at_k(n, right, k) for k in rate.draws if k <= n}
    if n > 1:
        for name, wanted in ((PASSING, True), (FAILING, False)):
            texts = {text for text, passed in answers if passed is wanted}
            found[f"{name},{rate.filter}"] = float(len(texts))
    return found


def score_programs(
    programs: Sequence[Program],
    outcomes: Sequence[ProgramEnd],
    rates: Mapping[str, PassRate] | None = None,
) -> pd.DataFrame:
    """Rows for the table of scores: the mean of each metric of each task over its items.

    The standard error is that of a mean, s / sqrt(n) with s the sample standard deviation
    over items, as the harness has it; it is missing where there is a single item.
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
    columns = ["task", "metric", "main", "value", "stderr", "n", "chance"]
    return pd.DataFrame(rows, columns=columns)


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
        the main metric (`forgetting.benchmarks.scores`); of a text, `choice` is missing.
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


def benchmark_tables_of(
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
            _response(spec.name, sample)
            | {"choice": predicted_choice(tasks[spec.name], sample, metric)}
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
    own = read_task_definition(spec.name)
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
