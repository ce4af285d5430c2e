"""Datasets of the Hugging Face hub with revisions and sizes, from hub_datasets.yaml."""

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


_CONTENT: dict[str, Any] = yaml.load(
    FILE.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
)
HUB_DATASETS = {
    task: HubDataset(row["dataset"], row["config"], row["revision"], tuple(row["splits"]))
    for task, row in _CONTENT["benchmarks"].items()
}
"""Datasets of the built-in benchmarks."""

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
