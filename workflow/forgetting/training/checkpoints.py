"""The state of a run on disk: complete checkpoints, from which it goes on.

Where runs that are trained together stand on disk, and from which step they go on.

The last bits of a fused step depend on which runs are in it. So that a group that was killed ends
with the same bits, it goes on from the newest evaluation of which all its runs have a record: all
write theirs before any removes an older one, and a run that has ended tells at which evaluation of
the group it had.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from forgetting.digests import file_damage, is_record, record_path
from forgetting.io import (
    atomic_folder,
    read_json,
    remove_file,
    remove_folder,
    warn_damaged,
    write_json,
)
from forgetting.models.adapters import adalora_training_state, load_adalora_training_state
from forgetting.models.loading import Model
from forgetting.models.tuned import (
    METHOD_FILE,
    OPTIMIZER_FILE,
    checkpoint_damage,
    restore_weights,
    save_tensors,
    save_weights,
)
from forgetting.selection import recorded_evaluations, steps_to_keep
from forgetting.training.distributed import SINGLE_PROCESS, ProcessGroup, is_sharded
from forgetting.training.sharded_checkpoints import (
    SHARD_FOLDER,
    consolidate_shards,
    load_sharded,
    optimizer_tensors,
    restore_optimizer,
    save_sharded,
)

BRANCH_CHECKPOINTS = "starts"
"""Beside a trunk's own checkpoints: those at the steps at which its branches leave it."""

OOM_FILE = "no-room.json"
"""Beside a run's checkpoints: with how many rows memory ran out in one of several processes."""


@dataclass
class TrainState:
    """What a run has done so far; saved beside every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    """Of every step, per target token: penalties stand apart, so that methods can be compared."""
    penalties: list[float] = field(default_factory=list)
    evaluations: list[list[float]] = field(default_factory=list)
    status: str = "running"
    micro_batch_size: int | None = None
    """Rows of a forward pass, once memory has run out with as many as the study allows."""

    def halve_micro_batch(self, rows: int, *, told: bool = True) -> None:
        """Go on with half of so many rows in a forward pass, with which memory ran out."""
        self.micro_batch_size = rows // 2
        if told:
            print(
                f"memory ran out with {rows} examples in a pass; going on with "
                f"{self.micro_batch_size} from step {self.step}",
                flush=True,
            )


def save_checkpoint(
    model: Model,
    optimizer: torch.optim.Optimizer,
    progress: TrainState,
    folder: Path,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Write a complete checkpoint beside, then give it its name.

    The first process writes it; of a sharded model, every process its part.
    """
    final = folder / f"step-{progress.step:07d}"
    with atomic_folder(final) if process_group.is_main else nullcontext(final) as place:
        partial = process_group.broadcast(place)
        if is_sharded(model):
            save_sharded(model, optimizer, partial, process_group)
        elif process_group.is_main:
            _write_checkpoint(model, optimizer, partial)
        if process_group.is_main:
            write_json(partial / "progress.json", vars(progress))
    process_group.barrier()


def _write_checkpoint(model: Model, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    save_weights(model, folder)
    state = optimizer_tensors(optimizer)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    save_tensors(tensors, folder / OPTIMIZER_FILE)
    if state_of_method := adalora_training_state(model):
        save_tensors(state_of_method, folder / METHOD_FILE)


def discard_damaged(folders: Sequence[Path]) -> None:
    """Empty the folders of unfinished runs that train together, if one of them is damaged.

    A run whose newest checkpoint has lost the optimizer's state cannot go on either.
    """
    if wrong := next(filter(None, map(_run_damage, folders)), None):
        warn_damaged(*wrong, "the run starts afresh")
        for folder in folders:
            remove_folder(folder)
            folder.mkdir(parents=True)


def _run_damage(folder: Path) -> tuple[Path, str] | None:
    """Return the first damaged file of an unfinished run, and what is wrong with it."""
    for checkpoint in sorted(
        [*folder.glob("step-*"), *folder.glob(f"{BRANCH_CHECKPOINTS}/step-*")]
    ):
        if wrong := checkpoint_damage(checkpoint):
            return wrong
    files = {path for path in folder.iterdir() if path.is_file() and path.name[0] != "."}
    newest = max(folder.glob("step-*/progress.json"), default=None)
    if newest is not None:
        if not is_resumable(newest.parent):
            return newest.parent / OPTIMIZER_FILE, "is missing"
        method, optimizer = newest.parent / METHOD_FILE, newest.parent / OPTIMIZER_FILE
        # `prune_checkpoints` removes the optimizer's state first.
        if optimizer.exists() and record_path(method).exists() and not method.exists():
            return method, "is missing"
        points = read_json(newest)["evaluations"]
        files |= {folder / f"items-{int(step):07d}.parquet" for step, *_ in points}
    return next(((path, told) for path in sorted(files) if (told := file_damage(path))), None)


def load_latest(
    model: Model,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> TrainState:
    """Restore the newest complete checkpoint, or start afresh.

    What a killed process left half written is removed.
    """
    for leftover in folder.glob(".*") if process_group.is_main else ():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif not is_record(leftover):
            leftover.unlink()
    newest = process_group.broadcast(max(folder.glob("step-*/progress.json"), default=None))
    if newest is None:
        return TrainState()
    checkpoint = newest.parent
    if is_sharded(model) or (checkpoint / SHARD_FOLDER).exists():
        load_sharded(model, optimizer, checkpoint)
        return TrainState(**read_json(newest))
    if (checkpoint / METHOD_FILE).exists():
        load_adalora_training_state(model, load_file(checkpoint / METHOD_FILE))
    else:
        restore_weights(model, checkpoint)
    restore_optimizer(optimizer, load_file(checkpoint / OPTIMIZER_FILE))
    return TrainState(**read_json(newest))


def record_oom(folder: Path, rows: int) -> None:
    """Keep with how many rows memory ran out, for the processes that are started next."""
    write_json(folder / OOM_FILE, rows)


def apply_recorded_oom(
    progress: TrainState, folder: Path, process_group: ProcessGroup = SINGLE_PROCESS
) -> None:
    """Go on with fewer rows than those with which memory ran out, if it did."""
    path = folder / OOM_FILE
    # All look: what another machine wrote may show late.
    noted = [
        rows
        for rows in process_group.all_gather(read_json(path) if path.exists() else None)
        if rows
    ]
    if noted and (progress.micro_batch_size or math.inf) > min(noted) // 2:
        progress.halve_micro_batch(min(noted), told=process_group.is_main)


def newest_step(folder: Path) -> int:
    """The step of the newest complete checkpoint, 0 if there is none."""
    newest = max(folder.glob("step-*/progress.json"), default=None)
    return 0 if newest is None else int(read_json(newest)["step"])


def drop_training_state(folder: Path) -> None:
    """Of a finished run, remove what it would go on from; the weights stay, in one piece."""
    remove_file(folder / OOM_FILE)
    for checkpoint in folder.glob("step-*"):
        remove_file(checkpoint / OPTIMIZER_FILE)
        remove_file(checkpoint / METHOD_FILE)
        consolidate_shards(checkpoint)


def prune_checkpoints(
    folder: Path,
    progress: TrainState,
    base_value: float,
    threshold: float,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Remove the checkpoints that the selection rule can no longer pick.

    Of those that it can, only the newest keeps what a run goes on from; a sharded one keeps all,
    since its weights and moments are in the same files.
    """
    points = recorded_evaluations(progress.evaluations, base_value)
    kept = {f"step-{step:07d}" for step in steps_to_keep(points, threshold)}
    for checkpoint in folder.glob("step-*") if process_group.is_main else ():
        if checkpoint.name not in kept:
            remove_folder(checkpoint)
        elif checkpoint.name != max(kept):
            # First the optimizer's, by which `is_resumable` tells.
            remove_file(checkpoint / OPTIMIZER_FILE)
            remove_file(checkpoint / METHOD_FILE)


def is_resumable(checkpoint: Path) -> bool:
    """Is what a run goes on from there, beside the weights?"""
    return (checkpoint / OPTIMIZER_FILE).exists() or (checkpoint / SHARD_FOLDER).exists()


FINAL = "end.json"


def write_final_state(folder: Path, progress: TrainState, step: int, together: int) -> None:
    """Record how one of so many runs ended, at the evaluation of its group at `step` or before."""
    write_json(folder / FINAL, {"step": step, "together": together, "progress": vars(progress)})


def read_final_state(folder: Path) -> TrainState | None:
    """How a run ended, if it did."""
    path = folder / FINAL
    return TrainState(**read_json(path)["progress"]) if path.exists() else None


def batch_members(folder: Path) -> int:
    """With how many runs, itself among them, a run that has ended was trained."""
    path = folder / FINAL
    return int(read_json(path)["together"]) if path.exists() else 1


@dataclass(frozen=True)
class ResumePoints:
    """From which steps a run can go on: those of its checkpoints, and all since it ended."""

    checkpoints: frozenset[int]
    finished: int | None

    @classmethod
    def of(cls, folder: Path) -> ResumePoints:
        """What the folder of a run holds; 0 is the start, as long as no checkpoint was removed.

        A checkpoint that is only there to be picked has no moments, and nothing goes on from it.
        """
        steps = {_group_step(path): path for path in folder.glob("step-*/progress.json")}
        end = folder / FINAL
        started = not steps or len(read_json(steps[max(steps)])["evaluations"]) == 1
        able = {step for step, path in steps.items() if is_resumable(path.parent)}
        return cls(
            frozenset(able | {0} if started else able),
            int(read_json(end)["step"]) if end.exists() else None,
        )

    @property
    def newest(self) -> float:
        """The last of the steps from which the run can go on."""
        return max(self.checkpoints) if self.finished is None else math.inf

    def is_reached_by(self, step: float) -> bool:
        """Can the run go on from this step?"""
        return step in self.checkpoints or (self.finished is not None and self.finished <= step)


def _group_step(progress: Path) -> int:
    return int(progress.parent.name.removeprefix("step-"))


def resume_groups(folders: Sequence[Path]) -> list[list[Path]]:
    """Runs that can go on from the same step; all of them, unless the sweep was changed."""
    waiting = {folder: ResumePoints.of(folder) for folder in folders}
    found = []
    while waiting:
        step = min(standing.newest for standing in waiting.values())
        found.append(
            [folder for folder, standing in waiting.items() if standing.is_reached_by(step)]
        )
        for folder in found[-1]:
            del waiting[folder]
    return found


def rewind_to_common_step(folders: Sequence[Path]) -> int:
    """Remove what is newer than the newest step from which all can go on; returns that step."""
    standings = [ResumePoints.of(folder) for folder in folders]
    step = min(standing.newest for standing in standings)
    if step == math.inf:
        return max(standing.finished or 0 for standing in standings)
    for folder, standing in zip(folders, standings, strict=True):
        if standing.finished is not None and standing.finished > step:
            remove_file(folder / FINAL)
        for newer in sorted(folder.glob("step-*"), reverse=True):
            if int(newer.name.removeprefix("step-")) > step:
                remove_folder(newer)
    return int(step)
