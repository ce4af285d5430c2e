"""Choose the hyper-parameters and the checkpoint of one method, and put the checkpoint aside."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetting.digests import sha256_of_all, visible_files
from forgetting.records import (
    InputError,
    damaged,
    link_recorded,
    read_json,
    read_table,
    removal,
    replacing_folder,
    tells_input_errors,
    write_json,
)
from forgetting.scoring.scores import metric_value
from forgetting.sections.fields import Strict
from forgetting.sections.selection import Selection
from forgetting.select import Choice, Course, choose_setting, course_of, select_checkpoint
from forgetting.settings.plan import Tuning, budget_name, run_name
from forgetting.training.checkpoints import METHOD, OPTIMIZER, checkpoint_damage


class Spec(Strict):
    """What the study says of the choice."""

    tuning: Tuning
    selection: Selection
    seeds: list[int]
    budgets: list[float]


@dataclass(frozen=True)
class Stored:
    """Where the checkpoints of a run are, and the output of the training job that says so."""

    folder: Path
    named_in: Path


@tells_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the selection (JSON) and a folder with the checkpoint of each seed that has one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="JSON: method, rule, seeds")
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
    spec = Spec.model_validate_json(options.spec)
    rule = spec.selection
    base = metric_value(read_table(options.base_items), rule.probe, rule.metric)
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
        (setting, seed): course_of(
            [
                records[run_name(spec.tuning.name, seed, setting, budget)]
                for budget in spec.budgets or (None,)
            ],
            base,
        )
        for setting in spec.tuning.settings
        for seed in spec.seeds
    }
    setting, why = choose_setting(
        {
            setting: [courses[setting, seed].points for seed in spec.seeds]
            for setting in spec.tuning.settings
        },
        rule,
        spec.tuning.fixed,
        {setting for (setting, _), course in courses.items() if course.diverged},
    )
    rows = []
    with replacing_folder(options.checkpoints) as folder:
        for seed in spec.seeds:
            course = courses[setting, seed] if setting else None
            row = _select(spec, course, why, seed, stored, folder)
            if spec.budgets:
                row["ends"] = _put_ends_aside(course, records, stored, folder / f"seed{seed}")
            rows.append(row)
    write_json(options.index, rows)
    write_json(options.selection, rows)
    for row in rows:
        print(
            f"{row['method']}, seed {row['seed']}: {row['run']}, {row['status']}: {row['reason']}"
        )


def _select(
    spec: Spec,
    course: Course | None,
    why: str,
    seed: int,
    stored: Mapping[str, Stored],
    folder: Path,
) -> dict[str, Any]:
    row: dict[str, Any] = {"method": spec.tuning.name, "label": spec.tuning.label, "seed": seed}
    if course is None:
        return row | _told(None, Choice("not_reached", None, why), {})
    choice = select_checkpoint(
        course.points,
        spec.selection.threshold,
        spec.selection.if_not_reached,
        diverged=course.diverged,
        deadline=spec.selection.within_epochs,
    )
    run = course.run_at(choice.point)
    put: dict[str, Any] = {}
    if choice.point is not None:
        put = _put_aside(stored[run], choice.point.step, folder / f"seed{seed}")
    return row | {"setting_reason": why} | _told(run, choice, put)


def _put_ends_aside(
    course: Course | None,
    records: Mapping[str, Mapping[str, Any]],
    stored: Mapping[str, Stored],
    beside: Path,
) -> dict[str, dict[str, Any]]:
    """Put the end of every budget that has one into a folder of its own: `seed0-budget0.5`."""
    ends = {}
    for step, run in course.runs.items() if course else ():
        if step > 0:
            name = budget_name(records[run]["budget"])
            put = _put_aside(stored[run], step, Path(f"{beside}-{name}"))
            ends[name] = {"run": run, "step": step, **put}
    return ends


def _put_aside(stored: Stored, step: int, target: Path) -> dict[str, Any]:
    """Link the weights of a checkpoint (copy where the file system has no links).

    Returns where they come from, and the digest of each file.
    """
    origin = stored.folder / f"step-{step:07d}"
    if wrong := checkpoint_damage(origin):
        remedy = removal(stored.folder, stored.named_in)
        raise damaged(*wrong, remedy, "the run is trained again")
    target.mkdir()
    for file in visible_files(origin):
        if file.name not in (OPTIMIZER, METHOD, "progress.json"):
            link_recorded(file, target / file.name)
    files, _ = sha256_of_all(visible_files(target))
    return {"checkpoint": str(origin), "checkpoints": str(stored.named_in), "files": files}


def _told(run: str | None, choice: Choice, put: Mapping[str, Any]) -> dict[str, Any]:
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
