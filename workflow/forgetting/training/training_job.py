"""What a job that trains a run group is given on its command line, and what it tells as it goes."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from forgetting.benchmarks.during_training import training_benchmarks
from forgetting.config.evaluation import TrainingBenchmarksConfig
from forgetting.config.expand import RunGroupConfig
from forgetting.data.checks import SourceLocator
from forgetting.data.tables import prepared_rows, read_prepared, read_training_rows
from forgetting.digests import sha256
from forgetting.evaluation.divergence import load_base_predictions
from forgetting.evaluation.metrics import mean_score
from forgetting.io import read_table
from forgetting.models.loading import get_device, load_tokenizer, read_base, resolve_precision
from forgetting.schedule import LrSchedule
from forgetting.training.checkpoints import TrainState
from forgetting.training.distributed import ProcessGroup
from forgetting.training.run_group import RunContext


@dataclass(frozen=True)
class TrainingJob:
    """The methods and seeds of a run group, what their runs share, and digests of what matters."""

    configs: list[RunGroupConfig]
    context: RunContext
    inputs: dict[str, str]


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every program that trains."""
    parser.add_argument("--params", type=Path, required=True, help="parameters (JSON)")
    parser.add_argument("--base", type=Path, required=True, help="record of the base")
    parser.add_argument("--base-items", type=Path, required=True, help="scores of the base")
    parser.add_argument("--data", type=Path, required=True, help="folder of the prepared data")
    parser.add_argument(
        "--general", type=Path, nargs="*", default=[], help="files of the mitigation's tables"
    )
    parser.add_argument(
        "--targets", type=Path, nargs="?", help="the base's predictions on the general text"
    )
    parser.add_argument("--state", type=Path, required=True, help="folder of runs and checkpoints")
    parser.add_argument("--items", type=Path, required=True, help="output: items (parquet)")
    parser.add_argument(
        "--benchmarks", type=Path, nargs="?", help="output: items of benchmarks (parquet)"
    )
    parser.add_argument("--runs", type=Path, required=True, help="output: records (JSON)")
    parser.add_argument(
        "--checkpoints", type=Path, required=True, help="output: folders of the runs (JSON)"
    )


def read_training_job(
    spec: RunGroupConfig,
    versions: str,
    benchmarks: TrainingBenchmarksConfig | None,
    benchmark_rows: Mapping[str, Path],
    options: argparse.Namespace,
    process_group: ProcessGroup,
) -> TrainingJob:
    """Read all files that the options of a program name.

    Args:
        spec: the runs of a method and seed.
        versions: versions of the stages that the job runs.
        benchmarks: benchmarks of every evaluation.
        benchmark_rows: folder of SPLIT.jsonl by task.
        options: see `add_training_options`.
        process_group: of the processes that train together.
    """
    base = read_base(options.base)
    device = get_device()
    precision = resolve_precision(spec.precision, device)
    probe_files = {name: options.data / "probes" / f"{name}.jsonl" for name in spec.knowledge}
    named = spec.method.mitigation.tables if spec.method.mitigation else []
    general = dict(zip(named, options.general, strict=True))
    tokenizer = load_tokenizer(Path(base["path"]))
    along = training_benchmarks(benchmarks, benchmark_rows, tokenizer)
    context = RunContext(
        base=Path(base["path"]),
        parameters=base["parameters"],
        tokenizer=tokenizer,
        train=prepared_rows(options.data / "train.jsonl"),
        probes={name: read_prepared(path) for name, path in probe_files.items()},
        base_value=mean_score(
            read_table(options.base_items), spec.selection.probe, spec.selection.metric
        ),
        device=device,
        precision=precision,
        general_text={
            table: read_training_rows(path, table, spec.columns[table])
            for table, path in general.items()
        },
        base_predictions=load_base_predictions(options.targets) if options.targets else None,
        training_benchmarks=along,
        process_group=process_group,
        source_line=SourceLocator(options.data, general),
    )
    inputs = {
        "base": base["identity"],
        "train": sha256(options.data / "train.jsonl"),
        "precision": str(precision),
        "versions": versions,
        **{f"probe {name}": sha256(path) for name, path in probe_files.items()},
        **{f"table {name}": sha256(path) for name, path in general.items()},
        **({"text": sha256(options.targets)} if options.targets else {}),
        **({"benchmarks": along.digest} if along else {}),
    }
    return TrainingJob([spec], context, inputs)


class ProgressLogger:
    """Print a line every few seconds, and at every evaluation: the first process does."""

    every_seconds = 5.0

    def __init__(self, process_group: ProcessGroup) -> None:
        self.silent = not process_group.is_main
        self.told = -self.every_seconds

    def __call__(self, run: str, progress: TrainState, schedule: LrSchedule) -> None:
        """Say which run is at which step, its loss, its speed and the time left."""
        if self.silent:
            return
        now = time.monotonic()
        evaluation = (run, progress.step) if progress.step in schedule.evaluations else None
        if evaluation is None and now - self.told < self.every_seconds:
            return
        self.told = now
        rate = progress.tokens / max(progress.seconds, 1e-9)
        left = (schedule.steps - progress.step) * progress.seconds / max(progress.step, 1)
        measured = evaluation and math.isfinite(progress.evaluations[-1][2])
        score = f", score {progress.evaluations[-1][2]:.3f}" if measured else ""
        print(
            f"{run}: step {progress.step}/{schedule.steps}, loss {progress.losses[-1]:.3f}{score}, "
            f"{rate:,.0f} tokens/s, {left:.0f} s of training left",
            flush=True,
        )
