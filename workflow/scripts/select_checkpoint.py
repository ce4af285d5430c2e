"""Choose the hyper-parameters and the checkpoint of one method, and put the checkpoint aside."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from forgetting.records import (
    InputError,
    link_or_copy,
    read_json,
    sha256,
    tells_input_errors,
    write_json,
)
from forgetting.scoring.scores import metric_value
from forgetting.sections.fields import Strict
from forgetting.sections.selection import Selection
from forgetting.select import Choice, Course, choose_setting, course_of, select_checkpoint
from forgetting.settings.plan import Tuning, budget_name, run_name


class Spec(Strict):
    """What the study says of the choice."""

    tuning: Tuning
    selection: Selection
    seeds: list[int]
    budgets: list[float]


@tells_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the selection (JSON) and a folder with the checkpoint of each seed that has one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="JSON: method, rule, seeds")
    parser.add_argument("--base-items", type=Path, required=True, help="scores of the base")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="records of the runs")
    parser.add_argument("--selection", type=Path, required=True, help="output: the choice (JSON)")
    parser.add_argument("--checkpoints", type=Path, required=True, help="output: folder")
    options = parser.parse_args(argv)
    spec = Spec.model_validate_json(options.spec)
    rule = spec.selection
    base = metric_value(pd.read_parquet(options.base_items), rule.probe, rule.metric)
    if not math.isfinite(base):
        raise InputError(
            f"selection.metric: {rule.metric} of the base on {rule.probe} is no finite number; "
            "choose another metric or probe"
        )
    records = {record["run"]: record for path in options.runs for record in read_json(path)}

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
    shutil.rmtree(options.checkpoints, ignore_errors=True)
    options.checkpoints.mkdir(parents=True)
    rows = []
    for seed in spec.seeds:
        course = courses[setting, seed] if setting else None
        row = _select(spec, course, why, seed, records, options.checkpoints)
        if spec.budgets:
            row["ends"] = _put_ends_aside(course, records, options.checkpoints / f"seed{seed}")
        rows.append(row)
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
    records: dict[str, dict[str, Any]],
    folder: Path,
) -> dict[str, Any]:
    row: dict[str, Any] = {"method": spec.tuning.name, "label": spec.tuning.label, "seed": seed}
    if course is None:
        return row | _told(None, Choice("not_reached", None, why), [], folder)
    choice = select_checkpoint(
        course.points,
        spec.selection.threshold,
        spec.selection.if_not_reached,
        diverged=course.diverged,
        deadline=spec.selection.within_epochs,
    )
    run = course.run_at(choice.point)
    files: Sequence[Path] = []
    if choice.point is not None:
        origin = _checkpoint(records[run], choice.point.step)
        files = _put_aside(origin, folder / f"seed{seed}")
    return row | {"setting_reason": why} | _told(run, choice, files, folder)


def _put_ends_aside(
    course: Course | None, records: dict[str, dict[str, Any]], beside: Path
) -> dict[str, dict[str, Any]]:
    """Put the end of every budget that has one into a folder of its own: `seed0-budget0.5`."""
    ends = {}
    for step, run in course.runs.items() if course else ():
        if step > 0:
            name = budget_name(records[run]["budget"])
            _put_aside(_checkpoint(records[run], step), Path(f"{beside}-{name}"))
            ends[name] = {"run": run, "step": step}
    return ends


def _checkpoint(record: dict[str, Any], step: int) -> Path:
    return Path(record["folder"]) / f"step-{step:07d}"


def _put_aside(origin: Path, target: Path) -> list[Path]:
    """Link the checkpoint's files (copy where the file system cannot), without training state."""
    target.mkdir()
    for file in sorted(origin.iterdir()):
        if file.name == "progress.json":
            continue
        link_or_copy(file, target / file.name)
    return sorted(target.iterdir())


def _told(run: str | None, choice: Choice, files: Sequence[Path], folder: Path) -> dict[str, Any]:
    return {
        "run": run,
        "step": choice.point.step if choice.point else None,
        "epoch": choice.point.epoch if choice.point else None,
        "value": choice.point.value if choice.point else None,
        "status": choice.status,
        "reason": choice.reason,
        "files": {str(file.relative_to(folder)): sha256(file) for file in files},
    }


if __name__ == "__main__":
    main()
