"""The state of a run on disk: complete checkpoints, from which it goes on."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from forgetting.digests import damage, folder_damage, is_record, record_of
from forgetting.models.adalora import restore_training, training_state
from forgetting.models.loading import Model
from forgetting.models.tuned import restore_checkpoint, save_checkpoint, save_tensors
from forgetting.records import (
    read_json,
    remove_file,
    remove_folder,
    replacing_folder,
    warn_of,
    write_json,
)
from forgetting.select import recorded_points, steps_to_keep
from forgetting.training.parallel import is_sharded
from forgetting.training.shards import (
    SHARDS,
    join_shards,
    load_shards,
    optimizer_tensors,
    restore_optimizer,
    save_shards,
)
from forgetting.training.team import ALONE, Team

OPTIMIZER = "optimizer.safetensors"
METHOD = "method.safetensors"
"""What a run goes on from beside its weights: its optimizer's state, and the method's own."""

STARTS = "starts"
"""Beside a trunk's own checkpoints: those at the steps at which its branches leave it."""

NO_ROOM = "no-room.json"
"""Beside a run's checkpoints: with how many rows memory ran out in one of several processes."""


@dataclass
class Progress:
    """What a run has done so far; saved beside every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    """Of every step, per target token: penalties stand apart, so that methods can be compared."""
    penalties: list[float] = field(default_factory=list)
    points: list[list[float]] = field(default_factory=list)
    status: str = "running"
    micro_batch_size: int | None = None
    """Rows of a forward pass, once memory has run out with as many as the study allows."""

    def halve(self, rows: int, *, told: bool = True) -> None:
        """Go on with half of so many rows in a forward pass, with which memory ran out."""
        self.micro_batch_size = rows // 2
        if told:
            print(
                f"memory ran out with {rows} examples in a pass; going on with "
                f"{self.micro_batch_size} from step {self.step}",
                flush=True,
            )


def write_checkpoint(
    model: Model,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    folder: Path,
    team: Team = ALONE,
) -> None:
    """Write a complete checkpoint beside, then give it its name.

    The first process writes it; of a sharded model, every process its part.
    """
    final = folder / f"step-{progress.step:07d}"
    with replacing_folder(final) if team.first else nullcontext(final) as place:
        partial = team.agree(place)
        if is_sharded(model):
            save_shards(model, optimizer, partial, team)
        elif team.first:
            _write_whole(model, optimizer, partial)
        if team.first:
            write_json(partial / "progress.json", vars(progress))
    team.wait()


def _write_whole(model: Model, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    save_checkpoint(model, folder)
    state = optimizer_tensors(optimizer)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    save_tensors(tensors, folder / OPTIMIZER)
    if state_of_method := training_state(model):
        save_tensors(state_of_method, folder / METHOD)


def checkpoint_damage(checkpoint: Path) -> tuple[Path, str] | None:
    """Return what is wrong with the weights of a checkpoint, and with what a run goes on from."""
    if not (checkpoint / "progress.json").exists():
        return checkpoint / "progress.json", "is missing"
    return folder_damage(checkpoint, optional=(OPTIMIZER, METHOD))


def restart_damaged(folders: Sequence[Path]) -> None:
    """Empty the folders of unfinished runs that train together, if one of them is damaged.

    A run whose newest checkpoint has lost the optimizer's state cannot go on either.
    """
    if wrong := next(filter(None, map(_run_damage, folders)), None):
        warn_of(*wrong, "the run starts afresh")
        for folder in folders:
            remove_folder(folder)
            folder.mkdir(parents=True)


def _run_damage(folder: Path) -> tuple[Path, str] | None:
    """Return the first damaged file of an unfinished run, and what is wrong with it."""
    for checkpoint in sorted([*folder.glob("step-*"), *folder.glob(f"{STARTS}/step-*")]):
        if wrong := checkpoint_damage(checkpoint):
            return wrong
    files = {path for path in folder.iterdir() if path.is_file() and path.name[0] != "."}
    newest = max(folder.glob("step-*/progress.json"), default=None)
    if newest is not None:
        if not can_go_on(newest.parent):
            return newest.parent / OPTIMIZER, "is missing"
        method, optimizer = newest.parent / METHOD, newest.parent / OPTIMIZER
        # `prune` removes the optimizer's state first.
        if optimizer.exists() and record_of(method).exists() and not method.exists():
            return method, "is missing"
        points = read_json(newest)["points"]
        files |= {folder / f"items-{int(step):07d}.parquet" for step, *_ in points}
    return next(((path, told) for path in sorted(files) if (told := damage(path))), None)


def resume(
    model: Model, optimizer: torch.optim.Optimizer, folder: Path, team: Team = ALONE
) -> Progress:
    """Restore the newest complete checkpoint, or start afresh.

    What a killed process left half written is removed.
    """
    for leftover in folder.glob(".*") if team.first else ():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif not is_record(leftover):
            leftover.unlink()
    newest = team.agree(max(folder.glob("step-*/progress.json"), default=None))
    if newest is None:
        return Progress()
    checkpoint = newest.parent
    if is_sharded(model) or (checkpoint / SHARDS).exists():
        load_shards(model, optimizer, checkpoint)
        return Progress(**read_json(newest))
    if (checkpoint / METHOD).exists():
        restore_training(model, load_file(checkpoint / METHOD))
    else:
        restore_checkpoint(model, checkpoint)
    restore_optimizer(optimizer, load_file(checkpoint / OPTIMIZER))
    return Progress(**read_json(newest))


def note_no_room(folder: Path, rows: int) -> None:
    """Keep with how many rows memory ran out, for the processes that are started next."""
    write_json(folder / NO_ROOM, rows)


def heed_no_room(progress: Progress, folder: Path, team: Team = ALONE) -> None:
    """Go on with fewer rows than those with which memory ran out, if it did."""
    path = folder / NO_ROOM
    # All look: what another machine wrote may show late.
    noted = [rows for rows in team.gather(read_json(path) if path.exists() else None) if rows]
    if noted and (progress.micro_batch_size or math.inf) > min(noted) // 2:
        progress.halve(min(noted), told=team.first)


def newest_step(folder: Path) -> int:
    """The step of the newest complete checkpoint, 0 if there is none."""
    newest = max(folder.glob("step-*/progress.json"), default=None)
    return 0 if newest is None else int(read_json(newest)["step"])


def forget_training(folder: Path) -> None:
    """Of a finished run, remove what it would go on from; the weights stay, in one piece."""
    remove_file(folder / NO_ROOM)
    for checkpoint in folder.glob("step-*"):
        remove_file(checkpoint / OPTIMIZER)
        remove_file(checkpoint / METHOD)
        join_shards(checkpoint)


def prune(
    folder: Path, progress: Progress, base_value: float, threshold: float, team: Team = ALONE
) -> None:
    """Remove the checkpoints that the selection rule can no longer pick.

    Of those that it can, only the newest keeps what a run goes on from; a sharded one keeps all,
    since its weights and moments are in the same files.
    """
    points = recorded_points(progress.points, base_value)
    kept = {f"step-{step:07d}" for step in steps_to_keep(points, threshold)}
    for checkpoint in folder.glob("step-*") if team.first else ():
        if checkpoint.name not in kept:
            remove_folder(checkpoint)
        elif checkpoint.name != max(kept):
            # First the optimizer's, by which `can_go_on` tells.
            remove_file(checkpoint / OPTIMIZER)
            remove_file(checkpoint / METHOD)


def can_go_on(checkpoint: Path) -> bool:
    """Is what a run goes on from there, beside the weights?"""
    return (checkpoint / OPTIMIZER).exists() or (checkpoint / SHARDS).exists()
