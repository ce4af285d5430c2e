"""Train one run: optimizer steps, evaluations at the planned steps, checkpoints to resume from.

Everything random is a function of the seed and the step alone (data order, dropout), so that a run
that was killed and started again goes on with the same numbers.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import torch
from safetensors.torch import load_file

from forgetting.encode import Example
from forgetting.forward import (
    collate,
    logprobs_of,
    micro_batches,
    target_logits,
    token_logprobs,
)
from forgetting.memory import is_out_of_memory, release_memory
from forgetting.mitigate import Safeguards, TokenPenalty
from forgetting.models import Model, autocast, restore_checkpoint, save_checkpoint, save_tensors
from forgetting.optimize import Schedule, learning_rate, make_optimizer
from forgetting.records import InputError, read_json, settle, write_json, write_table
from forgetting.select import is_over, recorded_points, steps_to_keep
from forgetting.study import Setting, Training

FORWARD_OVERHEAD = {"cpu": 256, "cuda": 8192}
"""What a forward and backward pass costs beside its tokens, in tokens: on a CPU, splitting a batch
in two pays for a small model; a GPU waits for launches rather than for padding."""

Evaluate = Callable[[Model], tuple[pd.DataFrame, float]]
"""Measures a model: its items, and the value that the selection rule looks at."""


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


@dataclass(frozen=True)
class Recipe:
    """All that determines the weights of a run but its data and its model."""

    setting: Setting
    seed: int
    training: Training
    schedule: Schedule
    threshold: float
    stop_after: int | None
    precision: torch.dtype
    pad: int
    safeguards: Safeguards = field(default_factory=Safeguards)


def train(
    model: Model,
    examples: Sequence[Example],
    recipe: Recipe,
    base_value: float,
    evaluate: Evaluate,
    folder: Path,
    tell: Callable[[Progress, Schedule], None],
) -> Progress:
    """Train `model` in place, from the newest checkpoint in `folder` if there is one.

    At each evaluation step the items are written to folder/items-STEP.parquet, then a checkpoint
    to folder/step-STEP; checkpoints that the selection rule can no longer pick are removed. A loss
    that is not a finite number ends the run with status `diverged`; with `recipe.stop_after` a run
    also ends so many evaluations after it reached the threshold.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(parameters, recipe.training, recipe.setting)
    progress = _resume(model, optimizer, folder)
    _prune(folder, progress, base_value, recipe.threshold)
    model.train()
    while progress.step < recipe.schedule.steps and progress.status == "running":
        if is_over(
            recorded_points(progress.points, base_value), recipe.threshold, recipe.stop_after
        ):
            break
        started = time.monotonic()
        loss, tokens = _step(model, examples, recipe, progress, parameters, optimizer)
        if not math.isfinite(loss):
            progress.status = "diverged"
            break
        progress.step += 1
        progress.tokens += tokens
        progress.losses.append(loss)
        progress.seconds += time.monotonic() - started
        if progress.step in recipe.schedule.evaluations:
            items, value = evaluate(model)
            write_table(folder / f"items-{progress.step:07d}.parquet", items)
            progress.points.append(
                [progress.step, progress.step / recipe.schedule.steps_per_epoch, value]
            )
            _checkpoint(model, optimizer, progress, folder)
            _prune(folder, progress, base_value, recipe.threshold)
        tell(progress, recipe.schedule)
    if progress.status == "running":
        progress.status = "ok" if _is_sound(model, examples, recipe) else "diverged"
    return progress


@torch.inference_mode()
def _is_sound(model: Model, examples: Sequence[Example], recipe: Recipe) -> bool:
    """Is the loss still a number after the last update, which no further step would tell?"""
    batch = collate(examples[:1], recipe.pad, model.device)
    with autocast(model.device, recipe.precision):
        return bool(torch.isfinite(token_logprobs(model, batch)).all())


def batch_indices(examples: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the examples of a step: each epoch is a permutation of its own."""
    per_epoch = math.ceil(examples / batch_size)
    epoch, position = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(examples, generator=generator)
    return order[position * batch_size : (position + 1) * batch_size].tolist()


Group: TypeAlias = tuple[list[Example], TokenPenalty | None]
"""Examples of a step, with the penalty on the predictions of their targets."""


def _step(
    model: Model,
    examples: Sequence[Example],
    recipe: Recipe,
    progress: Progress,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> tuple[float, int]:
    """One update on the mean loss over all target tokens of the batch, however it is split.

    Returns the loss, penalties included, and the number of tokens.
    """
    step, training = progress.step, recipe.training
    indices = batch_indices(len(examples), training.batch_size, recipe.seed, step)
    new = [examples[index] for index in indices]
    epoch, position = divmod(step, recipe.schedule.steps_per_epoch)
    seen = epoch * len(examples) + position * training.batch_size
    old = recipe.safeguards.replayed(recipe.seed, seen, seen + len(new))
    groups = [(new, recipe.safeguards.on_new), (old, recipe.safeguards.on_replayed)]
    loss = _gradients_that_fit(model, recipe, groups, progress, optimizer)
    if math.isfinite(loss):
        rate = learning_rate(step, recipe.setting.learning_rate, training, recipe.schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if training.gradient_clip:
            torch.nn.utils.clip_grad_norm_(parameters, training.gradient_clip)
        optimizer.step()
    return loss, sum(len(example.ids) for example in [*new, *old])


def _gradients_that_fit(
    model: Model,
    recipe: Recipe,
    groups: Sequence[Group],
    progress: Progress,
    optimizer: torch.optim.Optimizer,
) -> float:
    """Gradients and loss of a step; where memory runs out, again with half the rows at once.

    The smaller number stays for the rest of the run. Without dropout, whose masks are drawn per
    forward pass, the result is the same up to the order of sums.
    """
    rows = progress.micro_batch_size or recipe.training.micro_batch_size
    while True:
        torch.manual_seed(recipe.seed * 1_000_003 + progress.step)
        optimizer.zero_grad(set_to_none=True)
        try:
            return _gradients(model, recipe, groups, rows)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if rows == 1:
                raise InputError(
                    "memory runs out with a single example in a forward pass: use a machine with "
                    "more, or make training.max_length smaller"
                ) from None
        # Outside the handler, where the error no longer keeps the tensors of its frames alive.
        rows = progress.micro_batch_size = rows // 2
        release_memory(model.device)


def _gradients(model: Model, recipe: Recipe, groups: Sequence[Group], most_rows: int) -> float:
    """Accumulate the gradients of a step in passes of at most so many rows; returns the loss."""
    device = model.device
    targets = sum(example.targets for rows, _ in groups for example in rows)
    penalized = sum(example.targets for rows, penalty in groups if penalty for example in rows)
    total = torch.zeros((), dtype=torch.float64, device=device)
    # Long texts are no reason to pad short answers, so the groups never share a forward pass.
    for rows, on_tokens in groups:
        lengths = [len(example.ids) for example in rows]
        for indices in micro_batches(lengths, most_rows, FORWARD_OVERHEAD[device.type]):
            part = collate([rows[index] for index in indices], recipe.pad, device)
            with autocast(device, recipe.precision):
                logits = target_logits(model, part)
                loss = -logprobs_of(logits, part).sum() / targets
                if on_tokens:
                    loss = loss + on_tokens(model, part, logits) / penalized
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach().double()
    for on_weights in recipe.safeguards.on_weights:
        loss = on_weights(model)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach().double()
    return float(total)


def _checkpoint(
    model: Model,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    folder: Path,
) -> None:
    """Write a complete checkpoint beside, then give it its name."""
    final = folder / f"step-{progress.step:07d}"
    partial = folder / f".{final.name}"
    for leftover in (partial, final):
        shutil.rmtree(leftover, ignore_errors=True)
    save_checkpoint(model, partial)
    tensors = {
        f"{index}.{name}": tensor.detach().cpu().contiguous()
        for index, state in optimizer.state_dict()["state"].items()
        for name, tensor in state.items()
    }
    save_tensors(tensors, partial / "optimizer.safetensors")
    write_json(partial / "progress.json", vars(progress))
    settle(partial, final)


def _resume(model: Model, optimizer: torch.optim.Optimizer, folder: Path) -> Progress:
    """Restore the newest complete checkpoint, or start afresh."""
    newest = max(folder.glob("step-*/progress.json"), default=None)
    if newest is None:
        return Progress()
    checkpoint = newest.parent
    restore_checkpoint(model, checkpoint)
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in load_file(checkpoint / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    return Progress(**read_json(newest))


def _prune(folder: Path, progress: Progress, base_value: float, threshold: float) -> None:
    points = recorded_points(progress.points, base_value)
    kept = {f"step-{step:07d}" for step in steps_to_keep(points, threshold)}
    for checkpoint in folder.glob("step-*"):
        if checkpoint.name not in kept:
            shutil.rmtree(checkpoint)
