"""Train one cohort: all learning rates and weight decays of one method and seed.

Started alone, or several times by `python -m forgetting.launch`, to train each run together.
Finished runs and checkpoints are kept in a folder that is no output of the rule, so that a retry
goes on where the job was killed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pandas as pd

from forgetting.checkpoints import Progress
from forgetting.cohort import CohortSpec, Materials, cohort_items, train_cohort
from forgetting.data import general_rows
from forgetting.models import load_tokenizer, pick_device, pick_precision, quieten_libraries
from forgetting.optimize import Schedule
from forgetting.parallel import Team
from forgetting.records import (
    read_json,
    read_jsonl,
    sha256,
    tells_input_errors,
    write_json,
    write_table,
)
from forgetting.scores import metric_value


@tells_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the items of all evaluations and the records of all runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="JSON: the cohort")
    parser.add_argument("--code", required=True, help="digest of the code that trains")
    parser.add_argument("--base", type=Path, required=True, help="record of the base")
    parser.add_argument("--base-items", type=Path, required=True, help="scores of the base")
    parser.add_argument("--data", type=Path, required=True, help="folder of the prepared data")
    parser.add_argument(
        "--general", type=Path, nargs="*", default=[], help="files of the mitigation's tables"
    )
    parser.add_argument("--state", type=Path, required=True, help="folder of runs and checkpoints")
    parser.add_argument("--items", type=Path, required=True, help="output: items (parquet)")
    parser.add_argument("--runs", type=Path, required=True, help="output: records (JSON)")
    options = parser.parse_args(argv)
    quieten_libraries()
    team = Team.join()
    with team.one_voice():
        _finetune(options, team)
    team.leave()


def _finetune(options: argparse.Namespace, team: Team) -> None:
    spec = CohortSpec.model_validate_json(options.spec)
    base = read_json(options.base)
    device = pick_device()
    precision = pick_precision(spec.precision, device)
    probe_files = {name: options.data / "probes" / f"{name}.jsonl" for name in spec.knowledge}
    named = spec.tuning.mitigation.tables if spec.tuning.mitigation else []
    general = dict(zip(named, options.general, strict=True))
    materials = Materials(
        base=Path(base["path"]),
        tokenizer=load_tokenizer(Path(base["path"])),
        train=read_jsonl(options.data / "train.jsonl"),
        probes={name: read_jsonl(path) for name, path in probe_files.items()},
        base_value=metric_value(
            pd.read_parquet(options.base_items), spec.selection.probe, spec.selection.metric
        ),
        device=device,
        precision=precision,
        general={table: general_rows(path, table) for table, path in general.items()},
        team=team,
    )
    inputs = {
        "base": base["identity"],
        "train": sha256(options.data / "train.jsonl"),
        "precision": str(precision),
        "code": options.code,
        **{f"probe {name}": sha256(path) for name, path in probe_files.items()},
        **{f"table {name}": sha256(path) for name, path in general.items()},
    }
    tell = Teller() if team.first else lambda run, progress, schedule: None
    records = train_cohort(spec, materials, inputs, options.state, tell)
    if team.first:
        write_table(options.items, cohort_items(records))
        write_json(options.runs, records)


class Teller:
    """Print a line every few seconds, and at every evaluation."""

    every_seconds = 5.0

    def __init__(self) -> None:
        self.told = -self.every_seconds

    def __call__(self, run: str, progress: Progress, schedule: Schedule) -> None:
        """Say which run is at which step, its loss, its speed and the time left."""
        now = time.monotonic()
        evaluation = (run, progress.step) if progress.step in schedule.evaluations else None
        if evaluation is None and now - self.told < self.every_seconds:
            return
        self.told = now
        rate = progress.tokens / max(progress.seconds, 1e-9)
        left = (schedule.steps - progress.step) * progress.seconds / max(progress.step, 1)
        score = f", score {progress.points[-1][2]:.3f}" if evaluation else ""
        print(
            f"{run}: step {progress.step}/{schedule.steps}, loss {progress.losses[-1]:.3f}{score}, "
            f"{rate:,.0f} tokens/s, {left:.0f} s of training left",
            flush=True,
        )


if __name__ == "__main__":
    main()
