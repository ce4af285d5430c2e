"""Checkpoints of runs: save, resume, prune, and resume batched runs at one step.

The last bits of a batched step depend on which runs are in it. A killed batch therefore resumes
from the newest evaluation that all its runs have stored, so that its result is bit-identical. All
runs write a checkpoint before any run removes an older one. A run that has ended records the
evaluation of the batch at which it ended.
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
    STATE_FILE,
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

BRANCH_CHECKPOINTS = "branch_points"
"""Subfolder of a trunk with the checkpoints that its cooldown branches start from."""

OOM_FILE = "oom.json"
"""File of a run: the micro-batch size at which one of several processes ran out of memory."""

FINAL = "end.json"
"""File of a run that was trained in a batch: how the run ended."""


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step in the folder of a run."""
    return folder / f"step-{step:07d}"


def items_file(folder: Path, step: float) -> Path:
    """Return the file with the items of the evaluation at a step in the folder of a run."""
    return folder / f"items-{int(step):07d}.parquet"


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the complete checkpoints in a folder by step, in rising order."""
    checkpoints = sorted(file.parent for file in folder.glob(f"step-*/{STATE_FILE}"))
    return {int(path.name.removeprefix("step-")): path for path in checkpoints}


def newest_step(folder: Path) -> int:
    """Return the step of the newest complete checkpoint, or 0 if there is none."""
    return max(complete_checkpoints(folder), default=0)


def evaluated_items(folder: Path, checkpoint: Path) -> list[Path]:
    """Return the files of the items of all evaluations up to a checkpoint of a run."""
    evaluations = read_json(checkpoint / STATE_FILE)["evaluations"]
    return [items_file(folder, step) for step, *_ in evaluations]


@dataclass
class TrainState:
    """The progress of a run, saved with every checkpoint.

    Attributes:
        step: optimizer steps done.
        tokens: tokens trained on.
        seconds: time spent in steps.
        losses: mean loss of every step per target token, without penalties, so that methods can be
            compared.
        penalties: sum of the penalties of every step.
        evaluations: step, epoch and value of the selection metric of every evaluation.
        status: `running`, `ok` or `diverged`.
        micro_batch_size: examples of a forward pass, if memory did not suffice for the number that
            the study allows.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    penalties: list[float] = field(default_factory=list)
    evaluations: list[list[float]] = field(default_factory=list)
    status: str = "running"
    micro_batch_size: int | None = None

    def halve_micro_batch(self, rows: int, *, verbose: bool = True) -> None:
        """Continue with half of `rows`, the examples of the pass that ran out of memory."""
        self.micro_batch_size = rows // 2
        if verbose:
            print(
                f"memory ran out with {rows} examples in a pass; continuing with "
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
    """Write a checkpoint into a temporary folder, which is renamed once it is complete.

    The main process writes it. Of a sharded model, every process writes its shard.
    """
    final = checkpoint_folder(folder, progress.step)
    with atomic_folder(final) if process_group.is_main else nullcontext(final) as temporary:
        partial = process_group.broadcast(temporary)
        if is_sharded(model):
            save_sharded(model, optimizer, partial, process_group)
        elif process_group.is_main:
            _write_checkpoint(model, optimizer, partial)
        if process_group.is_main:
            write_json(partial / STATE_FILE, vars(progress))
    process_group.barrier()


def _write_checkpoint(model: Model, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    save_weights(model, folder)
    state = optimizer_tensors(optimizer)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    save_tensors(tensors, folder / OPTIMIZER_FILE)
    if method_state := adalora_training_state(model):
        save_tensors(method_state, folder / METHOD_FILE)


def discard_damaged(folders: Sequence[Path]) -> None:
    """Empty the folders of unfinished batched runs, if one of them is damaged.

    A run whose newest checkpoint lacks the state of the optimizer counts as damaged.
    """
    if damage := next(filter(None, map(run_damage, folders)), None):
        warn_damaged(*damage, "the run starts from the beginning")
        for folder in folders:
            remove_folder(folder)
            folder.mkdir(parents=True)


def run_damage(folder: Path) -> tuple[Path, str] | None:
    """Return the first damaged file of an unfinished run, and the kind of damage."""
    for checkpoint in sorted(
        [*folder.glob("step-*"), *folder.glob(f"{BRANCH_CHECKPOINTS}/step-*")]
    ):
        if damage := checkpoint_damage(checkpoint):
            return damage
    files = {path for path in folder.iterdir() if path.is_file() and path.name[0] != "."}
    if checkpoints := complete_checkpoints(folder):
        newest = checkpoints[max(checkpoints)]
        method, optimizer = newest / METHOD_FILE, newest / OPTIMIZER_FILE
        if not is_resumable(newest):
            return optimizer, "is missing"
        # `prune_checkpoints` removes the optimizer's state first.
        if optimizer.exists() and record_path(method).exists() and not method.exists():
            return method, "is missing"
        files |= set(evaluated_items(folder, newest))
    return next(((path, kind) for path in sorted(files) if (kind := file_damage(path))), None)


def load_latest(
    model: Model,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> TrainState:
    """Restore the newest complete checkpoint and return its state, or return a new state.

    Incomplete files of a killed process are removed.
    """
    for leftover in folder.glob(".*") if process_group.is_main else ():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif not is_record(leftover):
            leftover.unlink()
    step = process_group.broadcast(newest_step(folder))
    if step == 0:
        return TrainState()
    checkpoint = checkpoint_folder(folder, step)
    if is_sharded(model) or (checkpoint / SHARD_FOLDER).exists():
        load_sharded(model, optimizer, checkpoint)
    else:
        if (checkpoint / METHOD_FILE).exists():
            load_adalora_training_state(model, load_file(checkpoint / METHOD_FILE))
        else:
            restore_weights(model, checkpoint)
        restore_optimizer(optimizer, load_file(checkpoint / OPTIMIZER_FILE))
    return TrainState(**read_json(checkpoint / STATE_FILE))


def record_oom(folder: Path, rows: int) -> None:
    """Record the micro-batch size that ran out of memory, for the processes that restart."""
    write_json(folder / OOM_FILE, rows)


def apply_recorded_oom(
    progress: TrainState, folder: Path, process_group: ProcessGroup = SINGLE_PROCESS
) -> None:
    """Halve the micro-batch size that ran out of memory before a restart, if there is one."""
    path = folder / OOM_FILE
    # Every process reads the file, because a file written on another machine may appear late.
    recorded = [
        rows
        for rows in process_group.all_gather(read_json(path) if path.exists() else None)
        if rows
    ]
    if recorded and (progress.micro_batch_size or math.inf) > min(recorded) // 2:
        progress.halve_micro_batch(min(recorded), verbose=process_group.is_main)


def drop_training_state(folder: Path) -> None:
    """Remove the files of a finished run that serve to resume it; the weights stay, in one file."""
    remove_file(folder / OOM_FILE)
    for checkpoint in folder.glob("step-*"):
        remove_file(checkpoint / OPTIMIZER_FILE)
        remove_file(checkpoint / METHOD_FILE)
        consolidate_shards(checkpoint)
    remove_file(folder / FINAL)


def prune_checkpoints(
    folder: Path,
    progress: TrainState,
    base_value: float,
    threshold: float,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Remove the checkpoints that the selection rule can no longer choose.

    Of the other checkpoints, only the newest keeps the state of the optimizer. A sharded checkpoint
    keeps it too, because the same files hold weights and moments.
    """
    points = recorded_evaluations(progress.evaluations, base_value)
    kept = {checkpoint_folder(folder, step) for step in steps_to_keep(points, threshold)}
    for checkpoint in folder.glob("step-*") if process_group.is_main else ():
        if checkpoint not in kept:
            remove_folder(checkpoint)
        elif checkpoint != max(kept):
            # The file of the optimizer goes first, because `is_resumable` looks for it.
            remove_file(checkpoint / OPTIMIZER_FILE)
            remove_file(checkpoint / METHOD_FILE)


def is_resumable(checkpoint: Path) -> bool:
    """Return whether the checkpoint has the state of the optimizer."""
    return (checkpoint / OPTIMIZER_FILE).exists() or (checkpoint / SHARD_FOLDER).exists()


def write_final_state(folder: Path, progress: TrainState, step: int, batched_runs: int) -> None:
    """Record the final state of a run in a batch.

    Args:
        folder: folder of the run.
        progress: final state of the run.
        step: step of the batch at which the state is recorded.
        batched_runs: number of runs in the batch.
    """
    state = {"step": step, "batched_runs": batched_runs, "progress": vars(progress)}
    write_json(folder / FINAL, state)


def read_final_state(folder: Path) -> TrainState | None:
    """Return the final state of a run in a batch, or None if the run has not ended."""
    path = folder / FINAL
    return TrainState(**read_json(path)["progress"]) if path.exists() else None


def batch_members(folder: Path) -> int:
    """Return the number of runs in the batch of a run that has ended, or 1 without a batch."""
    path = folder / FINAL
    return int(read_json(path)["batched_runs"]) if path.exists() else 1


@dataclass(frozen=True)
class ResumePoints:
    """The steps from which a run can resume.

    Attributes:
        checkpoints: steps of its resumable checkpoints; 0 is the start.
        finished: step at which it ended, or None; it needs no checkpoint from then on.
    """

    checkpoints: frozenset[int]
    finished: int | None

    @classmethod
    def of(cls, folder: Path) -> ResumePoints:
        """Return the resume points of the run in `folder`.

        The run can restart from 0 until its second evaluation, before which no checkpoint is
        removed. Checkpoints without the state of the optimizer are no resume points.
        """
        stored = complete_checkpoints(folder)
        final = folder / FINAL
        can_restart = not stored or len(evaluated_items(folder, stored[max(stored)])) == 1
        resumable = {step for step, path in stored.items() if is_resumable(path)}
        return cls(
            frozenset(resumable | {0} if can_restart else resumable),
            int(read_json(final)["step"]) if final.exists() else None,
        )

    @property
    def newest(self) -> float:
        """Return the last step from which the run can resume; infinity if it has ended."""
        return max(self.checkpoints) if self.finished is None else math.inf

    def contains(self, step: float) -> bool:
        """Return whether the run can resume from this step."""
        return step in self.checkpoints or (self.finished is not None and self.finished <= step)


def resume_groups(folders: Sequence[Path]) -> list[list[Path]]:
    """Return the runs in groups that can resume from one step; a changed sweep has several."""
    remaining = {folder: ResumePoints.of(folder) for folder in folders}
    groups = []
    while remaining:
        step = min(points.newest for points in remaining.values())
        group = [folder for folder, points in remaining.items() if points.contains(step)]
        groups.append(group)
        for folder in group:
            del remaining[folder]
    return groups


def rewind_to_common_step(folders: Sequence[Path]) -> int:
    """Return the newest step from which all runs can resume, after removing newer files."""
    resume_points = [ResumePoints.of(folder) for folder in folders]
    step = min(points.newest for points in resume_points)
    if step == math.inf:
        return max(points.finished or 0 for points in resume_points)
    for folder, points in zip(folders, resume_points, strict=True):
        if points.finished is not None and points.finished > step:
            remove_file(folder / FINAL)
        for checkpoint in sorted(folder.glob("step-*"), reverse=True):
            if int(checkpoint.name.removeprefix("step-")) > step:
                remove_folder(checkpoint)
    return int(step)
