"""Parameter files of programs, as rules write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetting.config.evaluation import TrainingBenchmarksConfig
from forgetting.config.expand import RunGroupConfig
from forgetting.config.job_params import FinetuneParams
from forgetting.io import write_atomically, write_json


def write_params(folder: Path, /, **values: Any) -> Path:
    """Write the parameters of a program into a folder and return the file."""
    path = folder / "params.json"
    write_json(path, values)
    return path


def finetune_params(
    folder: Path,
    run_group: RunGroupConfig,
    versions: str = "c",
    benchmarks: TrainingBenchmarksConfig | None = None,
    benchmark_rows: Mapping[str, Path] | None = None,
) -> Path:
    """Write the parameters of a training job into a folder and return the file."""
    params = FinetuneParams(
        run_group=run_group,
        versions=versions,
        training_benchmarks=benchmarks,
        benchmark_rows=dict(benchmark_rows or {}),
    )
    path = folder / "params.json"
    write_atomically(path, params.model_dump_json())
    return path
