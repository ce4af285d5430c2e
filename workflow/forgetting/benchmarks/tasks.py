"""Load the harness's tasks on local rows.

Definitions, prompts, filters and metrics are the harness's; only the source of the rows changes. A
task without solved examples also loses the splits that the harness would load for them. No prompt
and no score depends on those splits.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetting.benchmarks.registry import benchmark, required_splits
from forgetting.benchmarks.task_definitions import example_split, read_task_definition
from forgetting.config.evaluation import TaskConfig
from forgetting.digests import file_damage
from forgetting.errors import InputError
from forgetting.io import damage_error, read_jsonl_numbered, removal_command


@contextlib.contextmanager
def without_code_eval(needed: bool) -> Iterator[None]:
    """Replace the package `evaluate` by a stub during the block, if `needed`.

    The helper modules of tasks with programs fetch the hub's `code_eval` metric when they are
    imported, and test it at once. That needs a connection, takes seconds, and runs programs outside
    any sandbox. The stub takes its place for the import and refuses to score programs. Afterwards
    the stub and the modules that imported it are removed from `sys.modules`.
    """
    if not needed:
        yield
        return
    original, loaded = sys.modules.get("evaluate"), set(sys.modules)
    stub = types.ModuleType("evaluate")
    stub.load = lambda *_, **__: _CodeEvalStub()  # type: ignore[attr-defined]
    sys.modules["evaluate"] = stub
    try:
        yield
    finally:
        for module in set(sys.modules) - loaded:
            if module.startswith("lm_eval.tasks."):
                del sys.modules[module]
        if original is None:
            sys.modules.pop("evaluate", None)
        else:
            sys.modules["evaluate"] = original


class _CodeEvalStub:
    """Metric that passes the self-test at import and raises an error on any later call."""

    def __init__(self) -> None:
        self._calls = 0

    def compute(self, **_: object) -> tuple[dict[str, float], dict[str, object]]:
        self._calls += 1
        if self._calls > 1:
            raise RuntimeError("programs are run in a sandbox, never inside the harness")
        return {"pass@1": 0.0}, {}


HARNESS_SEED = 1234  # the harness's default seed of examples in prompts


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample several answers to an item."""

    samples: int
    temperature: float = 0.2
    top_p: float = 0.95


@dataclass(frozen=True)
class TaskSpec:
    """A task as a study configures it; None means the task's own setting.

    Attributes:
        name: the harness's name.
        num_fewshot: solved examples in the prompt.
        limit: number of items; the first ones are taken.
        max_gen_toks: tokens of the longest generated answer.
        chance: score of blind guessing; None means the built-in or computed one.
        revision: commit of the hub's dataset.
        metric: main metric, with or without its filter.
        sampling: how to sample answers; None means the task's own decoding.
        draws: every k of pass@k.
    """

    name: str
    num_fewshot: int | None = None
    limit: int | None = None
    max_gen_toks: int | None = None
    chance: float | None = None
    revision: str | None = None
    metric: str | None = None
    sampling: SamplingConfig | None = None
    draws: tuple[int, ...] | None = None

    @classmethod
    def of(cls, name: str, task: TaskConfig) -> TaskSpec:
        """Return the task of a study's section."""
        sampling = None
        if task.samples is not None:
            options = {"temperature": task.temperature, "top_p": task.top_p}
            sampling = SamplingConfig(
                task.samples, **{k: v for k, v in options.items() if v is not None}
            )
        return cls(
            name,
            num_fewshot=task.num_fewshot,
            limit=task.limit,
            max_gen_toks=task.max_new_tokens,
            chance=task.chance,
            metric=task.metric,
            sampling=sampling,
            draws=tuple(task.k) if task.k else None,
        )

    @property
    def chance_level(self) -> float:
        """Return the score of blind guessing, NaN if it is unknown."""
        return benchmark(self.name).chance if self.chance is None else self.chance


def load_task(spec: TaskSpec | str, rows: Path | None = None, seed: int = HARNESS_SEED) -> Any:
    """Return a task of the harness with its rows, an `lm_eval.api.task.ConfigurableTask`.

    A task whose programs the harness would run (`UNSAFE_CODE`) has no metric: its answers can be
    generated, but not scored.

    Args:
        spec: the task, or its name.
        rows: folder of {split}.jsonl; None loads the rows from the hub.
        seed: seed of the examples in prompts.

    Raises:
        InputError: the task is unknown, its rows are missing, malformed or out of reach, or it does
            not allow a setting.
    """
    from lm_eval.api.task import ConfigurableTask

    spec = TaskSpec(spec) if isinstance(spec, str) else spec
    config = _configured(spec)
    if rows is not None:
        splits = required_splits(spec.name, config["num_fewshot"])
        source = _local_rows(rows, splits, benchmark(spec.name).columns)
        config |= {"custom_dataset": source, "dataset_kwargs": None}
    else:
        _go_offline_if_unreachable()
        pinned = {"revision": spec.revision} if spec.revision else {}
        config["dataset_kwargs"] = (config.get("dataset_kwargs") or {}) | pinned
    programs = bool(config.get("unsafe_code"))
    with _hub_errors(spec.name, config), without_code_eval(programs), _import_errors(spec.name):
        task = ConfigurableTask(config=config)
    if programs:
        task.override_metric("bypass")
    _check_examples(spec, task)
    task.set_fewshot_seed(seed=seed)
    return task


def _configured(spec: TaskSpec) -> dict[str, Any]:
    """Return the task's configuration with the study's settings."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        definition = read_task_definition(spec.name)
    except InputError as error:
        raise InputError(f"benchmarks, task {spec.name!r}: {error}") from None
    with without_code_eval(definition.generates_code), _import_errors(spec.name):
        config: dict[str, Any] = load_yaml(definition.path)
    default_shots = config.get("num_fewshot")
    if default_shots == 0 and spec.num_fewshot:
        raise InputError(
            f"benchmarks, task {spec.name!r}: num_fewshot is {spec.num_fewshot}, but the task "
            "is defined without examples; leave num_fewshot out"
        )
    config["num_fewshot"] = (default_shots or 0) if spec.num_fewshot is None else spec.num_fewshot
    if config["num_fewshot"] == 0:
        config |= {"training_split": None, "fewshot_split": None}
        if config.get("test_split"):
            config["validation_split"] = None
    options: dict[str, Any] = config.get("generation_kwargs") or {}
    if spec.max_gen_toks is not None:
        config["generation_kwargs"] = options = options | {"max_gen_toks": spec.max_gen_toks}
    if spec.sampling is not None:
        sampling = {"temperature": spec.sampling.temperature, "top_p": spec.sampling.top_p}
        config["generation_kwargs"] = options | {"do_sample": True, **sampling}
        config["repeats"] = spec.sampling.samples
    return config


def _local_rows(
    folder: Path, splits: list[str], columns: tuple[str, ...]
) -> Callable[..., dict[str, Any]]:
    """Return a function that the harness calls instead of downloading; it caches no files."""
    from datasets import Dataset

    def rows(**_: object) -> dict[str, Any]:
        return {
            split: Dataset.from_list(read_task_rows(folder / f"{split}.jsonl", columns))
            for split in splits
        }

    return rows


def read_task_rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the rows of one split.

    Args:
        path: a file of JSON lines.
        columns: the columns that every row must have.

    Raises:
        InputError: the file is damaged or empty, or a line lacks a column.
    """
    is_download = re.fullmatch(r"[0-9a-f]{40}", path.parent.name) is not None  # a revision
    if is_download and (reason := file_damage(path, required=False)):
        raise damage_error(
            path, reason, removal_command(path.parent), "the rows are downloaded again"
        )
    numbered_rows = list(read_jsonl_numbered(path))
    if not numbered_rows:
        raise InputError(f"{path}: has no rows")
    for line, row in numbered_rows:
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise InputError(
                f"{path}, line {line}: the column {missing[0]!r} is missing; expected "
                f"{', '.join(columns)}"
            )
    return [row for _, row in numbered_rows]


def _check_examples(spec: TaskSpec, task: Any) -> None:
    """Raise `InputError` if there are too few rows to draw examples from."""
    shots = task.config.num_fewshot
    if not shots or not hasattr(task, "sampler") or example_split(task.config.to_dict()) is None:
        return
    rows = len(task.sampler.df)
    if rows < shots + 1:
        raise InputError(
            f"benchmarks, task {spec.name!r}: {shots} examples a prompt need at least "
            f"{shots + 1} rows to draw from, and there are {rows}; lower num_fewshot"
        )


@functools.cache
def _go_offline_if_unreachable() -> None:
    """Put the hub's libraries into offline mode if the hub does not answer within 5 seconds.

    They then use their cache and fail at once on a miss. Otherwise the hub's client retries for 23
    seconds per dataset.
    """
    import datasets
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
    except urllib.error.HTTPError:
        return
    except OSError:
        constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True


@contextlib.contextmanager
def _import_errors(name: str) -> Iterator[None]:
    """Raise `InputError` if a definition needs a Python package that is not installed."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"benchmarks, task {name!r}: its definition needs a Python package that is not "
            f"installed ({error}); install it, or choose another task"
        ) from error


@contextlib.contextmanager
def _hub_errors(name: str, config: dict[str, Any]) -> Iterator[None]:
    """Turn the errors of a failed download into an `InputError`."""
    from datasets import exceptions

    dataset = config.get("dataset_path")
    try:
        yield
    except (ConnectionError, FileNotFoundError, exceptions.DatasetsError) as error:
        raise InputError(
            f"benchmarks, task {name!r}: the dataset {dataset!r} is neither on this machine nor "
            "can it be downloaded; run once with access to the hub, or give a folder with its "
            f"rows as JSON lines ({type(error).__name__}: {str(error)[:160]})"
        ) from error
