"""Scores a loaded model on tasks of the lm-evaluation-harness, item by item.

The harness builds the prompts, runs the model, filters the answers and computes the metrics;
this module only brings rows and model together and turns the results into tables. Programs
that the model wrote are handed out, not run (see `forgetting.benchmarks.programs` and
`forgetting.benchmarks.sandbox`). The harness's caches are never used: their keys name neither the
model nor the data, so they return answers of another model or prompts of other rows.
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

BOOTSTRAPS = 1000
"""Draws behind the standard error of metrics that are no mean over items, such as perplexity."""


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks whose rows are read, and whose prompts are built, once for all models of a tokenizer.

    Attributes:
        tasks: the harness's, by name.
        encoded: tokens of each prompt with each of its choices, once a model was asked.
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
    """Evaluate a loaded model on all tasks in one pass; see `load_tasks` and `evaluate_tasks`."""
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
        tokenizer: of the models; left as it is.
        specs: the tasks.
        rows_dir: folder of {task}/{split}.jsonl, or the folder of {split}.jsonl of each task;
            without it the rows come from the hub.
        batch_size: sequences per forward pass; changes no score.
        seed: draws the examples in the prompts (1234 is the harness's own), and the answers
            of tasks that sample.

    Raises `InputError` for what the user can mend: unknown tasks, unreadable rows, a data set
    out of reach.
    """
    with _quiet():
        tasks = _load_all(specs, rows_dir, seed)
    for task in tasks.values():
        _cache_requests(task)
    return LoadedTasks(specs, tasks, tokenizer, batch_size, seed)


def evaluate_tasks(model: Any, questions: LoadedTasks) -> BenchmarkResult:
    """Evaluate a loaded model (plain or with adapters) on all tasks in one pass.

    A model's result is the same whether it is the first that is asked or not.

    Raises `InputError` where answers are longer than the model's context.
    """
    from lm_eval.evaluator import evaluate

    specs, tasks = questions.specs, questions.tasks
    with _evaluating(model, questions.seed), _quiet():
        samples = {
            spec.name: range(min(spec.limit, len(tasks[spec.name].eval_docs)))
            for spec in specs
            if spec.limit is not None
        }
        lm = _wrap_model(model, questions.tokenizer, questions.batch_size)
        lm.seed, lm.encoded = questions.seed, questions.encoded
        for name, task in tasks.items():
            _check_context_length(name, task, lm)
        # Tasks with programs are marked unsafe; `load_task` has taken away what would run them.
        results: Any = evaluate(
            lm=lm,
            task_dict={"tasks": tasks},
            samples=samples or None,
            confirm_run_unsafe_code=True,
            bootstrap_iters=BOOTSTRAPS,
        )
        notes = [note for name, task in tasks.items() for note in _truncations(name, task, lm)]
    return benchmark_tables_of(tasks, specs, results, notes)


def _cache_requests(task: Any) -> None:
    """Have a task build its requests when they are first asked for, and hand them out anew then.

    The harness would build them for every model, each time with other examples in the prompts,
    since its random numbers go on from where they were.
    """
    build = task.build_all_requests
    kept: list[Any] = []

    def hand_out(**options: Any) -> None:
        if not kept:
            build(**options)
            kept.extend(task._instances)
        task._instances = [
            replace(one, arguments=copy.deepcopy(one.arguments), resps=[], filtered_resps={})
            for one in kept
        ]

    task.build_all_requests = hand_out


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


def _wrap_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """The harness's view of the model. The tokenizer is copied, since it is given a pad token."""
    import torch

    from forgetting.benchmarks.hflm import SharedPrefixLM
    from forgetting.models.loading import autocast_dtype

    lm = SharedPrefixLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    # The harness would else leave our mixed precision for its generations.
    if (precision := autocast_dtype(model.device)) != torch.float32:
        lm.mixed_precision_dtype = precision
    return lm


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


def _max_gen_toks(task: Any, lm: Any) -> int:
    """Tokens that the harness keeps free for a generated answer."""
    from lm_eval.models.utils import normalize_gen_kwargs

    given = copy.deepcopy(task.config.generation_kwargs or {})
    return int(normalize_gen_kwargs(given, lm.max_gen_toks)["max_gen_toks"])


def _check_context_length(name: str, task: Any, lm: Any) -> None:
    if task.OUTPUT_TYPE != "generate_until":
        return
    tokens = _max_gen_toks(task, lm)
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
    room = lm.max_length - _max_gen_toks(task, lm) if generates else lm.max_length + 1
    longest: dict[int, str] = {}
    for instance in task.instances:
        text = instance.args[0] if generates else "".join(instance.args)
        longest[instance.doc_id] = max(longest.get(instance.doc_id, ""), text, key=len)
    cut = sum(_longest_answers(text, room, lm) for text in longest.values())
    if not cut:
        return []
    kept = f", of which {lm.max_length - room} are kept for the answer" if generates else ""
    return [
        f"{name}: {cut} of {len(longest)} prompts are longer than the model's context "
        f"({lm.max_length} tokens{kept}) and lost their beginning."
    ]


def _longest_answers(text: str, tokens: int, lm: Any) -> bool:
    """Whether a text has more tokens than that. No token is shorter than a byte, but for a few
    special ones, so that short texts need not be encoded."""
    return len(text.encode()) + 8 > tokens and len(lm.tok_encode(text)) > tokens
