"""Read the harness's task definitions without importing the harness.

The harness has some 11,000 tasks. Importing it and building its index takes seconds, and a study is
read before every job. This module finds one file by name and reads it as plain YAML.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from forgetting.data.hub import BUILT_IN_BENCHMARKS
from forgetting.errors import InputError

DEFAULT_METRICS = {
    "multiple_choice": ("acc", "acc_norm"),
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "generate_until": ("exact_match",),
}
"""The harness's metrics, by output type, for definitions that name none."""

AGGREGATIONS = {
    "perplexity": "perplexity",
    "word_perplexity": "weighted_perplexity",
    "byte_perplexity": "weighted_perplexity",
    "bits_per_byte": "bits_per_byte",
    "brier_score": "brier_score",
    "mcc": "matthews_corrcoef",
    "f1": "f1",
    "bleu": "bleu",
    "chrf": "chrf",
    "chrf++": "chrf++",
    "ter": "ter",
}
"""The harness's default aggregations by metric; it averages all others."""

DEFAULT_MAX_GEN_TOKS = 256
"""The harness's longest generated answer, for definitions that name none."""

_KNOWN_KEYS = re.compile(
    rb"^[\"']?(task|group)[\"']?:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*(?:#.*)?\r?$", re.M
)


@dataclass(frozen=True)
class TaskDefinition:
    """A task: its name, its file, and the content of the file with its includes."""

    name: str
    path: Path
    config: dict[str, Any]

    @property
    def output_type(self) -> str:
        """Return `multiple_choice`, `generate_until`, or a kind of likelihood."""
        return str(self.config.get("output_type", "generate_until"))

    @property
    def dataset(self) -> tuple[str | None, str | None]:
        """Return name and configuration of its dataset on the hub."""
        return self.config.get("dataset_path"), self.config.get("dataset_name")

    @property
    def split(self) -> str:
        """Return the split that is evaluated."""
        return str(self.config.get("test_split") or self.config.get("validation_split"))

    @property
    def example_split(self) -> str | None:
        """Return the split of solved examples; None if the definition contains them."""
        return example_split(self.config)

    @property
    def num_fewshot(self) -> int:
        """Return the number of solved examples in the prompt."""
        return int(self.config.get("num_fewshot") or 0)

    @property
    def max_gen_toks(self) -> int | None:
        """Return the tokens of the longest generated answer; None if nothing is generated."""
        if self.output_type != "generate_until":
            return None
        options = self.config.get("generation_kwargs") or {}
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        return int(next((options[name] for name in names if name in options), DEFAULT_MAX_GEN_TOKS))

    @property
    def generates_code(self) -> bool:
        """Return whether its answers are programs, which are run."""
        return bool(self.config.get("unsafe_code"))

    @property
    def filters(self) -> list[str]:
        """Return the names of the filters that process an answer before it is scored."""
        return [str(each["name"]) for each in self.config.get("filter_list") or []] or ["none"]

    @property
    def draws(self) -> tuple[int, ...]:
        """Return every k of pass@k, for a task with programs."""
        for metric in self.config.get("metric_list") or []:
            if "k" in metric:
                k = metric["k"]
                return tuple(k if isinstance(k, list) else [k])
        return (1,)

    @property
    def metrics(self) -> list[str]:
        """Return its metrics as `metric,filter`, in the order of the definition."""
        if self.generates_code:
            return [f"pass@{k},{self.filters[0]}" for k in self.draws]
        listed = [str(each["metric"]) for each in self.config.get("metric_list") or []]
        # The harness calls the metric of a function `.../utils.name` `name`.
        names = [name.rpartition(".")[2] for name in listed]
        return [
            f"{name},{filter_name}"
            for filter_name in self.filters
            for name in names or DEFAULT_METRICS.get(self.output_type, ())
        ]

    def is_mean(self, metric: str) -> bool:
        """Return whether a metric is the mean over its items.

        A metric aggregated by a custom function cannot be inspected here and is assumed to be one.

        Args:
            metric: `name,filter`.
        """
        name = metric.partition(",")[0]
        for listed in self.config.get("metric_list") or []:
            if str(listed["metric"]).rpartition(".")[2] == name and "aggregation" in listed:
                return str(listed["aggregation"]) not in AGGREGATIONS.values()
        return name not in AGGREGATIONS


def example_split(config: dict[str, Any]) -> str | None:
    """Return the split of solved examples as the harness chooses it.

    None means that the definition contains the examples.
    """
    fewshot = config.get("fewshot_config") or {}
    if fewshot.get("samples"):
        return None
    split = config.get("fewshot_split") or fewshot.get("split") or config.get("training_split")
    return split or config.get("validation_split")


def tasks_folder() -> Path:
    """Return the harness's folder of definitions, without importing the harness."""
    package = importlib.util.find_spec("lm_eval")
    if package is None or not package.submodule_search_locations:
        raise InputError("lm_eval, the lm-evaluation-harness, is not installed here")
    return Path(next(iter(package.submodule_search_locations))) / "tasks"


@functools.cache
def read_task_definition(name: str) -> TaskDefinition:
    """Find and read the definition of a task.

    Raises:
        InputError: the task does not exist or cannot be used here. The message does not name the
            study's key.
    """
    path = _find_file(name)
    config = read_yaml(path)
    if "class" in config:
        raise InputError(
            f"the task {name} is defined by a Python class, not by a configuration, and cannot be "
            "used here; choose another task"
        )
    if not (config.get("test_split") or config.get("validation_split")):
        raise InputError(f"the task {name} names no split to evaluate; choose another task")
    for metric in config.get("metric_list") or []:
        if metric.get("hf_evaluate"):
            raise InputError(
                f"the task {name} is scored by `{metric['metric']}`, which is code that would be "
                "fetched from the hub; choose another task"
            )
    return TaskDefinition(name, path, config)


def _find_file(name: str) -> Path:
    folder = tasks_folder()
    if name in BUILT_IN_BENCHMARKS:
        return folder / BUILT_IN_BENCHMARKS[name].definition
    likely_name = f"{name}.yaml"
    for directory, _, files in os.walk(folder):
        if likely_name in files:
            path = Path(directory, likely_name)
            if ("task", name) in _task_names(path):
                return path
    index = _index(str(folder))
    if ("task", name) in index:
        return index["task", name]
    tasks = [task for kind, task in index if kind == "task"]
    members = [task for task in tasks if task.startswith(f"{name}_")]
    if ("group", name) in index or members:
        listed = ", ".join(sorted(members)[:3])
        such_as = f", such as {listed}" if listed else ""
        raise InputError(
            f"{name} is no task of the lm-evaluation-harness but a group of them; name its "
            f"tasks{such_as}"
        )
    similar = difflib.get_close_matches(name, tasks, n=3, cutoff=0.6)
    advice = (
        f"did you mean {', '.join(similar)}?" if similar else "see `lm_eval ls tasks` for all names"
    )
    raise InputError(f"the lm-evaluation-harness has no task {name}; {advice}")


def _task_names(path: Path) -> list[tuple[str, str]]:
    """Return the tasks and groups that a file defines, as (kind, name)."""
    return [(kind.decode(), name.decode()) for kind, name in _KNOWN_KEYS.findall(path.read_bytes())]


@functools.cache
def _index(folder: str) -> dict[tuple[str, str], Path]:
    """Return the first file of every (kind, name); this takes a second."""
    files: dict[tuple[str, str], Path] = {}
    for path in sorted(Path(folder).rglob("*.yaml")):
        for kind_and_name in _task_names(path):
            files.setdefault(kind_and_name, path)
    return files


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a definition merged with its includes as the harness does; functions are names."""
    config: dict[str, Any] = yaml.load(path.read_bytes(), Loader=_PlainLoader)
    merged: dict[str, Any] = {}
    included = config.pop("include", [])
    for other in included if isinstance(included, list) else [included]:
        merged |= read_yaml(path.parent / other)
    return merged | config


class _PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML loader that reads the harness's `!function` as text."""


_PlainLoader.add_constructor("!function", lambda loader, node: str(loader.construct_scalar(node)))
