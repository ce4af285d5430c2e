"""The training loop: optimizer steps, evaluations at the planned steps, checkpoints to resume from.

`train_run` trains one run, in one process or in several. `train_batched` trains several LoRA runs
in shared forward and backward passes. Both use the same loop.
"""

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
    items_file,
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
"""A run has diverged when its loss exceeds this multiple of its first loss or of ln V."""

Evaluate = Callable[[Model], tuple[pd.DataFrame, float]]
"""Return the items of a model's evaluation, and the value of the selection metric."""


@dataclass(eq=False)
class TrainingRun:
    """A run while it is trained: its configuration, folder, weights, optimizer and state."""

    config: RunConfig
    folder: Path
    adapter: AdapterState
    optimizer: torch.optim.Optimizer
    state: TrainState = field(default_factory=TrainState)
    group_size: int = 1
    """Number of runs that share the model, this one included."""

    @classmethod
    def start(
        cls, config: RunConfig, folder: Path, adapter: AdapterState, group_size: int = 1
    ) -> TrainingRun:
        """Return a run before its first step, with a new optimizer."""
        optimizer = make_optimizer(
            adapter.weights, config.training, config.hyperparameters, config.lr_ratios
        )
        return cls(config, folder, adapter, optimizer, group_size=group_size)

    def activate(self, model: Model) -> None:
        """Install the weights of this run in the shared model."""
        if self.group_size > 1:
            self.adapter.install(model)

    @property
    def is_running(self) -> bool:
        """Return whether the run has steps left in this stage."""
        last = self.config.until or self.config.schedule.steps
        return self.state.status == "running" and self.state.step < last


def train_run(
    model: Model,
    examples: Sequence[Example],
    config: RunConfig,
    evaluate: Evaluate,
    folder: Path,
    log: Callable[[TrainState, LrSchedule], None],
    first_stage: TrainState | None = None,
) -> TrainState:
    """Train `model` in place, from the newest checkpoint in `folder` if there is one.

    Each evaluation writes its items to folder/items-STEP.parquet and then a checkpoint to
    folder/step-STEP. Checkpoints that the selection rule can no longer choose are removed. Where
    cooldown branches leave a trunk, a checkpoint in folder/branch_points/step-STEP is kept.

    A loss that is not finite, or exceeds the limit of `has_diverged`, ends the run with status
    `diverged`. With `config.stop_after_evaluations` a run also ends that many evaluations after it
    reached the threshold.

    Args:
        model: with the adapters of the method, if it has any.
        examples: tokenized training rows.
        config: hyperparameters, schedule and evaluation steps of the run.
        evaluate: scores the model on the probes, and on in-training benchmarks.
        folder: of the run's state.
        log: called after every step.
        first_stage: final state of the first stage of a two-stage run. A first stage ends at
            `config.until` with status `running`.

    Raises:
        OutOfMemory: memory ran out in one of several processes. After a restart they resume from
            the newest checkpoint with half the examples in a forward pass.
    """
    run = TrainingRun.start(config, folder, AdapterState.of(model))
    run.state = first_stage or load_latest(model, run.optimizer, folder, config.process_group)
    run.state = config.process_group.broadcast(read_final_state(folder)) or run.state
    apply_recorded_oom(run.state, folder, config.process_group)

    def log_run(_: int, state: TrainState, schedule: LrSchedule) -> None:
        log(state, schedule)

    try:
        _train_loop(model, examples, [run], run.state.step, evaluate, log_run)
    except OutOfMemory as error:
        record_oom(folder, error.examples)
        raise
    return run.state


def train_batched(
    model: Model,
    examples: Sequence[Example],
    runs_to_train: Sequence[tuple[RunConfig, Path]],
    evaluate: Evaluate,
    log: Callable[[int, TrainState, LrSchedule], None],
) -> list[TrainState]:
    """Train several runs in shared forward and backward passes, each as `train_run` would.

    The runs differ in hyperparameters only, so they read the same examples in the same order. They
    resume from the newest evaluation that all have reached. A finished run leaves the batch, and
    the others continue. The time of a step is divided evenly among the runs that take part.

    Args:
        model: in the initial state of the runs; holds the weights of one of them afterwards.
        runs_to_train: configuration and folder of every run.
        log: called with the index of a run after each of its steps.
    """
    step = rewind_to_common_step([folder for _, folder in runs_to_train])
    initial = AdapterState.of(model)
    runs = []
    for config, folder in runs_to_train:
        run = TrainingRun.start(config, folder, initial.copy(), len(runs_to_train))
        run.activate(model)
        run.state = load_latest(model, run.optimizer, folder)
        run.state = read_final_state(folder) or run.state
        runs.append(run)
    _train_loop(model, examples, runs, step, evaluate, log)
    return [run.state for run in runs]


def _train_loop(
    model: Model,
    examples: Sequence[Example],
    runs: Sequence[TrainingRun],
    step: int,
    evaluate: Evaluate,
    log: Callable[[int, TrainState, LrSchedule], None],
) -> None:
    """Train all runs from `step` to their ends, and evaluate them at the planned steps."""
    schedule = runs[0].config.schedule
    _finish_runs(model, examples, runs, step)
    model.train()
    batched: BatchedAdapters | None = None
    active: list[TrainingRun] = []
    while running := [run for run in runs if run.is_running]:
        if running != active:
            for run in active:
                # A finished run would keep the whole stack of adapters in memory.
                if run not in running or len(running) == 1:
                    run.adapter.detach()
            batched, active = _activate(model, running), running
        started = time.monotonic()
        losses, tokens = train_batch(model, examples, running, batched)
        step += 1
        seconds = (time.monotonic() - started) / len(running)
        for run, loss in zip(running, losses, strict=True):
            _record_step(model, run.state, loss, tokens, seconds)
        sound = [run for run in running if run.state.status == "running"]
        if step in schedule.evaluations:
            for run in sound:
                _evaluate_run(model, run, evaluate)
        if step in schedule.branch_steps:
            for run in sound:
                branches = run.folder / BRANCH_CHECKPOINTS
                save_checkpoint(model, run.optimizer, run.state, branches, run.config.process_group)
        for run in sound:
            log(runs.index(run), run.state, schedule)
        if step in schedule.evaluations or not any(run.is_running for run in sound):
            _finish_runs(model, examples, runs, step)


def _activate(model: Model, runs: Sequence[TrainingRun]) -> BatchedAdapters | None:
    """Prepare the model for steps of these runs; only several runs need batched adapters."""
    if len(runs) > 1:
        return BatchedAdapters(model, [run.adapter for run in runs])
    runs[0].activate(model)
    return None


def _record_step(
    model: Model, state: TrainState, loss: StepLoss, tokens: int, seconds: float
) -> None:
    """Add a step to the state of its run, or mark the run as diverged."""
    if has_diverged(model, state, loss):
        state.status = "diverged"
        return
    state.step += 1
    state.tokens += tokens
    state.losses.append(loss.tokens)
    state.penalties.append(loss.penalty)
    state.seconds += seconds


def has_diverged(model: Model, state: TrainState, loss: StepLoss) -> bool:
    """Return whether the loss of a step is not finite or too large.

    The limit is `DIVERGENCE_FACTOR` times the larger of the run's first loss and ln V, the loss of
    a uniform guess among the V tokens of the vocabulary. Penalties do not count.
    """
    first = state.losses[0] if state.losses else loss.tokens
    reference = max(first, math.log(text_config(model).vocab_size))
    return not loss.is_finite or loss.tokens > DIVERGENCE_FACTOR * reference


def _evaluate_run(model: Model, run: TrainingRun, evaluate: Evaluate) -> None:
    """Evaluate a run; write its items and then its checkpoint."""
    state, config = run.state, run.config
    run.activate(model)
    items, value = evaluate(model)
    if config.process_group.is_main:
        write_table(items_file(run.folder, state.step), items)
    state.evaluations.append([state.step, state.step / config.schedule.steps_per_epoch, value])
    save_checkpoint(model, run.optimizer, state, run.folder, config.process_group)


def _finish_runs(
    model: Model, examples: Sequence[Example], runs: Sequence[TrainingRun], step: int
) -> None:
    """Finish the runs that are complete, record their final states, then prune all checkpoints."""
    for run in runs:
        state, config = run.state, run.config
        evaluations = recorded_evaluations(state.evaluations, config.base_value)
        stopped = is_finished(evaluations, config.threshold, config.stop_after_evaluations)
        if state.status == "running" and (stopped or state.step >= config.schedule.steps):
            run.activate(model)
            finite = _is_finite_after_update(model, examples, config)
            state.status = "ok" if finite else "diverged"
        finished = state.status != "running"
        if run.group_size > 1 and finished and read_final_state(run.folder) is None:
            write_final_state(run.folder, state, step, run.group_size)
    for run in runs:
        config = run.config
        prune_checkpoints(
            run.folder, run.state, config.base_value, config.threshold, config.process_group
        )


@torch.inference_mode()
def _is_finite_after_update(model: Model, examples: Sequence[Example], config: RunConfig) -> bool:
    """Return whether the loss is finite after the last update, which no further step checks."""
    batch = collate([examples[0]], config.pad, model.device)
    with autocast(model.device, config.precision):
        return bool(torch.isfinite(token_logprobs(model, batch)).all())


def train_batch(
    model: Model,
    examples: Sequence[Example],
    runs: Sequence[TrainingRun],
    batched: BatchedAdapters | None,
) -> tuple[list[StepLoss], int]:
    """Update each run by the mean loss over all target tokens of its batch.

    Returns:
        The loss of each run, and the number of tokens that each has read.
    """
    first = runs[0]
    groups = loss_groups(examples, first.config, first.state.step)
    optimizer = batched or first.optimizer
    losses = compute_gradients(model, first.config, groups, first.state, optimizer)
    for run, loss in zip(runs, losses, strict=True):
        run.state.micro_batch_size = first.state.micro_batch_size
        if not has_diverged(model, run.state, loss):
            _optimizer_step(model, run)
    return losses, sum(len(e.ids) for members, _ in groups for e in members)


def _optimizer_step(model: Model, run: TrainingRun) -> None:
    """Clip the gradients of a run and take a step of its optimizer."""
    config, training, step = run.config, run.config.training, run.state.step
    rate = learning_rate(step, config.hyperparameters.learning_rate, training, config.schedule)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
    if training.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(run.adapter.weights.values(), training.max_grad_norm)
    run.optimizer.step()
    update_rank_allocation(model, step + 1)
