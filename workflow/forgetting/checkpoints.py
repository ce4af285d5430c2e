"""The state of a run on disk: complete checkpoints, from which it goes on."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from forgetting.models import Model, restore_checkpoint, save_checkpoint, save_tensors
from forgetting.parallel import ALONE, Team, is_sharded
from forgetting.records import read_json, settle, write_json
from forgetting.select import recorded_points, steps_to_keep
from forgetting.shards import (
    SHARDS,
    join_shards,
    load_shards,
    optimizer_tensors,
    restore_optimizer,
    save_shards,
)

OPTIMIZER = "optimizer.safetensors"


@dataclass
class Progress:
    """What a run has done so far; saved beside every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    points: list[list[float]] = field(default_factory=list)
    status: str = "running"
    micro_batch_size: int | None = None
    """Rows of a forward pass, once memory has run out with as many as the study allows."""


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
    partial = folder / f".{final.name}"
    if team.first:
        for leftover in (partial, final):
            shutil.rmtree(leftover, ignore_errors=True)
    team.wait()
    if is_sharded(model):
        save_shards(model, optimizer, partial, team)
    elif team.first:
        save_checkpoint(model, partial)
        state = optimizer_tensors(optimizer)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
        save_tensors(tensors, partial / OPTIMIZER)
    if team.first:
        write_json(partial / "progress.json", vars(progress))
        settle(partial, final)
    team.wait()


def resume(
    model: Model, optimizer: torch.optim.Optimizer, folder: Path, team: Team = ALONE
) -> Progress:
    """Restore the newest complete checkpoint, or start afresh."""
    newest = team.agree(max(folder.glob("step-*/progress.json"), default=None))
    if newest is None:
        return Progress()
    checkpoint = newest.parent
    if is_sharded(model) or (checkpoint / SHARDS).exists():
        load_shards(model, optimizer, checkpoint)
    else:
        restore_checkpoint(model, checkpoint)
        restore_optimizer(optimizer, load_file(checkpoint / OPTIMIZER))
    return Progress(**read_json(newest))


def prune(
    folder: Path, progress: Progress, base_value: float, threshold: float, team: Team = ALONE
) -> None:
    """Remove the checkpoints that the selection rule can no longer pick."""
    points = recorded_points(progress.points, base_value)
    kept = {f"step-{step:07d}" for step in steps_to_keep(points, threshold)}
    for checkpoint in folder.glob("step-*") if team.first else ():
        if checkpoint.name not in kept:
            shutil.rmtree(checkpoint)


def finish(folder: Path) -> None:
    """Leave of a finished run's checkpoints what they are selected for: whole models, adapters."""
    for checkpoint in folder.glob("step-*"):
        (checkpoint / OPTIMIZER).unlink(missing_ok=True)
        if (checkpoint / SHARDS).exists():
            join_shards(checkpoint)
