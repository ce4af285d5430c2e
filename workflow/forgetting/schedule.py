"""When a run does what: its steps, its evaluations, and the course of its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from forgetting.config.training import TrainingConfig


@dataclass(frozen=True)
class LrSchedule:
    """Steps of a run, derived from the number of examples."""

    steps: int
    steps_per_epoch: int
    warmup: int
    evaluations: frozenset[int]
    restart: int = 0
    """The step at which a second part of the run begins, with an optimizer of its own."""
    starts: frozenset[int] = frozenset()
    """Of a trunk: the steps at which a branch leaves it, and its state is stored."""

    @classmethod
    def plan(cls, examples: int, training: TrainingConfig, every_epochs: float) -> LrSchedule:
        """Steps per epoch are ceil(examples / batch size); the last step is always evaluated.

        With `durations` it is the plan of their trunk, which ends where the last branch leaves it
        and is evaluated where the longest run would be.
        """
        per_epoch = math.ceil(examples / training.batch_size)
        steps = schedule_steps(training.epochs, per_epoch)
        every = max(1, round(every_epochs * per_epoch))
        warmup = _warmup_steps(training, steps, per_epoch)
        if training.durations:
            starts = {branch_step(training, duration, per_epoch) for duration in training.durations}
            last = max(starts)
            evaluations = frozenset(range(every, last + 1, every))
            return cls(last, per_epoch, warmup, evaluations, starts=frozenset(starts))
        return cls(steps, per_epoch, warmup, frozenset([*range(every, steps, every), steps]))


def schedule_steps(epochs: float, steps_per_epoch: int) -> int:
    """Steps of so many epochs, which may be less than one; at least one step."""
    return max(1, round(epochs * steps_per_epoch))


def _warmup_steps(training: TrainingConfig, steps: int, steps_per_epoch: int) -> int:
    """Steps of warm-up, which may be more than the run has."""
    if training.warmup_steps is not None:
        return training.warmup_steps
    if training.warmup_ratio is not None:
        return round(training.warmup_ratio * steps)
    epochs = 1.0 if training.warmup_epochs is None else training.warmup_epochs
    return round(epochs * steps_per_epoch)


def validate_warmup(examples: int, training: TrainingConfig) -> tuple[str, str] | None:
    """The key of a warm-up after which a run has no peak, and what to say of it; None if it has.

    Of `durations` that share a trunk the longest counts: shorter ones may end within the warm-up
    that all share. Of others every one is a run of its own.
    """
    per_epoch = math.ceil(examples / training.batch_size)
    alone = training.durations and not training.has_decay
    given = [key for key in ("warmup_steps", "warmup_ratio") if getattr(training, key) is not None]
    key = (given or ["warmup_epochs"])[0]
    for epochs in sorted(training.durations) if alone else [training.epochs]:
        steps = schedule_steps(epochs, per_epoch)
        warmup, falls = _warmup_steps(training, steps, per_epoch), decay_start(training, steps)
        whole = (
            f"{steps:,} ({epochs:g} epochs of {examples:,} examples, {training.batch_size:,} to a "
            "batch)"
        )
        if warmup >= steps:
            return key, (
                f"{warmup:,} steps of warm-up leave nothing of the training, which has {whole}, so "
                "that the rate would never be at its peak; make it smaller, or train longer"
            )
        if warmup > falls:
            return key, (
                f"{warmup:,} steps of warm-up go on when the cooldown begins, after {falls:,} of "
                f"{whole}, so that the rate would never be at its peak; make it or "
                "training.decay_ratio smaller, or train longer"
            )
    return None


def decay_start(training: TrainingConfig, steps: int) -> int:
    """Updates before the cooldown of a run of so many steps; all of them, if it has none.

    The cooldown takes its share of the steps, rounded, and at least one step.
    """
    share = training.resolved_decay_ratio
    return steps - max(1, round(share * steps)) if share else steps


def branch_step(training: TrainingConfig, duration: float, steps_per_epoch: int) -> int:
    """The step of the trunk at which the branch of a duration, in epochs, leaves it.

    Its first, 0, where the rates depend on the whole duration from the beginning.
    """
    if not training.has_decay:
        return 0
    return decay_start(training, schedule_steps(duration, steps_per_epoch))


def learning_rate(step: int, peak: float, training: TrainingConfig, schedule: LrSchedule) -> float:
    """Learning rate of the step after `step` updates.

    Linear warm-up from 0 over w steps (the first update of a run with warm-up has rate 0), then,
    with t the share of the remaining steps that is done and f the floor, peak times

    - constant: 1
    - linear: f + (1 - f) (1 - t)
    - cosine: f + (1 - f) (1 + cos(pi t)) / 2
    - inverse_sqrt: d + (1 - d) / sqrt((step - w + s) / s), d `inverse_sqrt_floor`, s `decay_steps`
    or w - wsd: 1

    of which the last two end in a cooldown over the last share of all steps, linear from where it
    begins, be it in the warm-up, to f. A trunk has none: its branches do.

    Constant, linear, cosine with floor 0, and inverse_sqrt without cooldown are what transformers'
    schedulers give. Biderman et al. 2024 (appendix on training) took the cosine with f = 0.01 for
    instruction tuning, and for continued pretraining inverse_sqrt with w = s = 1000 and d = 1,
    which is the wsd, with a cooldown of 0.2 to f = 0. Where a cooldown would begin in the
    warm-up, their scheduler warms up to the end; here every run has its cooldown.

    After a restart, the rate rises to that course in a linear warm-up as long as the first, since
    the optimizer's moments are empty again; but in no more than half of the steps before the
    cooldown, or of those that are left, so that a short second part reaches it too.
    """
    begin = schedule.steps if training.durations else decay_start(training, schedule.steps)
    if schedule.restart:
        since = step - schedule.restart
        end = begin if schedule.restart < begin else schedule.steps
        rising = min(schedule.warmup, (end - schedule.restart) // 2)
        peak *= min(1.0, since / rising) if rising else 1.0
    factor = _decay_factor(min(step, begin), training, schedule)
    if step > begin:
        left = max(0.0, (schedule.steps - step) / (schedule.steps - begin))
        factor = training.min_lr_ratio + (factor - training.min_lr_ratio) * left
    return peak * factor


def _decay_factor(step: int, training: TrainingConfig, schedule: LrSchedule) -> float:
    """What multiplies the peak before the cooldown."""
    warmup, floor = schedule.warmup, training.min_lr_ratio
    if step < warmup:
        return step / warmup
    done = min(1.0, (step - warmup) / max(1, schedule.steps - warmup))
    if training.schedule == "linear":
        return floor + (1.0 - floor) * (1.0 - done)
    if training.schedule == "cosine":
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
    if training.schedule == "inverse_sqrt":
        scale = training.decay_steps or max(1, warmup)
        fallen = 1.0 / math.sqrt((step - warmup + scale) / scale)
        return training.inverse_sqrt_floor + (1.0 - training.inverse_sqrt_floor) * fallen
    return 1.0
