"""What the harness's definition files say of a task, read without the harness.

There are some 11,000 tasks; to import the harness and build its index of them takes seconds, while
a study is read before every job. Here one file is found by name and read as plain YAML.
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

from forgetting.errors import InputError

DEFAULT_METRICS = {
    "multiple_choice": ("acc", "acc_norm"),
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "generate_until": ("exact_match",),
}
"""What the harness computes where a definition names no metric."""

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
"""How the harness makes one value of the items' where a definition does not say; others by mean."""

DEFAULT_MAX_GEN_TOKS = 256
"""The harness's longest generated answer where a definition names none."""

_KNOWN_KEYS = re.compile(
    rb"^[\"']?(task|group)[\"']?:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*(?:#.*)?\r?$", re.M
)


@dataclass(frozen=True)
class TaskDefinition:
    """One task: its name, its file, and what that says, with all that it includes."""

    name: str
    path: Path
    config: dict[str, Any]

    @property
    def output_type(self) -> str:
        """How it asks: `multiple_choice`, `generate_until`, or a likelihood."""
        return str(self.config.get("output_type", "generate_until"))

    @property
    def dataset(self) -> tuple[str | None, str | None]:
        """Where its rows are on the hub: name and configuration."""
        return self.config.get("dataset_path"), self.config.get("dataset_name")

    @property
    def split(self) -> str:
        """The split that is evaluated."""
        return str(self.config.get("test_split") or self.config.get("validation_split"))

    @property
    def example_split(self) -> str | None:
        """The split that solved examples are drawn from; none if they stand in the definition."""
        return example_split(self.config)

    @property
    def num_fewshot(self) -> int:
        """Solved examples in the prompt."""
        return int(self.config.get("num_fewshot") or 0)

    @property
    def max_gen_toks(self) -> int | None:
        """Longest generated answer; none if nothing is generated."""
        if self.output_type != "generate_until":
            return None
        given = self.config.get("generation_kwargs") or {}
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        return int(next((given[name] for name in names if name in given), DEFAULT_MAX_GEN_TOKS))

    @property
    def generates_code(self) -> bool:
        """Are its answers programs, which are scored by being run?"""
        return bool(self.config.get("unsafe_code"))

    @property
    def filters(self) -> list[str]:
        """What is done with an answer before it is scored, by name."""
        return [str(each["name"]) for each in self.config.get("filter_list") or []] or ["none"]

    @property
    def draws(self) -> tuple[int, ...]:
        """Of a task with programs, the k of its pass@k."""
        for metric in self.config.get("metric_list") or []:
            if "k" in metric:
                found = metric["k"]
                return tuple(found if isinstance(found, list) else [found])
        return (1,)

    @property
    def metrics(self) -> list[str]:
        """What it is scored by, as `metric,filter`, in the order of the definition."""
        if self.generates_code:
            return [f"pass@{k},{self.filters[0]}" for k in self.draws]
        listed = [str(each["metric"]) for each in self.config.get("metric_list") or []]
        # Of a function, `.../utils.name`, the harness takes the name.
        names = [name.rpartition(".")[2] for name in listed]
        return [
            f"{name},{used}"
            for used in self.filters
            for name in names or DEFAULT_METRICS.get(self.output_type, ())
        ]

    def is_mean(self, metric: str) -> bool:
        """Is a metric the mean of what its items have? Of one that a function of the definition's
        own aggregates, that cannot be told here, and it is taken for one.

        Args:
            metric: `name,filter`.
        """
        name = metric.partition(",")[0]
        for listed in self.config.get("metric_list") or []:
            if str(listed["metric"]).rpartition(".")[2] == name and "aggregation" in listed:
                return str(listed["aggregation"]) not in AGGREGATIONS.values()
        return name not in AGGREGATIONS


def example_split(config: dict[str, Any]) -> str | None:
    """The split of solved examples, as the harness chooses it; none if the definition has them."""
    fewshot = config.get("fewshot_config") or {}
    if fewshot.get("samples"):
        return None
    named = config.get("fewshot_split") or fewshot.get("split") or config.get("training_split")
    return named or config.get("validation_split")


def tasks_folder() -> Path:
    """The harness's folder of definitions; the harness is not imported for it."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise InputError("lm_eval, the lm-evaluation-harness, is not installed here")
    return Path(next(iter(found.submodule_search_locations))) / "tasks"


@functools.cache
def read_task_definition(name: str) -> TaskDefinition:
    """Find and read the definition of a task.

    Raises:
        InputError: there is none, or it is no task that can be used here; it does not say where
            the name stood.
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
    likely = f"{name}.yaml"
    for at, _, files in os.walk(folder):
        if likely in files:
            path = Path(at, likely)
            if ("task", name) in _task_names(path):
                return path
    known = _index(str(folder))
    if ("task", name) in known:
        return known["task", name]
    tasks = [task for kind, task in known if kind == "task"]
    inside = [task for task in tasks if task.startswith(f"{name}_")]
    if ("group", name) in known or inside:
        some = ", ".join(sorted(inside)[:3])
        such = f", such as {some}" if some else ""
        raise InputError(
            f"{name} is no task of the lm-evaluation-harness but a group of them; name its "
            f"tasks{such}"
        )
    near = difflib.get_close_matches(name, tasks, n=3, cutoff=0.6)
    advice = f"did you mean {', '.join(near)}?" if near else "see `lm_eval ls tasks` for all names"
    raise InputError(f"the lm-evaluation-harness has no task {name}; {advice}")


def _task_names(path: Path) -> list[tuple[str, str]]:
    """The task or group that a file defines."""
    return [(kind.decode(), name.decode()) for kind, name in _KNOWN_KEYS.findall(path.read_bytes())]


@functools.cache
def _index(folder: str) -> dict[tuple[str, str], Path]:
    """The file of every task and group: a second for all of them, the first file of a name."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(Path(folder).rglob("*.yaml")):
        for named in _task_names(path):
            found.setdefault(named, path)
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """A definition with what it includes, as the harness merges them; a function is its name."""
    config: dict[str, Any] = yaml.load(path.read_bytes(), Loader=_PlainLoader)
    merged: dict[str, Any] = {}
    included = config.pop("include", [])
    for other in included if isinstance(included, list) else [included]:
        merged |= read_yaml(path.parent / other)
    return merged | config


class _PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML in which the harness's `!function` is a text."""


_PlainLoader.add_constructor("!function", lambda loader, node: str(loader.construct_scalar(node)))
