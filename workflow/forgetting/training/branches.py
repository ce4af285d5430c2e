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
from pathlib import Path
from typing import Any

from forgetting.config.expand import RunGroupConfig, duration_name, run_name
from forgetting.config.methods import Hyperparameters
from forgetting.config.training import TrainingConfig
from forgetting.digests import file_damage
from forgetting.io import (
    link_or_copy,
    link_recorded,
    read_json,
    remove_folder,
    rename_synced,
    warn_damaged,
)
from forgetting.models.tuned import checkpoint_damage
from forgetting.schedule import branch_step
from forgetting.training.checkpoints import BRANCH_CHECKPOINTS
from forgetting.training.run_group import Log, RunContext, RunFolder, train_run_group


def single_duration(config: RunGroupConfig, duration: float) -> RunGroupConfig:
    """Return the run group whose runs are trained for one duration only."""
    # Not batched, as trunks are not, so that a branch is bit-identical to its run.
    changes = {"epochs": duration, "durations": [], "batched_lora": "never"}
    training = config.training.model_copy(update=changes)
    return config.model_copy(update={"training": training})


def _branch_config(config: RunGroupConfig, duration: float) -> RunGroupConfig:
    """Return the run group of a duration's branches, in folders with the name of the duration."""
    name = f"{duration_name(duration)}/{config.method.name}"
    method = config.method.model_copy(update={"name": name})
    return single_duration(config, duration).model_copy(update={"method": method})


def train_trunks(
    config: RunGroupConfig,
    context: RunContext,
    inputs: Mapping[str, str],
    state: Path,
    log: Log,
) -> list[dict[str, Any]]:
    """Train the trunks that are not finished yet; return the records of all.

    The arguments are those of `train_run_group`.
    """
    settings = config.method.hyperparameters if context.process_group.is_main else ()
    for setting in settings:
        folder = _run_folder(config, setting, inputs, state)
        if not (folder / "run.json").exists():
            _link_checkpoint(folder, folder, math.inf)
    # The other processes wait for the main process at the beginning of `train_run_group`.
    return train_run_group(config, context, inputs, state, log)


def train_cooldowns(
    config: RunGroupConfig,
    duration: float,
    trunks: Sequence[Mapping[str, Any]],
    context: RunContext,
    inputs: Mapping[str, str],
    state: Path,
    log: Log,
) -> list[dict[str, Any]]:
    """Train the branches of one duration and return their records.

    A trunk that diverged has no checkpoint at later starts. Its branch resumes from the last
    checkpoint before its start and diverges at the same step. Checkpoints of the trunk that no
    unfinished branch needs are removed at the end.

    Args:
        config: settings of the trunks.
        duration: epochs of the branches.
        trunks: records of the trunks.
        context: models, data and devices of the runs.
        inputs: digests of the inputs, by name.
        state: folder of all runs.
        log: called after every step.
    """
    trunk_of = {trunk["run"]: trunk for trunk in trunks}
    settings = {
        run_name(config.method.name, config.seed, each): each
        for each in config.method.hyperparameters
    }
    branches = _branch_config(config, duration)
    # Only the main process writes; the others wait where `train_run_group` begins and ends.
    written = settings.items() if context.process_group.is_main else ()
    for name, setting in written:
        folder = _run_folder(branches, setting, inputs, state)
        if not (folder / "run.json").exists():
            start = branch_step(config.training, duration, trunk_of[name]["steps_per_epoch"])
            _link_checkpoint(Path(trunk_of[name]["folder"]), folder, start)
    suffix = duration_name(duration)
    # From the names of the branches' folders to their names in the results.
    names = {f"{suffix}/{name}": f"{name}/{suffix}" for name in settings}
    records = train_run_group(
        branches,
        context,
        inputs,
        state,
        lambda run, *progress: log(names[run], *progress),
        branches=config.training.has_decay,
    )
    for name, setting in written:
        _prune_trunk(trunk_of[name], config, setting, inputs, state)
    return [
        _branch_record(record, duration, config.training) | {"run": names[record["run"]]}
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


def _run_folder(
    config: RunGroupConfig, setting: Hyperparameters, inputs: Mapping[str, str], state: Path
) -> Path:
    """Return the folder in which `train_run_group` keeps a run."""
    return RunFolder.of(config, setting, inputs, state).folder


def _complete_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the complete checkpoints in a folder, by step."""
    checkpoints = (file.parent for file in folder.glob("step-*/progress.json"))
    return {int(path.name.removeprefix("step-")): path for path in checkpoints}


def _link_checkpoint(trunk: Path, folder: Path, latest: float) -> None:
    """Link the newest checkpoint of the trunk up to step `latest` into the folder of a run.

    The items of the evaluations before it are linked too. Nothing is done if the run has a
    checkpoint that is as new.
    """
    stored = _complete_checkpoints(trunk / BRANCH_CHECKPOINTS)
    step = max((step for step in stored if step <= latest), default=0)
    if step <= max(_complete_checkpoints(folder), default=0):
        return
    checkpoint = stored[step]
    if damage := checkpoint_damage(checkpoint):
        warn_damaged(*damage, "no branch resumes from it")
        return
    points = read_json(checkpoint / "progress.json")["evaluations"]
    items = [f"items-{int(point[0]):07d}.parquet" for point in points]
    for name in items:
        if kind := file_damage(trunk / name):
            warn_damaged(trunk / name, kind, "no branch resumes from this run")
            return
    folder.mkdir(parents=True, exist_ok=True)
    for name in items:
        if not (folder / name).exists():
            link_recorded(trunk / name, folder / name)
    partial = folder / f".{checkpoint.name}"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial, copy_function=link_or_copy)
    rename_synced(partial, folder / checkpoint.name)


def _prune_trunk(
    trunk: Mapping[str, Any],
    config: RunGroupConfig,
    setting: Hyperparameters,
    inputs: Mapping[str, str],
    state: Path,
) -> None:
    """Remove the checkpoints of a finished trunk that no unfinished branch starts from."""
    folder = Path(trunk["folder"])
    stored = _complete_checkpoints(folder / BRANCH_CHECKPOINTS)
    needed = set()
    for duration in config.training.durations:
        branch = _run_folder(_branch_config(config, duration), setting, inputs, state)
        if not (branch / "run.json").exists():
            start = branch_step(config.training, duration, trunk["steps_per_epoch"])
            needed.add(max((step for step in stored if step <= start), default=0))
    unused = [path for step, path in stored.items() if step not in needed]
    for checkpoint in [*unused, *folder.glob("step-*")]:
        remove_folder(checkpoint)
