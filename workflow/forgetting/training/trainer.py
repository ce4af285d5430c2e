"""Train runs: optimizer steps, evaluations at the planned steps, checkpoints to resume from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from forgetting.data.tokenize import Example
from forgetting.io import write_table
from forgetting.models.adapters import update_rank_allocation
from forgetting.models.forward import collate, token_logprobs
from forgetting.models.loading import Model, autocast, text_config
from forgetting.schedule import LrSchedule, learning_rate
from forgetting.selection import is_finished, recorded_evaluations
from forgetting.training.batched_lora import AdapterState, BatchedAdapters
from forgetting.training.checkpoints import (
    BRANCH_CHECKPOINTS,
    TrainState,
    apply_recorded_oom,
    load_latest,
    prune_checkpoints,
    read_final_state,
    record_oom,
    rewind_to_common_step,
    save_checkpoint,
    write_final_state,
)
from forgetting.training.distributed import OutOfMemory
from forgetting.training.optimizer import make_optimizer
from forgetting.training.run_config import RunConfig, loss_groups
from forgetting.training.train_step import StepLoss, compute_gradients

DIVERGENCE_FACTOR = 3.0
"""So many times the loss of its beginning, or of blind guessing, ends a run as diverged."""

Evaluate = Callable[[Model], tuple[pd.DataFrame, float]]
"""Measures a model: its items, and the value that the selection rule looks at."""


@dataclass(eq=False)
class TrainingRun:
    """One of the runs that are trained together: what it trains, where, and how far it is."""

    config: RunConfig
    folder: Path
    adapter: AdapterState
    optimizer: torch.optim.Optimizer
    state: TrainState = field(default_factory=TrainState)
    group_index: int = 1
    """So many runs share the model, itself among them."""

    def activate(self, model: Model) -> None:
        """Make `model` this run's."""
        if self.group_index > 1:
            self.adapter.install(model)

    @property
    def is_running(self) -> bool:
        """Has it neither ended nor come to where its next part begins?"""
        last = self.config.until or self.config.schedule.steps
        return self.state.status == "running" and self.state.step < last


def train_run(
    model: Model,
    examples: Sequence[Example],
    recipe: RunConfig,
    base_value: float,
    evaluate: Evaluate,
    folder: Path,
    tell: Callable[[TrainState, LrSchedule], None],
    begun: TrainState | None = None,
) -> TrainState:
    """Train `model` in place, from the newest checkpoint in `folder` if there is one.

    At each evaluation step the items are written to folder/items-STEP.parquet, then a checkpoint
    to folder/step-STEP; checkpoints that the selection rule can no longer pick are removed. Where
    branches leave a trunk, a checkpoint is written to folder/starts/step-STEP, and stays. A loss
    that is not a finite number, or has exploded, ends the run with status `diverged`; with
    `recipe.stop_after_evaluations` a run also ends so many evaluations after it reached the
    threshold. A run of two parts has reached `begun` in its first part, which ends at
    `recipe.until` with status `running`.

    Raises:
        NoRoom: memory has run out in this one of several processes. Started again, they go on from
            the newest checkpoint with half the rows at once.
    """
    own = AdapterState.of(model)
    run = TrainingRun(recipe, folder, own, _build_optimizer(own, recipe))
    run.state = begun or load_latest(model, run.optimizer, folder, recipe.process_group)
    run.state = recipe.process_group.broadcast(read_final_state(folder)) or run.state
    apply_recorded_oom(run.state, folder, recipe.process_group)
    step = run.state.step
    try:
        _train_loop(
            model, examples, [run], step, base_value, evaluate, lambda _, *told: tell(*told)
        )
    except OutOfMemory as error:
        record_oom(folder, error.rows)
        raise
    return run.state


def train_batched(
    model: Model,
    examples: Sequence[Example],
    plans: Sequence[tuple[RunConfig, Path]],
    base_value: float,
    evaluate: Evaluate,
    tell: Callable[[int, TrainState, LrSchedule], None],
    starts: Sequence[AdapterState] | None = None,
) -> list[TrainState]:
    """Train runs in fused steps, each as `train_run` would.

    They may differ in their setting and, with plain adapters, in seed, rank and scale. They go on
    from the newest evaluation that all have reached. A run that has ended leaves, and the others go
    on without it. The time of a step is divided evenly among the runs that are in it.

    Args:
        model: as a run begins; afterwards one of them.
        plans: of every run its recipe and its folder.
        tell: called with the number of a run for every step that it has made.
        starts: how each run begins; all as `model`, if none are given.
    """
    step = rewind_to_common_step([folder for _, folder in plans])
    starts = starts or [AdapterState.of(model)] * len(plans)
    runs = []
    for (recipe, folder), start in zip(plans, starts, strict=True):
        own = start.copy()
        run = TrainingRun(
            recipe, folder, own, _build_optimizer(own, recipe), group_index=len(plans)
        )
        run.activate(model)
        run.state = load_latest(model, run.optimizer, folder)
        run.state = read_final_state(folder) or run.state
        runs.append(run)
    _train_loop(model, examples, runs, step, base_value, evaluate, tell)
    return [run.state for run in runs]


def _build_optimizer(own: AdapterState, recipe: RunConfig) -> torch.optim.Optimizer:
    return make_optimizer(
        own.weights,
        recipe.training,
        recipe.hyperparameters,
        recipe.loraplus_lr_ratio,
        recipe.lr_ratios,
    )


def _train_loop(
    model: Model,
    examples: Sequence[Example],
    runs: Sequence[TrainingRun],
    step: int,
    base_value: float,
    evaluate: Evaluate,
    tell: Callable[[int, TrainState, LrSchedule], None],
) -> None:
    """The loop, from `step` on: a step of all runs that go on, then, where due, an evaluation."""
    schedule = runs[0].config.schedule
    _finish_runs(model, examples, runs, step, base_value)
    model.train()
    stack: BatchedAdapters | None = None
    seated: list[TrainingRun] = []
    while going := [run for run in runs if run.is_running]:
        if going != seated:
            for run in seated:
                # Else a run that has ended would keep all that it was stacked with in memory.
                if run not in going or len(going) == 1:
                    run.adapter.detach()
            stack, seated = _activate(model, going), going
        started = time.monotonic()
        losses, tokens = _train_step(model, examples, going, stack)
        step += 1
        seconds = (time.monotonic() - started) / len(going)
        for run, loss, seen in zip(going, losses, tokens, strict=True):
            _record_step(model, run.state, loss, seen, seconds)
        left = [run for run in going if run.state.status == "running"]
        if step in schedule.evaluations:
            for run in left:
                _evaluate_runs(model, run, evaluate)
        if step in schedule.starts:
            for run in left:
                save_checkpoint(
                    model,
                    run.optimizer,
                    run.state,
                    run.folder / BRANCH_CHECKPOINTS,
                    run.config.process_group,
                )
        for run in left:
            tell(runs.index(run), run.state, schedule)
        if step in schedule.evaluations or not any(run.is_running for run in left):
            _finish_runs(model, examples, runs, step, base_value)


def _activate(model: Model, going: Sequence[TrainingRun]) -> BatchedAdapters | None:
    """Make the model ready for the steps of these runs; a single run needs no stack."""
    if len(going) > 1:
        return BatchedAdapters(model, [run.adapter for run in going])
    going[0].activate(model)
    return None


def _record_step(
    model: Model, progress: TrainState, loss: StepLoss, tokens: int, seconds: float
) -> None:
    """What a step has come to."""
    if has_diverged(model, progress, loss):
        progress.status = "diverged"
        return
    progress.step += 1
    progress.tokens += tokens
    progress.losses.append(loss.tokens)
    progress.penalties.append(loss.penalty)
    progress.seconds += seconds


def has_diverged(model: Model, progress: TrainState, loss: StepLoss) -> bool:
    """Is the loss of a step no number, or has it exploded?

    It has, where it is more than `DIVERGENCE_FACTOR` times the larger of the run's first loss and
    ln V, what a guess among all V tokens costs; penalties do not count.
    """
    first = progress.losses[0] if progress.losses else loss.tokens
    usual = max(first, math.log(text_config(model).vocab_size))
    return not loss.is_finite or loss.tokens > DIVERGENCE_FACTOR * usual


def _evaluate_runs(model: Model, run: TrainingRun, evaluate: Evaluate) -> None:
    """Measure a run, write its items and then its checkpoint."""
    progress, recipe = run.state, run.config
    run.activate(model)
    items, value = evaluate(model)
    if recipe.process_group.is_main:
        write_table(run.folder / f"items-{progress.step:07d}.parquet", items)
    progress.evaluations.append(
        [progress.step, progress.step / recipe.schedule.steps_per_epoch, value]
    )
    save_checkpoint(model, run.optimizer, progress, run.folder, recipe.process_group)


def _finish_runs(
    model: Model,
    examples: Sequence[Example],
    runs: Sequence[TrainingRun],
    step: int,
    base_value: float,
) -> None:
    """End the runs that are over, record who has ended, and only then remove old checkpoints."""
    for run in runs:
        progress, recipe = run.state, run.config
        points = recorded_evaluations(progress.evaluations, base_value)
        over = is_finished(points, recipe.threshold, recipe.stop_after_evaluations)
        if progress.status == "running" and (over or progress.step >= recipe.schedule.steps):
            run.activate(model)
            progress.status = (
                "ok" if _is_finite_after_update(model, examples, recipe) else "diverged"
            )
        if (
            run.group_index > 1
            and progress.status != "running"
            and read_final_state(run.folder) is None
        ):
            write_final_state(run.folder, progress, step, run.group_index)
    for run in runs:
        prune_checkpoints(
            run.folder, run.state, base_value, run.config.threshold, run.config.process_group
        )


@torch.inference_mode()
def _is_finite_after_update(model: Model, examples: Sequence[Example], recipe: RunConfig) -> bool:
    """Is the loss still a number after the last update, which no further step would tell?"""
    batch = collate([examples[0]], recipe.pad, model.device)
    with autocast(model.device, recipe.precision):
        return bool(torch.isfinite(token_logprobs(model, batch)).all())


def _train_step(
    model: Model,
    examples: Sequence[Example],
    runs: Sequence[TrainingRun],
    stack: BatchedAdapters | None,
) -> tuple[list[StepLoss], list[int]]:
    """One update of each run on the mean loss over all target tokens of the batch, however split.

    Returns the loss of each run, and the number of tokens that it has seen.
    """
    first = runs[0]
    seeds = {run.config.seed: run.config for run in runs}
    by_seed = {
        seed: loss_groups(examples, recipe, first.state.step) for seed, recipe in seeds.items()
    }
    batches = [by_seed[run.config.seed] for run in runs]
    losses = compute_gradients(model, first.config, batches, first.state, stack or first.optimizer)
    for run, loss in zip(runs, losses, strict=True):
        run.state.micro_batch_size = first.state.micro_batch_size
        if not has_diverged(model, run.state, loss):
            _optimizer_step(model, run)
    return losses, [sum(len(e.ids) for rows, _ in groups for e in rows) for groups in batches]


def _optimizer_step(model: Model, run: TrainingRun) -> None:
    """Clip the gradients of a run and take a step of its optimizer."""
    recipe, training, step = run.config, run.config.training, run.state.step
    rate = learning_rate(step, recipe.hyperparameters.learning_rate, training, recipe.schedule)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
    if training.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(run.adapter.weights.values(), training.max_grad_norm)
    run.optimizer.step()
    update_rank_allocation(model, step + 1)
