"""Evaluate a loaded model on tasks of the lm-evaluation-harness, item by item.

The harness builds the prompts, runs the model, filters the answers and computes the metrics. This
module connects rows and model and turns the results into tables. Programs that the model wrote are
returned, not run (see `forgetting.benchmarks.programs` and `forgetting.benchmarks.sandbox`).

The harness's caches are never used. Their keys name neither the model nor the data, so they return
answers of another model or prompts of other rows.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from forgetting.benchmarks.scores import BenchmarkResult, benchmark_tables_of
from forgetting.benchmarks.tasks import HARNESS_SEED, TaskSpec, load_task
from forgetting.errors import InputError

BOOTSTRAP_SAMPLES = 1000
"""Bootstrap samples for the standard error of metrics such as perplexity, which are not means."""


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks that are loaded once for all models of a tokenizer.

    Attributes:
        specs: the tasks as the study configures them.
        tasks: the harness's tasks, by name.
        tokenizer: the tokenizer of all models.
        batch_size: sequences per forward pass.
        seed: seed of the examples in prompts and of sampled answers.
        encoded: tokens of each pair of context and continuation; the first evaluation fills it.
    """

    specs: Sequence[TaskSpec]
    tasks: dict[str, Any]
    tokenizer: Any
    batch_size: int
    seed: int
    encoded: dict[tuple[str, str], tuple[list[int], list[int]]] = field(default_factory=dict)


def run_benchmarks(
    model: Any,
    tokenizer: Any,
    specs: Sequence[TaskSpec],
    rows_dir: Path | Mapping[str, Path] | None = None,
    batch_size: int = 16,
    seed: int = HARNESS_SEED,
) -> BenchmarkResult:
    """Load tasks and evaluate a model on them; see `load_tasks` and `evaluate_tasks`."""
    return evaluate_tasks(model, load_tasks(tokenizer, specs, rows_dir, batch_size, seed))


def load_tasks(
    tokenizer: Any,
    specs: Sequence[TaskSpec],
    rows_dir: Path | Mapping[str, Path] | None = None,
    batch_size: int = 16,
    seed: int = HARNESS_SEED,
) -> LoadedTasks:
    """Load all tasks with their rows.

    Args:
        tokenizer: the tokenizer of the models; it is not changed.
        specs: the tasks.
        rows_dir: folder of {task}/{split}.jsonl, or the folder of {split}.jsonl of each task. None
            loads the rows from the hub.
        batch_size: sequences per forward pass; it changes no score.
        seed: seed of the examples in prompts and of sampled answers; the harness's is 1234.

    Raises:
        InputError: a task is unknown, or its rows are unreadable or out of reach.
    """
    with _quiet():
        tasks = _load_all(specs, rows_dir, seed)
    for task in tasks.values():
        _cache_requests(task)
    return LoadedTasks(specs, tasks, tokenizer, batch_size, seed)


def evaluate_tasks(model: Any, loaded: LoadedTasks) -> BenchmarkResult:
    """Evaluate a model, plain or with adapters, on all tasks.

    The result does not depend on the models that were evaluated before.

    Raises:
        InputError: answers are longer than the model's context.
    """
    from lm_eval.evaluator import evaluate

    specs, tasks = loaded.specs, loaded.tasks
    with _evaluating(model, loaded.seed), _quiet():
        samples = {
            spec.name: range(min(spec.limit, len(tasks[spec.name].eval_docs)))
            for spec in specs
            if spec.limit is not None
        }
        lm = _wrap_model(model, loaded.tokenizer, loaded.batch_size)
        lm.seed, lm.encoded = loaded.seed, loaded.encoded
        for name, task in tasks.items():
            _check_context_length(name, task, lm)
        # Tasks with programs are marked unsafe; `load_task` has removed the metric that runs them.
        results: Any = evaluate(
            lm=lm,
            task_dict={"tasks": tasks},
            samples=samples or None,
            confirm_run_unsafe_code=True,
            bootstrap_iters=BOOTSTRAP_SAMPLES,
        )
        notes = [note for name, task in tasks.items() for note in _truncation_notes(name, task, lm)]
    return benchmark_tables_of(tasks, specs, results, notes)


def _cache_requests(task: Any) -> None:
    """Make a task build its requests once and return fresh copies of them for every model.

    The harness would build them for every model, each time with other examples in the prompts,
    because its random state advances.
    """
    build = task.build_all_requests
    cached: list[Any] = []

    def build_cached(**options: Any) -> None:
        if not cached:
            build(**options)
            cached.extend(task._instances)
        task._instances = [
            replace(
                request, arguments=copy.deepcopy(request.arguments), resps=[], filtered_resps={}
            )
            for request in cached
        ]

    task.build_all_requests = build_cached


def _load_all(
    specs: Sequence[TaskSpec], rows_dir: Path | Mapping[str, Path] | None, seed: int
) -> dict[str, Any]:
    names = [spec.name for spec in specs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or not names:
        raise InputError(f"benchmarks: expected each task once, found {repeated or 'no task'}")
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


def _wrap_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """Return the model as the harness expects it, with a copy of the tokenizer.

    The harness adds a pad token to the tokenizer.
    """
    import torch

    from forgetting.benchmarks.hflm import SharedPrefixLM
    from forgetting.models.loading import autocast_dtype

    lm = SharedPrefixLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    # Otherwise the harness generates outside our mixed precision.
    if (precision := autocast_dtype(model.device)) != torch.float32:
        lm.mixed_precision_dtype = precision
    return lm


@contextlib.contextmanager
def _evaluating(model: Any, seed: int) -> Iterator[None]:
    """Restore the model's mode and the random state after the block."""
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
    """Silence the harness; `_truncation_notes` reports what matters."""
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


def _max_gen_toks(task: Any, lm: Any) -> int:
    """Return the number of tokens that the harness reserves for a generated answer."""
    from lm_eval.models.utils import normalize_gen_kwargs

    options = copy.deepcopy(task.config.generation_kwargs or {})
    return int(normalize_gen_kwargs(options, lm.max_gen_toks)["max_gen_toks"])


def _check_context_length(name: str, task: Any, lm: Any) -> None:
    if task.OUTPUT_TYPE != "generate_until":
        return
    tokens = _max_gen_toks(task, lm)
    if tokens >= lm.max_length:
        raise InputError(
            f"benchmarks, task {name!r}: its answers may take {tokens} tokens, but the model's "
            f"context has {lm.max_length}; set a smaller longest answer for this task"
        )


def _truncation_notes(name: str, task: Any, lm: Any) -> list[str]:
    """Return a note if prompts are too long: the harness silently cuts their beginning."""
    generates = task.OUTPUT_TYPE == "generate_until"
    if not generates and task.OUTPUT_TYPE != "multiple_choice":
        return []
    # The last token of a likelihood is not fed in, so one more token fits.
    max_tokens = lm.max_length - _max_gen_toks(task, lm) if generates else lm.max_length + 1
    longest: dict[int, str] = {}
    for instance in task.instances:
        text = instance.args[0] if generates else "".join(instance.args)
        longest[instance.doc_id] = max(longest.get(instance.doc_id, ""), text, key=len)
    cut = sum(_is_longer(text, max_tokens, lm) for text in longest.values())
    if not cut:
        return []
    reserved = (
        f", {lm.max_length - max_tokens} of them reserved for the answer" if generates else ""
    )
    return [
        f"{name}: {cut} of {len(longest)} prompts are longer than the model's context "
        f"({lm.max_length} tokens{reserved}) and lost their beginning."
    ]


def _is_longer(text: str, tokens: int, lm: Any) -> bool:
    """Return whether a text has more than `tokens` tokens.

    No token is shorter than a byte, except a few special ones. Short texts are therefore not
    encoded.
    """
    return len(text.encode()) + 8 > tokens and len(lm.tok_encode(text)) > tokens
