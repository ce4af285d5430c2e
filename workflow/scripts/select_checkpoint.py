"""Choose the hyper-parameters and the checkpoint of one method, and put the checkpoint aside."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetting.config.expand import duration_name, run_name
from forgetting.digests import sha256_of_all, visible_files
from forgetting.errors import InputError, reports_input_errors
from forgetting.evaluation.metrics import mean_score
from forgetting.io import (
    atomic_folder,
    damage_error,
    link_recorded,
    read_json,
    read_table,
    removal_command,
    write_json,
)
from forgetting.models.tuned import METHOD_FILE, OPTIMIZER_FILE, checkpoint_damage
from forgetting.pipeline.params import SelectCheckpointParams
from forgetting.selection import (
    CheckpointChoice,
    Trajectory,
    choose_hyperparameters,
    select_checkpoint,
    trajectory_of,
)


@dataclass(frozen=True)
class Stored:
    """Where the checkpoints of a run are, and the output of the training job that says so."""

    folder: Path
    named_in: Path


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the selection (JSON) and a folder with the checkpoint of each seed that has one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True, help="parameters (JSON)")
    parser.add_argument("--base-items", type=Path, required=True, help="scores of the base")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="records of the runs")
    parser.add_argument(
        "--stored", type=Path, nargs="+", required=True, help="where the runs' checkpoints are"
    )
    parser.add_argument("--selection", type=Path, required=True, help="output: the choice (JSON)")
    parser.add_argument(
        "--checkpoints", type=Path, required=True, help="folder of the selected checkpoints"
    )
    parser.add_argument(
        "--index", type=Path, required=True, help="output: the choice again, in that folder"
    )
    options = parser.parse_args(argv)
    spec = SelectCheckpointParams.read(options.params)
    rule = spec.selection
    base = mean_score(read_table(options.base_items), rule.probe, rule.metric)
    if not math.isfinite(base):
        raise InputError(
            f"selection.metric: {rule.metric} of the base on {rule.probe} is no finite number; "
            "choose another metric or probe"
        )
    records = {record["run"]: record for path in options.runs for record in read_json(path)}
    stored = {
        run: Stored(Path(folder), path)
        for path in options.stored
        for run, folder in read_json(path).items()
    }

    courses = {
        (setting, seed): trajectory_of(
            [
                records[run_name(spec.method.name, seed, setting, duration)]
                for duration in spec.durations or (None,)
            ],
            base,
        )
        for setting in spec.method.hyperparameters
        for seed in spec.seeds
    }
    setting, why = choose_hyperparameters(
        {
            setting: [courses[setting, seed].evaluations for seed in spec.seeds]
            for setting in spec.method.hyperparameters
        },
        rule,
        spec.method.selected_hyperparameters,
        {setting for (setting, _), course in courses.items() if course.diverged},
    )
    rows = []
    with atomic_folder(options.checkpoints) as folder:
        for seed in spec.seeds:
            course = courses[setting, seed] if setting else None
            row = _select(spec, course, why, seed, stored, folder)
            if spec.durations:
                row["ends"] = _put_ends_aside(course, records, stored, folder / f"seed{seed}")
            rows.append(row)
    write_json(options.index, rows)
    write_json(options.selection, rows)
    for row in rows:
        print(
            f"{row['method']}, seed {row['seed']}: {row['run']}, {row['status']}: {row['reason']}"
        )


def _select(
    spec: SelectCheckpointParams,
    course: Trajectory | None,
    why: str,
    seed: int,
    stored: Mapping[str, Stored],
    folder: Path,
) -> dict[str, Any]:
    row: dict[str, Any] = {"method": spec.method.name, "label": spec.method.label, "seed": seed}
    if course is None:
        return row | _told(None, CheckpointChoice("not_reached", None, why), {})
    choice = select_checkpoint(
        course.evaluations,
        spec.selection.threshold,
        spec.selection.if_not_reached,
        diverged=course.diverged,
        deadline=spec.selection.deadline_epochs,
    )
    run = course.run_at(choice.point)
    put: dict[str, Any] = {}
    if choice.point is not None:
        put = _put_aside(stored[run], choice.point.step, folder / f"seed{seed}")
    return row | {"setting_reason": why} | _told(run, choice, put)


def _put_ends_aside(
    course: Trajectory | None,
    records: Mapping[str, Mapping[str, Any]],
    stored: Mapping[str, Stored],
    folder: Path,
) -> dict[str, dict[str, Any]]:
    """Put the end of every duration that has one into a folder of its own: `seed0-duration0.5`."""
    ends = {}
    for step, run in course.runs.items() if course else ():
        if step > 0:
            name = duration_name(records[run]["duration"])
            put = _put_aside(stored[run], step, Path(f"{folder}-{name}"))
            ends[name] = {"run": run, "step": step, **put}
    return ends


def _put_aside(stored: Stored, step: int, target: Path) -> dict[str, Any]:
    """Link the weights of a checkpoint (copy where the file system has no links).

    Returns where they come from, and the digest of each file.
    """
    origin = stored.folder / f"step-{step:07d}"
    if wrong := checkpoint_damage(origin):
        remedy = removal_command(stored.folder, stored.named_in)
        raise damage_error(*wrong, remedy, "the run is trained again")
    target.mkdir()
    for file in visible_files(origin):
        if file.name not in (OPTIMIZER_FILE, METHOD_FILE, "progress.json"):
            link_recorded(file, target / file.name)
    files, _ = sha256_of_all(visible_files(target))
    return {"checkpoint": str(origin), "checkpoints": str(stored.named_in), "files": files}


def _told(run: str | None, choice: CheckpointChoice, put: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "run": run,
        "step": choice.point.step if choice.point else None,
        "epoch": choice.point.epoch if choice.point else None,
        "value": choice.point.value if choice.point else None,
        "status": choice.status,
        "reason": choice.reason,
        **put,
    }


if __name__ == "__main__":
    main()
