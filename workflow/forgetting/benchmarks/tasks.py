"""The harness's own tasks on rows of ours: definitions, prompts, filters and metrics are theirs.

Only the origin of the rows is changed. A task that is not solved from examples also gives up
the splits that the harness would load and process for examples that nobody draws: no prompt
and no score depends on them.
"""

from __future__ import annotations

import contextlib
import functools
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetting.benchmarks.code_eval_stand_in import without_code_eval
from forgetting.records import InputError, read_numbered

HARNESS_SEED = 1234  # the harness's default for drawing examples


@dataclass(frozen=True)
class Benchmark:
    """What is known beforehand about a task."""

    definition: str  # file below the harness's folder of tasks
    dataset: tuple[str, str | None]  # on the hub: name, configuration
    split: str  # the one that is evaluated
    example_split: str | None  # the one that solved examples are drawn from
    main_metric: str  # the one to draw
    chance: float  # score of blind guessing
    columns: tuple[str, ...]  # that the task reads
    examples: int = 0  # in the prompt, by the task's own definition
    answer_tokens: int | None = None  # longest answer by that definition, if it is generated


BENCHMARKS = {
    "gsm8k": Benchmark(
        definition="gsm8k/gsm8k.yaml",
        dataset=("openai/gsm8k", "main"),
        split="test",
        example_split="train",
        main_metric="exact_match,strict-match",
        chance=0.0,
        columns=("question", "answer"),
        examples=5,
        answer_tokens=256,  # the harness's default
    ),
    "humaneval": Benchmark(
        definition="humaneval/humaneval.yaml",
        dataset=("openai/openai_humaneval", None),
        split="test",
        example_split=None,
        main_metric="pass@1,create_test",
        chance=0.0,
        columns=("prompt", "test", "entry_point"),
        answer_tokens=1024,
    ),
    "hellaswag": Benchmark(
        definition="hellaswag/hellaswag.yaml",
        dataset=("Rowan/hellaswag", None),
        split="validation",
        example_split="train",
        main_metric="acc_norm,none",
        chance=0.25,
        columns=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "winogrande": Benchmark(
        definition="winogrande/default.yaml",
        dataset=("allenai/winogrande", "winogrande_xl"),
        split="validation",
        example_split="train",
        main_metric="acc,none",
        chance=0.5,
        columns=("sentence", "option1", "option2", "answer"),
    ),
    "arc_challenge": Benchmark(
        definition="arc/arc_challenge.yaml",
        dataset=("allenai/ai2_arc", "ARC-Challenge"),
        split="test",
        example_split="train",
        main_metric="acc_norm,none",
        chance=0.25,
        columns=("question", "choices", "answerKey"),
    ),
}


@dataclass(frozen=True)
class TaskSpec:
    """One benchmark as a study wants it; None means the task's own setting.

    `limit` takes the first items. `chance` is the score of blind guessing: known for the five
    tasks, missing (NaN) for others unless it is given. `revision` pins the hub's data set.
    """

    name: str
    num_fewshot: int | None = None
    limit: int | None = None
    max_gen_toks: int | None = None
    chance: float | None = None
    revision: str | None = None

    @property
    def chance_level(self) -> float:
        """Score of blind guessing, NaN where it is not known."""
        known = BENCHMARKS.get(self.name)
        value = self.chance if self.chance is not None else (known.chance if known else None)
        return float("nan") if value is None else value


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
    definition = _definition(spec.name)
    config = _configured(definition, spec)
    if rows is not None:
        columns = BENCHMARKS[spec.name].columns if spec.name in BENCHMARKS else ()
        source = _row_source(rows, _splits(config), columns)
        config |= {"custom_dataset": source, "dataset_kwargs": None}
    else:
        _go_offline_if_unreachable()
        pinned = {"revision": spec.revision} if spec.revision else {}
        config["dataset_kwargs"] = (config.get("dataset_kwargs") or {}) | pinned
    with _hub_errors(spec.name, config), without_code_eval(bool(config.get("unsafe_code"))):
        task = ConfigurableTask(config=config)
    if config.get("unsafe_code"):
        task.override_metric("bypass")
    _check_examples(spec, task)
    task.set_fewshot_seed(seed=seed)
    return task


def _definition(name: str) -> Path:
    """The file that defines a task. The harness's index of all 14,000 is not built for it."""
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks"
    if name in BENCHMARKS:
        return folder / BENCHMARKS[name].definition
    says_so = re.compile(rb"^task:\s*[\"']?" + re.escape(name).encode() + rb"[\"']?\s*$", re.M)
    likely = folder.rglob(f"{name}.yaml") if re.fullmatch(r"[\w.+-]+", name) else iter(())
    for candidates in (likely, folder.rglob("*.yaml")):
        for path in candidates:
            if says_so.search(path.read_bytes()):
                return path
    raise InputError(
        f"benchmarks, task {name!r}: the lm-evaluation-harness defines no task of that name "
        "(a group has to be given as its tasks)"
    )


def _configured(definition: Path, spec: TaskSpec) -> dict[str, Any]:
    """The task's own configuration with the few settings that a study may change."""
    from lm_eval.tasks._yaml_loader import load_yaml

    plain = load_yaml(definition, resolve_func=False)
    if "class" in plain:
        raise InputError(
            f"benchmarks, task {spec.name!r}: it is defined by a Python class, not by a "
            "configuration, and cannot be used here; choose another task"
        )
    with without_code_eval(bool(plain.get("unsafe_code"))):
        config: dict[str, Any] = load_yaml(definition)
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
    if spec.max_gen_toks is not None:
        given = config.get("generation_kwargs") or {}
        config["generation_kwargs"] = given | {"max_gen_toks": spec.max_gen_toks}
    return config


def _splits(config: dict[str, Any]) -> list[str]:
    """The splits that the task reads: the evaluated one, and the one examples are drawn from."""
    evaluated = config.get("test_split") or config.get("validation_split")
    splits = [evaluated]
    if config["num_fewshot"]:
        fewshot = config.get("fewshot_config") or {}
        own = config.get("fewshot_split") or fewshot.get("split")
        splits += [own or config.get("training_split") or config.get("validation_split")]
    return list(dict.fromkeys(split for split in splits if split))


def _row_source(
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
    found = list(read_numbered(path))
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
    if not wanted or not hasattr(task, "sampler"):
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
