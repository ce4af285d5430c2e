"""Scores a loaded model on tasks of the lm-evaluation-harness, item by item.

The harness builds the prompts, runs the model, filters the answers and computes the metrics;
this module only brings rows and model together and turns the results into tables. Programs
that the model wrote are handed out, not run (see `forgetting.benchmarks.programs` and
`forgetting.sandbox`). The harness's caches are never used: their keys name neither the model
nor the data, so they return answers of another model or prompts of other rows.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from forgetting.benchmarks.definitions import read_definition
from forgetting.benchmarks.programs import PassRate, Program
from forgetting.benchmarks.tasks import (
    BENCHMARKS,
    HARNESS_SEED,
    Sampling,
    TaskSpec,
    load_task,
    main_metric,
)
from forgetting.records import InputError

__all__ = [
    "BENCHMARKS",
    "BenchmarkResult",
    "PassRate",
    "Program",
    "Sampling",
    "TaskSpec",
    "load_task",
    "run_benchmarks",
]

BOOTSTRAPS = 1000
"""Draws behind the standard error of metrics that are no mean over items, such as perplexity."""

SCORE_COLUMNS = ("task", "metric", "main", "value", "stderr", "n", "chance")
ITEM_COLUMNS = ("task", "item", "metric", "value")
RESPONSE_COLUMNS = ("task", "item", "prompt_hash", "response", "target")


@dataclass
class BenchmarkResult:
    """Tables of one model's answers.

    scores: one row per task and metric (`SCORE_COLUMNS`); `main` marks the metric to draw,
        `stderr` is NaN for a single item.
    items: one row per task, item and metric (`ITEM_COLUMNS`), `item` being the row's number.
    responses: one row per task and item (`RESPONSE_COLUMNS`): the generated text, or the
        log-likelihoods of the choices in nats as a JSON list.
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


def run_benchmarks(
    model: Any,
    tokenizer: Any,
    specs: Sequence[TaskSpec],
    rows_dir: Path | Mapping[str, Path] | None = None,
    batch_size: int = 16,
    seed: int = HARNESS_SEED,
) -> BenchmarkResult:
    """Evaluate a loaded model (plain or with adapters) on all tasks in one pass.

    Args:
        model: a causal language model of transformers, or a PeftModel around one.
        tokenizer: its tokenizer; left as it is.
        specs: the tasks.
        rows_dir: folder of {task}/{split}.jsonl, or the folder of {split}.jsonl of each task;
            without it the rows come from the hub.
        batch_size: sequences per forward pass; changes no score.
        seed: draws the examples in the prompts (1234 is the harness's own), and the answers
            of tasks that sample.

    Raises `InputError` for what the user can mend: unknown tasks, unreadable rows, a data set
    out of reach, answers longer than the model's context.
    """
    from lm_eval.evaluator import evaluate

    with _evaluating(model, seed), _quiet():
        tasks = _load_all(specs, rows_dir, seed)
        samples = {
            spec.name: range(min(spec.limit, len(tasks[spec.name].eval_docs)))
            for spec in specs
            if spec.limit is not None
        }
        lm = _wrapped(model, tokenizer, batch_size)
        lm.seed = seed
        for name, task in tasks.items():
            _check_room(name, task, lm)
        # Tasks with programs are marked unsafe; `load_task` has taken away what would run them.
        results: Any = evaluate(
            lm=lm,
            task_dict={"tasks": tasks},
            samples=samples or None,
            confirm_run_unsafe_code=True,
            bootstrap_iters=BOOTSTRAPS,
        )
        notes = [note for name, task in tasks.items() for note in _truncations(name, task, lm)]
    return _tables(tasks, specs, results, notes)


def _load_all(
    specs: Sequence[TaskSpec], rows_dir: Path | Mapping[str, Path] | None, seed: int
) -> dict[str, Any]:
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise InputError(f"benchmarks: expected each task once, found {twice or 'no task'}")
    tasks = {}
    for spec in specs:
        folder = rows_dir / spec.name if isinstance(rows_dir, Path) else None
        if isinstance(rows_dir, Mapping):
            folder = rows_dir[spec.name]
        if folder is not None and not folder.is_dir():
            raise InputError(
                f"benchmarks, task {spec.name!r}: there is no folder {folder} with its rows as "
                "SPLIT.jsonl"
            )
        tasks[spec.name] = load_task(spec, folder, seed)
    return tasks


def _wrapped(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """The harness's view of the model. The tokenizer is copied, since it is given a pad token."""
    from forgetting.benchmarks.one_reading import OneReadingLM

    return OneReadingLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)


@contextlib.contextmanager
def _evaluating(model: Any, seed: int) -> Iterator[None]:
    """Evaluate without a trace: the mode and the random state are afterwards as before."""
    import torch

    training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            model.train(training)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's remarks out of the log; what matters of them becomes a note."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _answer_tokens(task: Any, lm: Any) -> int:
    """Tokens that the harness keeps free for a generated answer."""
    from lm_eval.models.utils import normalize_gen_kwargs

    given = copy.deepcopy(task.config.generation_kwargs or {})
    return int(normalize_gen_kwargs(given, lm.max_gen_toks)["max_gen_toks"])


def _check_room(name: str, task: Any, lm: Any) -> None:
    if task.OUTPUT_TYPE != "generate_until":
        return
    tokens = _answer_tokens(task, lm)
    if tokens >= lm.max_length:
        raise InputError(
            f"benchmarks, task {name!r}: its answers may take {tokens} tokens, but the model's "
            f"context has {lm.max_length}; set a smaller longest answer for this task"
        )


def _truncations(name: str, task: Any, lm: Any) -> list[str]:
    """A note if prompts did not fit: the harness cuts their beginning without a word."""
    generates = task.OUTPUT_TYPE == "generate_until"
    if not generates and task.OUTPUT_TYPE != "multiple_choice":
        return []
    # A likelihood is scored from the tokens before the last one, hence one token more.
    room = lm.max_length - _answer_tokens(task, lm) if generates else lm.max_length + 1
    longest: dict[int, str] = {}
    for instance in task.instances:
        text = instance.args[0] if generates else "".join(instance.args)
        longest[instance.doc_id] = max(longest.get(instance.doc_id, ""), text, key=len)
    cut = sum(_longer(text, room, lm) for text in longest.values())
    if not cut:
        return []
    kept = f", of which {lm.max_length - room} are kept for the answer" if generates else ""
    return [
        f"{name}: {cut} of {len(longest)} prompts are longer than the model's context "
        f"({lm.max_length} tokens{kept}) and lost their beginning."
    ]


def _longer(text: str, tokens: int, lm: Any) -> bool:
    """Whether a text has more tokens than that. No token is shorter than a byte, but for a few
    special ones, so that short texts need not be encoded."""
    return len(text.encode()) + 8 > tokens and len(lm.tok_encode(text)) > tokens


def _tables(
    tasks: Mapping[str, Any], specs: Sequence[TaskSpec], results: Any, notes: list[str]
) -> BenchmarkResult:
    scores: list[dict[str, Any]] = []
    items: list[dict[str, Any]] = []
    responses: list[dict[str, Any]] = []
    programs: list[Program] = []
    rates: dict[str, PassRate] = {}
    for spec in specs:
        samples = results["samples"][spec.name]
        first = samples[0]["filter"]
        responses += [_response(spec.name, s) for s in samples if s["filter"] == first]
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
        pd.DataFrame(responses, columns=list(RESPONSE_COLUMNS)),
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
    """Score of blind guessing: what is known, or for accuracy the mean of 1 / choices."""
    level = spec.chance_level
    accuracy = main_metric(spec.name, spec.metric).partition(",")[0] in ("acc", "acc_norm")
    if not math.isnan(level) or task.OUTPUT_TYPE != "multiple_choice" or not accuracy:
        return level
    # The metric of mutual information asks for every choice twice.
    twice = 2 if "acc_mutual_info" in task._metric_fn_list else 1
    shares = [twice / len(sample["resps"]) for sample in samples]
    return math.fsum(shares) / len(shares)


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
