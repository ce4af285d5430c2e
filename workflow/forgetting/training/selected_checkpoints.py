"""Select the hyperparameters and checkpoints of a method, and link the checkpoints' weights.

The rules are in `forgetting.selection`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from forgetting.config.expand import duration_name, run_name
from forgetting.config.job_params import SelectCheckpointParams
from forgetting.config.methods import Hyperparameters
from forgetting.digests import sha256_of_all, visible_files
from forgetting.errors import InputError
from forgetting.evaluation.metrics import mean_score
from forgetting.io import damage_error, link_recorded, read_json, read_table, removal_command
from forgetting.models.tuned import METHOD_FILE, OPTIMIZER_FILE, STATE_FILE, checkpoint_damage
from forgetting.selection import (
    CheckpointChoice,
    Trajectory,
    choose_hyperparameters,
    select_checkpoint,
    trajectory_of,
)
from forgetting.training.checkpoints import checkpoint_folder


@dataclass(frozen=True)
class StoredRun:
    """Folder of a run's checkpoints, and the output of the training job that names it."""

    folder: Path
    index: Path


@dataclass(frozen=True)
class TrainedRuns:
    """The trained runs of a method.

    Attributes:
        params: method, seeds, durations and rules.
        records: record of each run, by name.
        stored: where the checkpoints of each run are, by name.
        base_value: selection metric of the base model.
    """

    params: SelectCheckpointParams
    records: Mapping[str, Mapping[str, Any]]
    stored: Mapping[str, StoredRun]
    base_value: float

    @classmethod
    def read(
        cls,
        params: SelectCheckpointParams,
        base_items: Path,
        runs: Sequence[Path],
        indexes: Sequence[Path],
    ) -> Self:
        """Read the outputs of the training jobs.

        Args:
            params: method, seeds, durations and rules.
            base_items: scores of the base model.
            runs: records of the runs.
            indexes: files that name the folders of the runs' checkpoints.

        Raises:
            InputError: the metric of the base model is not finite.
        """
        rule = params.selection
        base_value = mean_score(read_table(base_items), rule.probe, rule.metric)
        if not math.isfinite(base_value):
            raise InputError(
                f"selection.metric: {rule.metric} of the base on {rule.probe} is no finite "
                "number; choose another metric or probe"
            )
        records = {record["run"]: record for path in runs for record in read_json(path)}
        stored = {
            run: StoredRun(Path(folder), path)
            for path in indexes
            for run, folder in read_json(path).items()
        }
        return cls(params, records, stored, base_value)

    def trajectory(self, setting: Hyperparameters, seed: int) -> Trajectory:
        """Return the trajectory of one setting and seed."""
        durations = self.params.durations or (None,)
        names = [run_name(self.params.method.name, seed, setting, each) for each in durations]
        return trajectory_of([self.records[name] for name in names], self.base_value)


def select_checkpoints(runs: TrainedRuns, folder: Path) -> list[dict[str, Any]]:
    """Select the hyperparameters of a method and a checkpoint of each seed.

    Args:
        runs: the trained runs.
        folder: receives the weights: `seed0`, and `seed0-duration0.5` of every duration's end.

    Returns:
        One row per seed: method, label, seed, run, step, epoch, value, status, reason,
        setting_reason, and the origin and digests of the linked files. With durations, `ends` has
        run, step and files of the end of each.
    """
    params, method = runs.params, runs.params.method
    trajectories = {
        setting: [runs.trajectory(setting, seed) for seed in params.seeds]
        for setting in method.hyperparameters
    }
    setting, reason = choose_hyperparameters(
        {key: [each.evaluations for each in found] for key, found in trajectories.items()},
        params.selection,
        method.selected_hyperparameters,
        {key for key, found in trajectories.items() if any(each.diverged for each in found)},
    )
    rows = []
    for number, seed in enumerate(params.seeds):
        target = folder / f"seed{seed}"
        trajectory = trajectories[setting][number] if setting else None
        row = {"method": method.name, "label": method.label, "seed": seed}
        if trajectory is None:
            row |= _choice_columns(None, CheckpointChoice("not_reached", None, reason))
        else:
            row |= {"setting_reason": reason} | _select_seed(runs, trajectory, target)
        if params.durations:
            row["ends"] = _link_ends(runs, trajectory, target)
        rows.append(row)
    return rows


def _select_seed(runs: TrainedRuns, trajectory: Trajectory, target: Path) -> dict[str, Any]:
    """Select the checkpoint of a seed and link its weights, if there is one."""
    rule = runs.params.selection
    choice = select_checkpoint(
        trajectory.evaluations,
        rule.threshold,
        rule.if_not_reached,
        diverged=trajectory.diverged,
        deadline=rule.deadline_epochs,
    )
    run = trajectory.run_at(choice.point)
    columns = _choice_columns(run, choice)
    if choice.point is not None:
        columns |= _link_weights(runs.stored[run], choice.point.step, target)
    return columns


def _link_ends(
    runs: TrainedRuns, trajectory: Trajectory | None, target: Path
) -> dict[str, dict[str, Any]]:
    """Link the end of every duration that has one into `TARGET-durationD`."""
    ends = {}
    for step, run in trajectory.runs.items() if trajectory else ():
        if step > 0:
            name = duration_name(runs.records[run]["duration"])
            files = _link_weights(runs.stored[run], step, Path(f"{target}-{name}"))
            ends[name] = {"run": run, "step": step, **files}
    return ends


def _link_weights(stored: StoredRun, step: int, target: Path) -> dict[str, Any]:
    """Link the weights of a checkpoint, or copy them where the file system has no links.

    Returns:
        The folder they come from, the file that names it, and the digest of each file.
    """
    origin = checkpoint_folder(stored.folder, step)
    if damage := checkpoint_damage(origin):
        remedy = removal_command(stored.folder, stored.index)
        raise damage_error(*damage, remedy, "the run is trained again")
    target.mkdir()
    for file in visible_files(origin):
        if file.name not in (OPTIMIZER_FILE, METHOD_FILE, STATE_FILE):
            link_recorded(file, target / file.name)
    files, _ = sha256_of_all(visible_files(target))
    return {"checkpoint": str(origin), "checkpoints": str(stored.index), "files": files}


def _choice_columns(run: str | None, choice: CheckpointChoice) -> dict[str, Any]:
    return {
        "run": run,
        "step": choice.point.step if choice.point else None,
        "epoch": choice.point.epoch if choice.point else None,
        "value": choice.point.value if choice.point else None,
        "status": choice.status,
        "reason": choice.reason,
    }
