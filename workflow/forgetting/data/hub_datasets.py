"""Datasets of the Hugging Face hub and built-in benchmarks, from hub_datasets.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True)
class HubDataset:
    """The published rows of a benchmark.

    Attributes:
        dataset, config: name and configuration on the hub.
        revision: commit.
        splits: the splits that the task reads.
    """

    dataset: str
    config: str | None
    revision: str
    splits: tuple[str, ...]


@dataclass(frozen=True)
class BuiltInBenchmark:
    """Facts about a benchmark that its definition in the harness does not hold.

    Attributes:
        definition: file below the harness's folder of tasks.
        main_metric: the metric that is plotted, as `metric,filter`.
        chance: score of blind guessing.
        columns: the columns that the task reads.
    """

    definition: str
    main_metric: str
    chance: float
    columns: tuple[str, ...]


_CONTENT: dict[str, Any] = yaml.load(
    FILE.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
)
HUB_DATASETS = {
    task: HubDataset(row["dataset"], row["config"], row["revision"], tuple(row["splits"]))
    for task, row in _CONTENT["benchmarks"].items()
}
"""Datasets of the built-in benchmarks."""

BUILT_IN_BENCHMARKS = {
    task: BuiltInBenchmark(
        row["definition"], row["main_metric"], row["chance"], tuple(row["columns"])
    )
    for task, row in _CONTENT["benchmarks"].items()
}

BENCHMARK_SIZES: dict[str, dict[str, Any]] = {
    task: row["size"] for task, row in _CONTENT["benchmarks"].items()
}
"""Sizes of the built-in benchmarks: arguments of `TaskSize`."""

HUB_TABLE_SIZES: dict[tuple[str, str], dict[str, Any]] = {
    (dataset, table): size
    for dataset, tables in _CONTENT["tables"].items()
    for table, size in tables.items()
}
"""Sizes of published tables by dataset and table: arguments of `TableSize`."""
