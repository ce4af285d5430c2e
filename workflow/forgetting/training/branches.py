"""Runs of several durations that share a trunk: what they have in common is trained once.

With the schedules wsd and inverse_sqrt a run does what every longer one does, until its
cooldown starts. So one run without a cooldown is trained for all, the trunk, and stores its state
where a duration's cooldown starts. The branch of a duration is the ordinary run of so many epochs,
put in a folder with that state: it goes on from there as if it had been killed there, and ends as
if nothing had been (Biderman et al. 2024, arXiv 2405.09673, continued pretraining).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
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
    warn_if_damaged,
)
from forgetting.models.tuned import checkpoint_damage
from forgetting.schedule import branch_step
from forgetting.training.checkpoints import BRANCH_CHECKPOINTS
from forgetting.training.run_group import Log, RunContext, RunFolder, train_run_group


def single_duration(spec: RunGroupConfig, duration: float) -> RunGroupConfig:
    """The run group whose runs are trained for one duration, and for nothing else."""
    # One after the other, as the trunks: a branch that goes on from one has the same bits.
    alone = {"epochs": duration, "durations": [], "batched_lora": "never"}
    training = spec.training.model_copy(update=alone)
    return spec.model_copy(update={"training": training})


def _branches(spec: RunGroupConfig, duration: float) -> RunGroupConfig:
    """The same under a name of its own, so that its folders are apart from other durations'."""
    name = f"{duration_name(duration)}/{spec.method.name}"
    tuning = spec.method.model_copy(update={"name": name})
    return single_duration(spec, duration).model_copy(update={"method": tuning})


def train_trunks(
    specs: Sequence[RunGroupConfig],
    context: RunContext,
    inputs: Mapping[str, str],
    state: Path,
    tell: Log,
) -> list[dict[str, Any]]:
    """Train the trunk of every setting that is not finished yet; return the records of all."""
    settings = [(spec, setting) for spec in specs for setting in spec.method.hyperparameters]
    for spec, setting in settings if context.process_group.is_main else ():
        folder = _branch_folder(spec, setting, inputs, state)
        if not (folder / "run.json").exists():
            _link_checkpoint(folder, folder, math.inf)
    # Where train_cohort begins, the others wait for what the first process did here.
    return train_run_group(specs, context, inputs, state, tell)


def train_cooldowns(
    spec: RunGroupConfig,
    duration: float,
    trunks: Sequence[Mapping[str, Any]],
    context: RunContext,
    inputs: Mapping[str, str],
    state: Path,
    tell: Log,
) -> list[dict[str, Any]]:
    """Train the branch of one duration of every setting, from the records of the trunks.

    A trunk that diverged has no state at later starts: a branch goes on from the last one before,
    and diverges where it did. What no unfinished branch starts from is removed at the end.
    """
    by_run = {trunk["run"]: trunk for trunk in trunks}
    names = {run_name(spec.method.name, spec.seed, s): s for s in spec.method.hyperparameters}
    branches = _branches(spec, duration)
    # The first process writes, and the others wait for it where train_cohort begins and ends.
    own = names.items() if context.process_group.is_main else ()
    for name, setting in own:
        folder = _branch_folder(branches, setting, inputs, state)
        if not (folder / "run.json").exists():
            start = branch_step(spec.training, duration, by_run[name]["steps_per_epoch"])
            _link_checkpoint(Path(by_run[name]["folder"]), folder, start)
    ending = f"/{duration_name(duration)}"
    known = {f"{duration_name(duration)}/{name}": name + ending for name in names}
    records = train_run_group(
        [branches],
        context,
        inputs,
        state,
        lambda run, *progress: tell(known[run], *progress),
        branches=spec.training.has_decay,
    )
    for name, setting in own:
        _prune_trunk(by_run[name], spec, setting, inputs, state)
    return [
        _branch_config(record, duration, spec.training) | {"run": known[record["run"]]}
        for record in records
    ]


def _branch_config(
    record: Mapping[str, Any], duration: float, training: TrainingConfig
) -> dict[str, Any]:
    """The record of a branch: with its duration, and its own time without the trunk's."""
    start = branch_step(training, duration, record["steps_per_epoch"])
    # Steps take about as long as each other; a branch of a trunk that diverged has none.
    own = 1.0 - start / max(record["steps"], start, 1)
    return {
        **record,
        "duration": duration,
        "training_seconds": own * record["training_seconds"],
    }


def _branch_folder(
    spec: RunGroupConfig, setting: Hyperparameters, inputs: Mapping[str, str], state: Path
) -> Path:
    """Where `train_run_group` keeps a run."""
    return RunFolder.of(spec, setting, inputs, state).folder


def _is_complete(folder: Path) -> Iterator[tuple[int, Path]]:
    """The complete checkpoints in a folder, by step."""
    for progress in folder.glob("step-*/progress.json"):
        yield int(progress.parent.name.removeprefix("step-")), progress.parent


def _link_checkpoint(trunk: Path, folder: Path, latest: float) -> None:
    """Put the trunk's newest checkpoint up to a step in a run's folder, if it has none as new.

    The items of the evaluations before it come with it. Files are linked, not copied.
    """
    stored = [found for found in _is_complete(trunk / BRANCH_CHECKPOINTS) if found[0] <= latest]
    step, origin = max(stored, default=(0, trunk))
    if step <= max((reached for reached, _ in _is_complete(folder)), default=0):
        return
    if wrong := checkpoint_damage(origin):
        warn_if_damaged(*wrong, "nothing goes on from this checkpoint")
        return
    points = read_json(origin / "progress.json")["evaluations"]
    items = [f"items-{int(point[0]):07d}.parquet" for point in points]
    if wrong := next(((trunk / i, told) for i in items if (told := file_damage(trunk / i))), None):
        warn_if_damaged(*wrong, "nothing goes on from its checkpoints")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in items:
        if not (folder / name).exists():
            link_recorded(trunk / name, folder / name)
    final = folder / origin.name
    partial = folder / f".{origin.name}"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(origin, partial, copy_function=link_or_copy)
    rename_synced(partial, final)


def _prune_trunk(
    trunk: Mapping[str, Any],
    spec: RunGroupConfig,
    setting: Hyperparameters,
    inputs: Mapping[str, str],
    state: Path,
) -> None:
    """Remove a finished trunk's checkpoints but for those that unfinished branches start from."""
    folder = Path(trunk["folder"])
    stored = dict(_is_complete(folder / BRANCH_CHECKPOINTS))
    needed = set()
    for duration in spec.training.durations:
        branch = _branch_folder(_branches(spec, duration), setting, inputs, state)
        if not (branch / "run.json").exists():
            start = branch_step(spec.training, duration, trunk["steps_per_epoch"])
            needed.add(max((step for step in stored if step <= start), default=0))
    unused = [path for step, path in stored.items() if step not in needed]
    for checkpoint in [*unused, *folder.glob("step-*")]:
        remove_folder(checkpoint)
