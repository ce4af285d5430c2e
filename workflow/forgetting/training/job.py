"""What a job that trains a cohort is given on its command line, and what it tells as it goes."""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

from forgetting.benchmarks.along import add_along_options, read_along
from forgetting.data.origins import Origins
from forgetting.data.rows import general_rows, prepared_lines, read_prepared
from forgetting.digests import sha256
from forgetting.models.base import read_base
from forgetting.models.loading import load_tokenizer, pick_device, pick_precision
from forgetting.records import read_table
from forgetting.scoring.drift import load_targets
from forgetting.scoring.scores import metric_value
from forgetting.training.checkpoints import Progress
from forgetting.training.materials import CohortSpec, Materials
from forgetting.training.schedule import Schedule
from forgetting.training.team import Team


@dataclass(frozen=True)
class Job:
    """The methods and seeds of a cohort, what their runs share, and digests of what matters."""

    specs: list[CohortSpec]
    materials: Materials
    inputs: dict[str, str]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every job that trains."""
    parser.add_argument("--spec", required=True, help="JSON: the study, and methods with seeds")
    parser.add_argument("--versions", required=True, help="versions of the stages that it runs")
    parser.add_argument("--base", type=Path, required=True, help="record of the base")
    parser.add_argument("--base-items", type=Path, required=True, help="scores of the base")
    parser.add_argument("--data", type=Path, required=True, help="folder of the prepared data")
    parser.add_argument(
        "--general", type=Path, action="append", default=[], help="file of a mitigation's table"
    )
    parser.add_argument("--targets", type=Path, help="the base's predictions on the general text")
    add_along_options(parser)
    parser.add_argument("--state", type=Path, required=True, help="folder of runs and checkpoints")
    parser.add_argument("--items", type=Path, required=True, help="output: items (parquet)")
    parser.add_argument("--runs", type=Path, required=True, help="output: records (JSON)")
    parser.add_argument(
        "--checkpoints", type=Path, required=True, help="output: folders of the runs (JSON)"
    )


def read_job(options: argparse.Namespace, team: Team) -> Job:
    """Read all files that the options name."""
    told = json.loads(options.spec)
    members = told.pop("members")
    specs = [CohortSpec.model_validate(told | member) for member in members]
    # But for method and seed all are alike.
    spec = specs[0]
    base = read_base(options.base)
    device = pick_device()
    precision = pick_precision(spec.precision, device)
    probe_files = {name: options.data / "probes" / f"{name}.jsonl" for name in spec.knowledge}
    named = spec.tuning.mitigation.tables if spec.tuning.mitigation else []
    general = dict(zip(named, options.general, strict=True))
    tokenizer = load_tokenizer(Path(base["path"]))
    along = read_along(options, tokenizer)
    materials = Materials(
        base=Path(base["path"]),
        parameters=base["parameters"],
        tokenizer=tokenizer,
        train=prepared_lines(options.data / "train.jsonl"),
        probes={name: read_prepared(path) for name, path in probe_files.items()},
        base_value=metric_value(
            read_table(options.base_items), spec.selection.probe, spec.selection.metric
        ),
        device=device,
        precision=precision,
        general={
            table: general_rows(path, table, spec.columns[table]) for table, path in general.items()
        },
        targets=load_targets(options.targets) if options.targets else None,
        along=along,
        team=team,
        where=Origins(options.data, general),
    )
    inputs = {
        "base": base["identity"],
        "train": sha256(options.data / "train.jsonl"),
        "precision": str(precision),
        "versions": options.versions,
        **{f"probe {name}": sha256(path) for name, path in probe_files.items()},
        **{f"table {name}": sha256(path) for name, path in general.items()},
        **({"text": sha256(options.targets)} if options.targets else {}),
        **({"benchmarks": along.digest} if along else {}),
    }
    return Job(specs, materials, inputs)


class Teller:
    """Print a line every few seconds, and at every evaluation: the first process does."""

    every_seconds = 5.0

    def __init__(self, team: Team) -> None:
        self.silent = not team.first
        self.told = -self.every_seconds

    def __call__(self, run: str, progress: Progress, schedule: Schedule) -> None:
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
        measured = evaluation and math.isfinite(progress.points[-1][2])
        score = f", score {progress.points[-1][2]:.3f}" if measured else ""
        print(
            f"{run}: step {progress.step}/{schedule.steps}, loss {progress.losses[-1]:.3f}{score}, "
            f"{rate:,.0f} tokens/s, {left:.0f} s of training left",
            flush=True,
        )
