"""The harness's own tasks on rows of ours: definitions, prompts, filters and metrics are theirs.

Only the origin of the rows is changed. A task that is not solved from examples also gives up
the splits that the harness would load and process for examples that nobody draws: no prompt
and no score depends on them.

Load the harness's tasks with programs although nothing here runs them through `evaluate`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import sys
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetting.benchmarks.registry import BENCHMARKS, required_splits
from forgetting.benchmarks.task_definitions import example_split, read_task_definition
from forgetting.config.evaluation import TaskConfig
from forgetting.digests import file_damage
from forgetting.errors import InputError
from forgetting.io import damage_error, read_jsonl_numbered, removal_command


@contextlib.contextmanager
def without_code_eval(needed: bool) -> Iterator[None]:
    """Have `evaluate` replaced during the block, if that is `needed`.

    The helper modules of tasks with programs fetch the hub's `code_eval` metric when they are
    imported, and try it at once. That needs a connection, takes seconds, and would run programs
    outside any sandbox. A stand-in takes its place for the import; a program that reached it
    would be an error of ours, so it refuses to judge. Afterwards the stand-in and the modules
    that saw it are forgotten, so that nothing else in this process meets them.
    """
    if not needed:
        yield
        return
    before, known = sys.modules.get("evaluate"), set(sys.modules)
    stand_in = types.ModuleType("evaluate")
    stand_in.load = lambda *_, **__: _CodeEvalStub()  # type: ignore[attr-defined]
    sys.modules["evaluate"] = stand_in
    try:
        yield
    finally:
        for module in set(sys.modules) - known:
            if module.startswith("lm_eval.tasks."):
                del sys.modules[module]
        if before is None:
            sys.modules.pop("evaluate", None)
        else:
            sys.modules["evaluate"] = before


class _CodeEvalStub:
    """Answers the self-test at import with nothing, and anything after it with an error."""

    def __init__(self) -> None:
        self._asked = 0

    def compute(self, **_: object) -> tuple[dict[str, float], dict[str, object]]:
        self._asked += 1
        if self._asked > 1:
            raise RuntimeError("programs are run in a sandbox, never inside the harness")
        return {"pass@1": 0.0}, {}


HARNESS_SEED = 1234  # the harness's default for drawing examples


@dataclass(frozen=True)
class SamplingConfig:
    """How several answers to an item are drawn."""

    samples: int
    temperature: float = 0.2
    top_p: float = 0.95


@dataclass(frozen=True)
class TaskSpec:
    """One benchmark as a study wants it; None means the task's own setting.

    `limit` takes the first items. `chance` is the score of blind guessing: known for the five
    tasks, and derived from the number of choices for others. `revision` pins the hub's data set.
    `draws` are the k of pass@k.
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
        """A task as a study's section says it."""
        sampling = None
        if task.samples is not None:
            given = {"temperature": task.temperature, "top_p": task.top_p}
            sampling = SamplingConfig(
                task.samples, **{k: v for k, v in given.items() if v is not None}
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
        """Score of blind guessing, NaN where it is not known."""
        known = BENCHMARKS.get(self.name)
        value = self.chance if self.chance is not None else (known.chance if known else None)
        return math.nan if value is None else value


def load_task(spec: TaskSpec | str, rows: Path | None = None, seed: int = HARNESS_SEED) -> Any:
    """The harness's task, ready to be evaluated.

    Its rows come from `rows`/{split}.jsonl, or from the hub where `rows` is None. Returns an
    `lm_eval.api.task.ConfigurableTask`. A task whose programs the harness would run comes
    without its metric, so that it can be generated only (its `UNSAFE_CODE` is true).

    Raises `InputError` for an unknown task, missing or malformed rows, a data set that
    cannot be had, and settings that the task does not allow.
    """
    from lm_eval.api.task import ConfigurableTask

    spec = TaskSpec(spec) if isinstance(spec, str) else spec
    config = _configured(spec)
    if rows is not None:
        columns = BENCHMARKS[spec.name].columns if spec.name in BENCHMARKS else ()
        source = _local_rows(rows, required_splits(spec.name, config["num_fewshot"]), columns)
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
    """The task's own configuration with the few settings that a study may change."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        definition = read_task_definition(spec.name)
    except InputError as error:
        raise InputError(f"benchmarks, task {spec.name!r}: {error}") from None
    with without_code_eval(definition.generates_code), _import_errors(spec.name):
        config: dict[str, Any] = load_yaml(definition.path)
    own = config.get("num_fewshot")
    if own == 0 and spec.num_fewshot:
        raise InputError(
            f"benchmarks, task {spec.name!r}: num_fewshot is {spec.num_fewshot}, but the task "
            "is defined without examples; leave num_fewshot out"
        )
    config["num_fewshot"] = (own or 0) if spec.num_fewshot is None else spec.num_fewshot
    if config["num_fewshot"] == 0:
        config |= {"training_split": None, "fewshot_split": None}
        if config.get("test_split"):
            config["validation_split"] = None
    given: dict[str, Any] = config.get("generation_kwargs") or {}
    if spec.max_gen_toks is not None:
        config["generation_kwargs"] = given = given | {"max_gen_toks": spec.max_gen_toks}
    if spec.sampling is not None:
        drawn = {"temperature": spec.sampling.temperature, "top_p": spec.sampling.top_p}
        config["generation_kwargs"] = given | {"do_sample": True, **drawn}
        config["repeats"] = spec.sampling.samples
    return config


def _local_rows(
    folder: Path, splits: list[str], columns: tuple[str, ...]
) -> Callable[..., dict[str, Any]]:
    """A function that the harness calls instead of downloading; nothing is cached on disk."""
    from datasets import Dataset

    def rows(**_: object) -> dict[str, Any]:
        return {
            split: Dataset.from_list(read_rows(folder / f"{split}.jsonl", columns))
            for split in splits
        }

    return rows


def read_rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of one split, with the columns that a task reads.

    Raises:
        InputError: names the file, the line and the column.
    """
    downloaded = re.fullmatch(r"[0-9a-f]{40}", path.parent.name) is not None  # by its revision
    if downloaded and (wrong := file_damage(path, required=False)):
        raise damage_error(
            path, wrong, removal_command(path.parent), "the rows are downloaded again"
        )
    found = list(read_jsonl_numbered(path))
    if not found:
        raise InputError(f"{path}: has no rows")
    for line, row in found:
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise InputError(
                f"{path}, line {line}: the column {missing[0]!r} is missing; expected "
                f"{', '.join(columns)}"
            )
    return [row for _, row in found]


def _check_examples(spec: TaskSpec, task: Any) -> None:
    """Say before anything is computed that there are too few rows to draw examples from."""
    wanted = task.config.num_fewshot
    if not wanted or not hasattr(task, "sampler") or example_split(task.config.to_dict()) is None:
        return
    rows = len(task.sampler.df)
    if rows < wanted + 1:
        raise InputError(
            f"benchmarks, task {spec.name!r}: {wanted} examples a prompt need at least "
            f"{wanted + 1} rows to draw from, and there are {rows}; lower num_fewshot"
        )


@functools.cache
def _go_offline_if_unreachable() -> None:
    """Use what is cached, and fail at once on the rest, if the hub does not answer in 5 s.

    Without this the hub's client retries for 23 seconds a data set before it gives up.
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
    """Some definitions need Python packages that the harness does not bring."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"benchmarks, task {name!r}: its definition needs a Python package that is not "
            f"installed ({error}); install it, or choose another task"
        ) from error


@contextlib.contextmanager
def _hub_errors(name: str, config: dict[str, Any]) -> Iterator[None]:
    """Turn a failed download into one sentence."""
    from datasets import exceptions

    dataset = config.get("dataset_path")
    try:
        yield
    except (ConnectionError, FileNotFoundError, exceptions.DatasetsError) as error:
        raise InputError(
            f"benchmarks, task {name!r}: the data set {dataset!r} is neither on this machine nor "
            "can it be downloaded; run once with access to the hub, or give a folder with its "
            f"rows as JSON lines ({type(error).__name__}: {str(error)[:160]})"
        ) from error
