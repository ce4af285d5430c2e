"""A job that trains a run group: its command line, inputs, runs, outputs and progress log."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from forgetting.benchmarks.during_training import TrainingBenchmarks, split_items
from forgetting.config.expand import RunGroupConfig, run_name
from forgetting.config.job_params import FinetuneParams
from forgetting.config.methods import Hyperparameters
from forgetting.data.checks import SourceLocator
from forgetting.data.table_files import Locate, Row
from forgetting.data.tables import prepared_rows, read_prepared, read_training_rows
from forgetting.digests import sha256
from forgetting.evaluation.divergence import BasePredictions, load_base_predictions
from forgetting.evaluation.metrics import mean_score
from forgetting.io import content_key, read_table, removal_command, write_json, write_table
from forgetting.models.loading import (
    Model,
    get_device,
    load_tokenizer,
    read_base,
    resolve_precision,
    silence_libraries,
)
from forgetting.schedule import LrSchedule
from forgetting.training.checkpoints import TrainState, items_file
from forgetting.training.distributed import SINGLE_PROCESS, ProcessGroup

P = TypeVar("P", bound=FinetuneParams)


Log: TypeAlias = Callable[[str, TrainState, LrSchedule], None]
"""Called after every step with the name of the run."""


@dataclass(frozen=True)
class RunContext:
    """What all runs of a run group share.

    Attributes:
        base: folder of the base model.
        tokenizer: tokenizer of the base model.
        train: rows of the new knowledge.
        probes: rows of each probe.
        base_value: value of the selection metric for the base model.
        device: device that trains.
        precision: type in which matrices are multiplied.
        general_text: rows of the tables that the mitigation of the method reads.
        base_predictions: predictions of the base model on the general text of the study.
        training_benchmarks: evaluates a model on the in-training benchmarks, if there are any.
        process_group: processes that train each run.
        parameters: number of parameters of the base, from its record.
        source_line: returns the file and line of a row, for messages.
    """

    base: Path
    tokenizer: PreTrainedTokenizerBase
    train: Iterable[Row]
    probes: Mapping[str, list[Row]]
    base_value: float
    device: torch.device
    precision: torch.dtype
    general_text: Mapping[str, Iterable[Row]] = field(default_factory=dict)
    base_predictions: BasePredictions | None = None
    training_benchmarks: Callable[[Model], pd.DataFrame] | None = None
    process_group: ProcessGroup = SINGLE_PROCESS
    parameters: int | None = None
    source_line: Locate = str


@dataclass(frozen=True)
class RunFolder:
    """A run of the run group, and the folder with its results and checkpoints."""

    hyperparameters: Hyperparameters
    name: str
    key: str
    folder: Path

    @property
    def record(self) -> Path:
        """Return the file that is written when the run is finished."""
        return self.folder / "run.json"


@dataclass(frozen=True)
class TrainingJob:
    """The runs that a job trains, and all that they share.

    Attributes:
        config: settings of the runs.
        context: models, data and devices of the runs.
        inputs: digests of the inputs, by name, which are part of the key of every run.
        state: folder of all runs.
        log: called after every step.
    """

    config: RunGroupConfig
    context: RunContext
    inputs: Mapping[str, str]
    state: Path
    log: Log

    def run(self, hyperparameters: Hyperparameters) -> RunFolder:
        """Return the run with these hyperparameters, and its folder."""
        name = run_name(self.config.method.name, self.config.seed, hyperparameters)
        key = run_key(self.config, hyperparameters, self.inputs)
        return RunFolder(hyperparameters, name, key, self.state / name / key)


def run_key(
    config: RunGroupConfig, hyperparameters: Hyperparameters, inputs: Mapping[str, str]
) -> str:
    """Return a digest of all that a run depends on: settings, inputs and stage versions."""
    values = config.model_dump(
        exclude={"method": {"hyperparameters", "selected_hyperparameters", "label"}}
    )
    # How a batch is split into forward passes, and which runs share them, changes no result.
    for key in ("activation_checkpointing", "batched_lora"):
        del values["training"][key]
    if not config.method.dropout:  # dropout masks are drawn per pass
        del values["training"]["micro_batch_size"]
    # The rule decides which checkpoints are kept; how hyperparameters are compared does not.
    values["selection"] = {
        key: values["selection"][key]
        for key in ("probe", "metric", "threshold", "stop_after_evaluations")
    }
    # A trunk does not depend on the shorter durations: a further one only adds a branch.
    values["training"]["durations"] = bool(config.training.durations)
    return content_key({"spec": values, "hyperparameters": hyperparameters.model_dump(), **inputs})


def training_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the command line of every program that trains."""
    parser = argparse.ArgumentParser(description=description)
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
    return parser


def run_training_job(
    options: argparse.Namespace,
    params_class: type[P],
    train: Callable[[P, TrainingJob], list[dict[str, Any]]],
) -> None:
    """Train the runs of a job, in as many processes as were started, and write their results.

    Args:
        options: of the command line; see `training_parser`.
        params_class: of the parameters in their file.
        train: trains the runs and returns their records.
    """
    silence_libraries()
    process_group = ProcessGroup.init()
    with process_group.report_once():
        params = params_class.read(options.params)
        job = read_training_job(params, options, process_group)
        records = train(params, job)
        if process_group.is_main:
            items, benchmarks = run_group_items(records)
            write_table(options.items, items)
            if options.benchmarks:
                write_table(options.benchmarks, benchmarks)
            write_json(options.runs, records)
            write_checkpoint_index(options.checkpoints, records)
    process_group.destroy()


def read_training_job(
    params: FinetuneParams, options: argparse.Namespace, process_group: ProcessGroup
) -> TrainingJob:
    """Read all files that the options of a program name."""
    config = params.run_group
    base = read_base(options.base)
    device = get_device()
    precision = resolve_precision(config.precision, device)
    probe_files = {name: options.data / "probes" / f"{name}.jsonl" for name in config.knowledge}
    tables = config.method.mitigation.tables if config.method.mitigation else []
    general = dict(zip(tables, options.general, strict=True))
    tokenizer = load_tokenizer(Path(base["path"]))
    benchmarks = TrainingBenchmarks.of(params.training_benchmarks, params.benchmark_rows, tokenizer)
    context = RunContext(
        base=Path(base["path"]),
        parameters=base["parameters"],
        tokenizer=tokenizer,
        train=prepared_rows(options.data / "train.jsonl"),
        probes={name: read_prepared(path) for name, path in probe_files.items()},
        base_value=mean_score(
            read_table(options.base_items), config.selection.probe, config.selection.metric
        ),
        device=device,
        precision=precision,
        general_text={
            table: read_training_rows(path, table, config.columns[table])
            for table, path in general.items()
        },
        base_predictions=load_base_predictions(options.targets) if options.targets else None,
        training_benchmarks=benchmarks,
        process_group=process_group,
        source_line=SourceLocator(options.data, general),
    )
    inputs = {
        "base": base["identity"],
        "train": sha256(options.data / "train.jsonl"),
        "precision": str(precision),
        "versions": params.versions,
        **{f"probe {name}": sha256(path) for name, path in probe_files.items()},
        **{f"table {name}": sha256(path) for name, path in general.items()},
        **({"text": sha256(options.targets)} if options.targets else {}),
        **({"benchmarks": benchmarks.digest} if benchmarks else {}),
    }
    return TrainingJob(config, context, inputs, options.state, ProgressLogger(process_group))


def run_group_items(records: Sequence[Mapping[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the items of all evaluations of all runs: of the probes, and of the benchmarks.

    The columns are run, step and epoch, then those of `evaluate_probes` or `merge_items`.
    """
    tables = []
    for record in records:
        for step, epoch, _ in record["evaluations"]:
            folder = Path(record["folder"])
            table = read_table(items_file(folder, step), removal_command(folder))
            table.insert(0, "run", record["run"])
            table.insert(1, "step", int(step))
            table.insert(2, "epoch", epoch)
            tables.append(table)
    return split_items(pd.concat(tables, ignore_index=True) if tables else pd.DataFrame())


def write_checkpoint_index(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write the folder of each run, which holds its checkpoints.

    The file is an output of the job within the folder of all runs. Whoever deletes that folder
    deletes the file too, and Snakemake repeats the job before anything needs a checkpoint.
    """
    write_json(path, {record["run"]: record["folder"] for record in records})


class ProgressLogger:
    """Print a line every few seconds and at every evaluation, in the main process only."""

    every_seconds = 5.0

    def __init__(self, process_group: ProcessGroup) -> None:
        self._silent = not process_group.is_main
        self._last_line = -self.every_seconds

    def __call__(self, run: str, progress: TrainState, schedule: LrSchedule) -> None:
        """Print the step, loss and speed of a run, and the training time that is left."""
        if self._silent:
            return
        now = time.monotonic()
        is_evaluation = progress.step in schedule.evaluations
        if not is_evaluation and now - self._last_line < self.every_seconds:
            return
        self._last_line = now
        rate = progress.tokens / max(progress.seconds, 1e-9)
        left = (schedule.steps - progress.step) * progress.seconds / max(progress.step, 1)
        has_score = is_evaluation and math.isfinite(progress.evaluations[-1][2])
        score = f", score {progress.evaluations[-1][2]:.3f}" if has_score else ""
        print(
            f"{run}: step {progress.step}/{schedule.steps}, loss {progress.losses[-1]:.3f}{score}, "
            f"{rate:,.0f} tokens/s, {left:.0f} s of training left",
            flush=True,
        )
