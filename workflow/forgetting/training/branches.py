"""Runs of several durations that share a trunk, so that their common steps are trained once.

With the schedules wsd and inverse_sqrt, a run does the same steps as every longer run until its
cooldown starts. The trunk is one run without a cooldown; it stores a checkpoint where the cooldown
of each duration starts. The branch of a duration is the ordinary run of that duration, placed in a
folder with this checkpoint. It resumes there and ends bit-identical to a run without a trunk.

Reference: Biderman et al. 2024, arXiv 2405.09673 (continued pretraining).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from forgetting.config.expand import RunGroupConfig, duration_name
from forgetting.config.methods import Hyperparameters
from forgetting.config.training import TrainingConfig
from forgetting.digests import file_damage
from forgetting.io import (
    link_or_copy,
    link_recorded,
    remove_folder,
    rename_synced,
    warn_damaged,
)
from forgetting.models.tuned import checkpoint_damage
from forgetting.schedule import branch_step
from forgetting.training.checkpoints import (
    BRANCH_CHECKPOINTS,
    complete_checkpoints,
    evaluated_items,
    newest_step,
)
from forgetting.training.run_group import train_run_group
from forgetting.training.training_job import TrainingJob


def single_duration(config: RunGroupConfig, duration: float) -> RunGroupConfig:
    """Return the run group whose runs are trained for one duration only."""
    # Not batched, as trunks are not, so that a branch is bit-identical to its run.
    changes = {"epochs": duration, "durations": [], "batched_lora": "never"}
    training = config.training.model_copy(update=changes)
    return config.model_copy(update={"training": training})


def _branch_job(job: TrainingJob, duration: float) -> TrainingJob:
    """Return the job of a duration's branches, in folders with the name of the duration."""
    name = f"{duration_name(duration)}/{job.config.method.name}"
    method = job.config.method.model_copy(update={"name": name})
    config = single_duration(job.config, duration).model_copy(update={"method": method})
    return replace(job, config=config)


def train_trunks(job: TrainingJob) -> list[dict[str, Any]]:
    """Train the trunks that are not finished yet; return the records of all."""
    settings = job.config.method.hyperparameters if job.context.process_group.is_main else ()
    for setting in settings:
        run = job.run(setting)
        if not run.record.exists():
            _link_checkpoint(run.folder, run.folder, math.inf)
    # The other processes wait for the main process at the beginning of `train_run_group`.
    return train_run_group(job)


def train_cooldowns(
    job: TrainingJob, duration: float, trunks: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Train the branches of one duration and return their records.

    A trunk that diverged has no checkpoint at later starts. Its branch resumes from the last
    checkpoint before its start and diverges at the same step. Checkpoints of the trunk that no
    unfinished branch needs are removed at the end.

    Args:
        job: job of the trunks.
        duration: epochs of the branches.
        trunks: records of the trunks.
    """
    training, suffix = job.config.training, duration_name(duration)
    trunk_of = {trunk["run"]: trunk for trunk in trunks}
    settings = {job.run(each).name: each for each in job.config.method.hyperparameters}
    # From the names of the branches' folders to their names in the results.
    names = {f"{suffix}/{name}": f"{name}/{suffix}" for name in settings}
    branches = replace(
        _branch_job(job, duration), log=lambda run, *progress: job.log(names[run], *progress)
    )
    # Only the main process writes; the others wait where `train_run_group` begins and ends.
    written = settings.items() if job.context.process_group.is_main else ()
    for name, setting in written:
        run = branches.run(setting)
        if not run.record.exists():
            start = branch_step(training, duration, trunk_of[name]["steps_per_epoch"])
            _link_checkpoint(Path(trunk_of[name]["folder"]), run.folder, start)
    records = train_run_group(branches, branches=training.has_decay)
    for name, setting in written:
        _prune_trunk(trunk_of[name], job, setting)
    return [
        _branch_record(record, duration, training) | {"run": names[record["run"]]}
        for record in records
    ]


def _branch_record(
    record: Mapping[str, Any], duration: float, training: TrainingConfig
) -> dict[str, Any]:
    """Return the record of a branch with its duration, and its time without the trunk's."""
    start = branch_step(training, duration, record["steps_per_epoch"])
    # All steps take about the same time. The branch of a diverged trunk may have no steps.
    share = 1.0 - start / max(record["steps"], start, 1)
    return {
        **record,
        "duration": duration,
        "training_seconds": share * record["training_seconds"],
    }


def _link_checkpoint(trunk: Path, folder: Path, latest: float) -> None:
    """Link the newest checkpoint of the trunk up to step `latest` into the folder of a run.

    The items of the evaluations before it are linked too. Nothing is done if the run has a
    checkpoint that is as new.
    """
    stored = complete_checkpoints(trunk / BRANCH_CHECKPOINTS)
    step = max((step for step in stored if step <= latest), default=0)
    if step <= newest_step(folder):
        return
    checkpoint = stored[step]
    if damage := checkpoint_damage(checkpoint):
        warn_damaged(*damage, "no branch resumes from it")
        return
    items = evaluated_items(trunk, checkpoint)
    for path in items:
        if kind := file_damage(path):
            warn_damaged(path, kind, "no branch resumes from this run")
            return
    folder.mkdir(parents=True, exist_ok=True)
    for path in items:
        if not (folder / path.name).exists():
            link_recorded(path, folder / path.name)
    partial = folder / f".{checkpoint.name}"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial, copy_function=link_or_copy)
    rename_synced(partial, folder / checkpoint.name)


def _prune_trunk(trunk: Mapping[str, Any], job: TrainingJob, setting: Hyperparameters) -> None:
    """Remove the checkpoints of a finished trunk that no unfinished branch starts from."""
    folder, training = Path(trunk["folder"]), job.config.training
    stored = complete_checkpoints(folder / BRANCH_CHECKPOINTS)
    needed = set()
    for duration in training.durations:
        if not _branch_job(job, duration).run(setting).record.exists():
            start = branch_step(training, duration, trunk["steps_per_epoch"])
            needed.add(max((step for step in stored if step <= start), default=0))
    unused = [path for step, path in stored.items() if step not in needed]
    for checkpoint in [*unused, *folder.glob("step-*")]:
        remove_folder(checkpoint)
