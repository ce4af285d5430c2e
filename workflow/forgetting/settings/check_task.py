"""Mistakes about one benchmark that can be found before any job: name, settings, rows, lengths."""

from __future__ import annotations

from pathlib import Path

from forgetting.benchmarks.definitions import read_definition
from forgetting.benchmarks.known import Benchmark, benchmark, main_metric, same_rows
from forgetting.benchmarks.tasks import read_rows
from forgetting.data.hub import HUB_ROWS
from forgetting.records import InputError
from forgetting.sections.task import Task
from forgetting.settings.source import At
from forgetting.settings.study import Study

LARGE = 50 * 2**20
"""Tables above so many bytes are checked by the first job that reads them, not before."""


def check_task(study: Study, name: str, task: Task, context: int | None, at: At) -> None:
    """Name, settings, rows, examples and room for the answers of a benchmark."""
    place = ("benchmarks", "tasks", name)
    try:
        known = benchmark(name)
    except InputError as error:
        raise InputError(f"{at(*place)}: {error}") from None
    try:
        metric = main_metric(name, task.metric)
    except InputError as error:
        raise InputError(f"{at(*place, 'metric')}: {error}") from None
    shots = known.examples if task.num_fewshot is None else task.num_fewshot
    if task.num_fewshot and name in HUB_ROWS and known.example_split is None:
        raise InputError(
            f"{at(*place, 'num_fewshot')}: {name} is defined without examples; leave it out"
        )
    if task.samples is not None and not known.programs:
        raise InputError(
            f"{at(*place, 'samples')}: the answers of {name} are no programs, and pass@k is for "
            "programs; leave it out"
        )
    if name in study.benchmarks.along:
        _check_along(name, known, metric, at)
    tokens = known.answer_tokens and (task.max_new_tokens or known.answer_tokens)
    if tokens and context is not None and tokens >= context:
        raise InputError(
            f"{at(*place, 'max_new_tokens')}: the answers of {name} may take {tokens} tokens, but "
            f"the model reads {context}; set a smaller `max_new_tokens`"
        )
    _check_rows(study, name, task, known, shots, at)


def _check_along(name: str, known: Benchmark, metric: str, at: At) -> None:
    """A task can be asked in training, item by item."""
    place = at("benchmarks", "along", name)
    if known.programs:
        raise InputError(
            f"{place}: the answers of {name} are programs, which run in a sandbox after the "
            "training; take it out"
        )
    definition = read_definition(name)
    if definition.is_mean(metric):
        return
    means = [other for other in definition.metrics if definition.is_mean(other)]
    instead = f", or have benchmarks.tasks.{name}.metric name {' or '.join(means)}" if means else ""
    raise InputError(
        f"{place}: {metric} of {name} is no mean over items, so that the first of them do not tell "
        f"it; take it out{instead}"
    )


def _check_rows(study: Study, name: str, task: Task, known: Benchmark, shots: int, at: At) -> None:
    """The rows of a benchmark are where the study says, as far as that can be told."""
    place, rows = ("benchmarks", "tasks", name), at("benchmarks", "rows")
    if study.benchmarks.rows is None:
        if name not in HUB_ROWS and task.revision is None:
            raise InputError(
                f"{at(*place)}: its rows come from {known.dataset[0]} on the hub, so it needs a "
                "`revision`, a commit of that dataset; or name a folder in benchmarks.rows"
            )
        return
    origin = study.datasets[study.benchmarks.rows]
    splits = {known.split: 1}
    if shots and known.example_split:
        splits[known.example_split] = shots + 1
    if origin.folder is None:
        if origin.generate is None:
            raise InputError(
                f"{rows}: {study.benchmarks.rows} is a dataset on the hub, which has no rows of "
                "benchmarks; leave `rows` out, or name a dataset with a `folder`"
            )
        alike = same_rows(name)
        if alike is None or not set(splits) <= set(HUB_ROWS[alike].splits):
            raise InputError(
                f"{at(*place)}: the {origin.generate} has no rows for {name}, only for tasks on "
                f"the data of {', '.join(HUB_ROWS)}; take the rows from a folder or the hub"
            )
        return
    for split, least in splits.items():
        path = Path(origin.folder, name, f"{split}.jsonl")
        if not path.is_file():
            more = f" (for {shots} examples in the prompt)" if split == known.example_split else ""
            raise InputError(f"{rows}: there is no {path}, which {name} needs{more}")
        if path.stat().st_size <= LARGE and (found := len(read_rows(path, known.columns))) < least:
            raise InputError(
                f"{path}: has {found} rows, and {shots} examples in the prompt need {least} to "
                f"draw from; lower benchmarks.tasks.{name}.num_fewshot"
            )
