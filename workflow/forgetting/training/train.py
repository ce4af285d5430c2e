"""Train runs: optimizer steps, evaluations at the planned steps, checkpoints to resume from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from forgetting.encoding.encode import Example
from forgetting.models.adalora import allocate
from forgetting.models.loading import Model, autocast, text_config
from forgetting.records import write_table
from forgetting.scoring.forward import collate, token_logprobs
from forgetting.select import is_over, recorded_points
from forgetting.training.checkpoints import (
    STARTS,
    Progress,
    heed_no_room,
    note_no_room,
    prune,
    resume,
    write_checkpoint,
)
from forgetting.training.fused import Own, Stack
from forgetting.training.gradients import StepLoss, gradients_that_fit
from forgetting.training.optimize import make_optimizer
from forgetting.training.recipe import Recipe, groups_of_step
from forgetting.training.schedule import Schedule, learning_rate
from forgetting.training.team import NoRoom
from forgetting.training.together import read_end, rewind, write_end

EXPLODED = 3.0
"""So many times the loss of its beginning, or of blind guessing, ends a run as diverged."""

Evaluate = Callable[[Model], tuple[pd.DataFrame, float]]
"""Measures a model: its items, and the value that the selection rule looks at."""


@dataclass(eq=False)
class Run:
    """One of the runs that are trained together: what it trains, where, and how far it is."""

    recipe: Recipe
    folder: Path
    own: Own
    optimizer: torch.optim.Optimizer
    progress: Progress = field(default_factory=Progress)
    among: int = 1
    """So many runs share the model, itself among them."""

    def sit(self, model: Model) -> None:
        """Make `model` this run's."""
        if self.among > 1:
            self.own.seat(model)

    @property
    def goes_on(self) -> bool:
        """Has it neither ended nor come to where its next part begins?"""
        last = self.recipe.until or self.recipe.schedule.steps
        return self.progress.status == "running" and self.progress.step < last


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
    that is not a finite number, or has exploded, ends the run with status `diverged`; with
    `recipe.stop_after` a run also ends so many evaluations after it reached the threshold. A run of
    two parts has reached `begun` in its first part, which ends at `recipe.until` with status
    `running`.

    Raises:
        NoRoom: memory has run out in this one of several processes. Started again, they go on from
            the newest checkpoint with half the rows at once.
    """
    own = Own.of(model)
    run = Run(recipe, folder, own, _optimizer(own, recipe))
    run.progress = begun or resume(model, run.optimizer, folder, recipe.team)
    run.progress = recipe.team.agree(read_end(folder)) or run.progress
    heed_no_room(run.progress, folder, recipe.team)
    step = run.progress.step
    try:
        _run_all(model, examples, [run], step, base_value, evaluate, lambda _, *told: tell(*told))
    except NoRoom as error:
        note_no_room(folder, error.rows)
        raise
    return run.progress


def train_together(
    model: Model,
    examples: Sequence[Example],
    plans: Sequence[tuple[Recipe, Path]],
    base_value: float,
    evaluate: Evaluate,
    tell: Callable[[int, Progress, Schedule], None],
    starts: Sequence[Own] | None = None,
) -> list[Progress]:
    """Train runs in fused steps, each as `train` would.

    They may differ in their setting and, with plain adapters, in seed, rank and scale. They go on
    from the newest evaluation that all have reached. A run that has ended leaves, and the others go
    on without it. The time of a step is divided evenly among the runs that are in it.

    Args:
        model: as a run begins; afterwards one of them.
        plans: of every run its recipe and its folder.
        tell: called with the number of a run for every step that it has made.
        starts: how each run begins; all as `model`, if none are given.
    """
    step = rewind([folder for _, folder in plans])
    starts = starts or [Own.of(model)] * len(plans)
    runs = []
    for (recipe, folder), start in zip(plans, starts, strict=True):
        own = start.copy()
        run = Run(recipe, folder, own, _optimizer(own, recipe), among=len(plans))
        run.sit(model)
        run.progress = resume(model, run.optimizer, folder)
        run.progress = read_end(folder) or run.progress
        runs.append(run)
    _run_all(model, examples, runs, step, base_value, evaluate, tell)
    return [run.progress for run in runs]


def _optimizer(own: Own, recipe: Recipe) -> torch.optim.Optimizer:
    return make_optimizer(
        own.weights, recipe.training, recipe.setting, recipe.lora_plus_ratio, recipe.rate_ratios
    )


def _run_all(
    model: Model,
    examples: Sequence[Example],
    runs: Sequence[Run],
    step: int,
    base_value: float,
    evaluate: Evaluate,
    tell: Callable[[int, Progress, Schedule], None],
) -> None:
    """The loop, from `step` on: a step of all runs that go on, then, where due, an evaluation."""
    schedule = runs[0].recipe.schedule
    _settle(model, examples, runs, step, base_value)
    model.train()
    stack: Stack | None = None
    seated: list[Run] = []
    while going := [run for run in runs if run.goes_on]:
        if going != seated:
            for run in seated:
                # Else a run that has ended would keep all that it was stacked with in memory.
                if run not in going or len(going) == 1:
                    run.own.leave()
            stack, seated = _sit_down(model, going), going
        started = time.monotonic()
        losses, tokens = _step(model, examples, going, stack)
        step += 1
        seconds = (time.monotonic() - started) / len(going)
        for run, loss, seen in zip(going, losses, tokens, strict=True):
            _note(model, run.progress, loss, seen, seconds)
        left = [run for run in going if run.progress.status == "running"]
        if step in schedule.evaluations:
            for run in left:
                _evaluate(model, run, evaluate)
        if step in schedule.starts:
            for run in left:
                write_checkpoint(
                    model, run.optimizer, run.progress, run.folder / STARTS, run.recipe.team
                )
        for run in left:
            tell(runs.index(run), run.progress, schedule)
        if step in schedule.evaluations or not any(run.goes_on for run in left):
            _settle(model, examples, runs, step, base_value)


def _sit_down(model: Model, going: Sequence[Run]) -> Stack | None:
    """Make the model ready for the steps of these runs; a single run needs no stack."""
    if len(going) > 1:
        return Stack(model, [run.own for run in going])
    going[0].sit(model)
    return None


def _note(model: Model, progress: Progress, loss: StepLoss, tokens: int, seconds: float) -> None:
    """What a step has come to."""
    if has_diverged(model, progress, loss):
        progress.status = "diverged"
        return
    progress.step += 1
    progress.tokens += tokens
    progress.losses.append(loss.tokens)
    progress.penalties.append(loss.penalty)
    progress.seconds += seconds


def has_diverged(model: Model, progress: Progress, loss: StepLoss) -> bool:
    """Is the loss of a step no number, or has it exploded?

    It has, where it is more than `EXPLODED` times the larger of the run's first loss and ln V, what
    a guess among all V tokens costs; penalties do not count.
    """
    first = progress.losses[0] if progress.losses else loss.tokens
    usual = max(first, math.log(text_config(model).vocab_size))
    return not loss.is_finite or loss.tokens > EXPLODED * usual


def _evaluate(model: Model, run: Run, evaluate: Evaluate) -> None:
    """Measure a run, write its items and then its checkpoint."""
    progress, recipe = run.progress, run.recipe
    run.sit(model)
    items, value = evaluate(model)
    if recipe.team.first:
        write_table(run.folder / f"items-{progress.step:07d}.parquet", items)
    progress.points.append([progress.step, progress.step / recipe.schedule.steps_per_epoch, value])
    write_checkpoint(model, run.optimizer, progress, run.folder, recipe.team)


def _settle(
    model: Model, examples: Sequence[Example], runs: Sequence[Run], step: int, base_value: float
) -> None:
    """End the runs that are over, record who has ended, and only then remove old checkpoints."""
    for run in runs:
        progress, recipe = run.progress, run.recipe
        points = recorded_points(progress.points, base_value)
        over = is_over(points, recipe.threshold, recipe.stop_after)
        if progress.status == "running" and (over or progress.step >= recipe.schedule.steps):
            run.sit(model)
            progress.status = "ok" if _is_sound(model, examples, recipe) else "diverged"
        if run.among > 1 and progress.status != "running" and read_end(run.folder) is None:
            write_end(run.folder, progress, step, run.among)
    for run in runs:
        prune(run.folder, run.progress, base_value, run.recipe.threshold, run.recipe.team)


@torch.inference_mode()
def _is_sound(model: Model, examples: Sequence[Example], recipe: Recipe) -> bool:
    """Is the loss still a number after the last update, which no further step would tell?"""
    batch = collate([examples[0]], recipe.pad, model.device)
    with autocast(model.device, recipe.precision):
        return bool(torch.isfinite(token_logprobs(model, batch)).all())


def _step(
    model: Model, examples: Sequence[Example], runs: Sequence[Run], stack: Stack | None
) -> tuple[list[StepLoss], list[int]]:
    """One update of each run on the mean loss over all target tokens of the batch, however split.

    Returns the loss of each run, and the number of tokens that it has seen.
    """
    first = runs[0]
    seeds = {run.recipe.seed: run.recipe for run in runs}
    by_seed = {
        seed: groups_of_step(examples, recipe, first.progress.step)
        for seed, recipe in seeds.items()
    }
    batches = [by_seed[run.recipe.seed] for run in runs]
    losses = gradients_that_fit(
        model, first.recipe, batches, first.progress, stack or first.optimizer
    )
    for run, loss in zip(runs, losses, strict=True):
        run.progress.micro_batch_size = first.progress.micro_batch_size
        if not has_diverged(model, run.progress, loss):
            _update(model, run)
    return losses, [sum(len(e.ids) for rows, _ in groups for e in rows) for groups in batches]


def _update(model: Model, run: Run) -> None:
    """Clip the gradients of a run and take a step of its optimizer."""
    recipe, training, step = run.recipe, run.recipe.training, run.progress.step
    rate = learning_rate(step, recipe.setting.learning_rate, training, recipe.schedule)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
    if training.gradient_clip:
        torch.nn.utils.clip_grad_norm_(run.own.weights.values(), training.gradient_clip)
    run.optimizer.step()
    allocate(model, step + 1)
