"""Train one run: optimizer steps, evaluations at the planned steps, checkpoints to resume from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch

from forgetting.adalora import allocate
from forgetting.checkpoints import STARTS, Progress, prune, resume, write_checkpoint
from forgetting.encode import Example
from forgetting.forward import collate, token_logprobs
from forgetting.gradients import gradients_that_fit
from forgetting.models import Model, autocast
from forgetting.optimize import Schedule, learning_rate, make_optimizer
from forgetting.recipe import Recipe, groups_of_step
from forgetting.records import write_table
from forgetting.select import is_over, recorded_points

Evaluate = Callable[[Model], tuple[pd.DataFrame, float]]
"""Measures a model: its items, and the value that the selection rule looks at."""


def train(
    model: Model,
    examples: Sequence[Example],
    recipe: Recipe,
    base_value: float,
    evaluate: Evaluate,
    folder: Path,
    tell: Callable[[Progress, Schedule], None],
    begun: Progress | None = None,
) -> Progress:
    """Train `model` in place, from the newest checkpoint in `folder` if there is one.

    At each evaluation step the items are written to folder/items-STEP.parquet, then a checkpoint
    to folder/step-STEP; checkpoints that the selection rule can no longer pick are removed. Where
    branches leave a trunk, a checkpoint is written to folder/starts/step-STEP, and stays. A loss
    that is not a finite number ends the run with status `diverged`; with `recipe.stop_after` a run
    also ends so many evaluations after it reached the threshold. A run of two parts has reached
    `begun` in its first part, which ends at `recipe.until` with status `running`.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    parameters = list(trained.values())
    optimizer = make_optimizer(
        trained, recipe.training, recipe.setting, recipe.lora_plus_ratio, recipe.rate_ratios
    )
    progress = begun or resume(model, optimizer, folder, recipe.team)
    prune(folder, progress, base_value, recipe.threshold, recipe.team)
    model.train()
    last = recipe.until or recipe.schedule.steps
    while progress.step < last and progress.status == "running":
        if _is_over(progress, base_value, recipe):
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
            if recipe.team.first:
                write_table(folder / f"items-{progress.step:07d}.parquet", items)
            progress.points.append(
                [progress.step, progress.step / recipe.schedule.steps_per_epoch, value]
            )
            write_checkpoint(model, optimizer, progress, folder, recipe.team)
            prune(folder, progress, base_value, recipe.threshold, recipe.team)
        if progress.step in recipe.schedule.starts:
            write_checkpoint(model, optimizer, progress, folder / STARTS, recipe.team)
        tell(progress, recipe.schedule)
    handed_on = progress.step == recipe.until and not _is_over(progress, base_value, recipe)
    if progress.status == "running" and not handed_on:
        progress.status = "ok" if _is_sound(model, examples, recipe) else "diverged"
    return progress


def _is_over(progress: Progress, base_value: float, recipe: Recipe) -> bool:
    points = recorded_points(progress.points, base_value)
    return is_over(points, recipe.threshold, recipe.stop_after)


@torch.inference_mode()
def _is_sound(model: Model, examples: Sequence[Example], recipe: Recipe) -> bool:
    """Is the loss still a number after the last update, which no further step would tell?"""
    batch = collate([examples[0]], recipe.pad, model.device)
    with autocast(model.device, recipe.precision):
        return bool(torch.isfinite(token_logprobs(model, batch)).all())


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
    groups = groups_of_step(examples, recipe, step)
    loss = gradients_that_fit(model, recipe, groups, progress, optimizer)
    if math.isfinite(loss):
        rate = learning_rate(step, recipe.setting.learning_rate, training, recipe.schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        if training.gradient_clip:
            torch.nn.utils.clip_grad_norm_(parameters, training.gradient_clip)
        optimizer.step()
        allocate(model, step + 1)
    return loss, sum(len(example.ids) for rows, _ in groups for example in rows)
