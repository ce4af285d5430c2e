"""Steps, evaluations and learning rates of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from forgetting.config.training import TrainingConfig


@dataclass(frozen=True)
class LrSchedule:
    """Steps of a run at which something happens, counted in optimizer updates."""

    steps: int
    steps_per_epoch: int
    warmup_steps: int
    evaluations: frozenset[int]
    restart: int = 0
    """Step at which the second stage of a run starts, with a new optimizer; 0 without one."""
    branch_steps: frozenset[int] = frozenset()
    """Steps of a trunk at which a cooldown branch leaves it, and a checkpoint is stored."""

    @classmethod
    def plan(cls, examples: int, training: TrainingConfig, every_epochs: float) -> LrSchedule:
        """Plan a run, or the trunk of several durations.

        An epoch has ceil(examples / batch size) steps, and the last step of a run is always
        evaluated. A trunk ends where the last branch leaves it. It is evaluated at the steps at
        which the longest run would be.

        Args:
            examples: number of training examples.
            every_epochs: epochs between two evaluations.
        """
        per_epoch = math.ceil(examples / training.batch_size)
        steps = schedule_steps(training.epochs, per_epoch)
        every = max(1, round(every_epochs * per_epoch))
        warmup = _warmup_steps(training, steps, per_epoch)
        if training.durations:
            branch_steps = frozenset(
                branch_step(training, duration, per_epoch) for duration in training.durations
            )
            last = max(branch_steps)
            evaluations = frozenset(range(every, last + 1, every))
            return cls(last, per_epoch, warmup, evaluations, branch_steps=branch_steps)
        return cls(steps, per_epoch, warmup, frozenset([*range(every, steps, every), steps]))


def schedule_steps(epochs: float, steps_per_epoch: int) -> int:
    """Return the number of steps of a duration in epochs, at least 1."""
    return max(1, round(epochs * steps_per_epoch))


def _warmup_steps(training: TrainingConfig, steps: int, steps_per_epoch: int) -> int:
    """Return the number of warm-up steps, which may exceed that of the run."""
    if training.warmup_steps is not None:
        return training.warmup_steps
    if training.warmup_ratio is not None:
        return round(training.warmup_ratio * steps)
    epochs = 1.0 if training.warmup_epochs is None else training.warmup_epochs
    return round(epochs * steps_per_epoch)


def validate_warmup(examples: int, training: TrainingConfig) -> tuple[str, str] | None:
    """Check that every run reaches its peak learning rate before it decays.

    Durations that share a trunk share its warm-up, so that only the longest is checked. Without a
    shared trunk, each duration is checked.

    Returns:
        The key of `training` that is wrong and a message; None if all is well.
    """
    per_epoch = math.ceil(examples / training.batch_size)
    separate = training.durations and not training.has_decay
    given = [key for key in ("warmup_steps", "warmup_ratio") if getattr(training, key) is not None]
    key = (given or ["warmup_epochs"])[0]
    for epochs in sorted(training.durations) if separate else [training.epochs]:
        steps = schedule_steps(epochs, per_epoch)
        warmup, decay = _warmup_steps(training, steps, per_epoch), decay_start(training, steps)
        whole = (
            f"{steps:,} ({epochs:g} epochs of {examples:,} examples, {training.batch_size:,} to a "
            "batch)"
        )
        if warmup >= steps:
            return key, (
                f"{warmup:,} steps of warm-up leave nothing of the training, which has {whole}, so "
                "that the rate would never be at its peak; make it smaller, or train longer"
            )
        if warmup > decay:
            return key, (
                f"{warmup:,} steps of warm-up go on when the cooldown begins, after {decay:,} of "
                f"{whole}, so that the rate would never be at its peak; make it or "
                "training.decay_ratio smaller, or train longer"
            )
    return None


def decay_start(training: TrainingConfig, steps: int) -> int:
    """Return the step at which the cooldown of a run starts; its last step without a cooldown.

    The cooldown has round(decay_ratio * steps) steps, at least 1.
    """
    ratio = training.resolved_decay_ratio
    return steps - max(1, round(ratio * steps)) if ratio else steps


def branch_step(training: TrainingConfig, duration: float, steps_per_epoch: int) -> int:
    """Return the step at which the branch of a duration in epochs leaves the trunk.

    It is 0 for schedules whose rates depend on the duration from the first step on.
    """
    if not training.has_decay:
        return 0
    return decay_start(training, schedule_steps(duration, steps_per_epoch))


def learning_rate(step: int, peak: float, training: TrainingConfig, schedule: LrSchedule) -> float:
    """Return the learning rate of the update that follows `step` updates.

    It rises linearly from 0 over w warm-up steps; the first update of a run with warm-up has rate
    0. It is then the peak times a factor. With t the completed fraction of the remaining steps and
    f `min_lr_ratio`, the factor is

    - constant: 1
    - linear: f + (1 - f) (1 - t)
    - cosine: f + (1 - f) (1 + cos(pi t)) / 2
    - inverse_sqrt: d + (1 - d) / sqrt((step - w + s) / s), with d `inverse_sqrt_floor` and s
      `decay_steps` or w
    - wsd: 1

    The last two end in a cooldown over the last `decay_ratio` of all steps. It is linear from its
    first rate, also within the warm-up, to f. A trunk has no cooldown: its branches have one.

    Constant, linear, cosine with f = 0, and inverse_sqrt without cooldown equal transformers'
    schedulers. Biderman et al. 2024 (appendix on training) use the cosine with f = 0.01 for
    instruction tuning. For continued pretraining they use inverse_sqrt with w = s = 1000 and d = 1,
    which is wsd, with a cooldown of 0.2 to f = 0. Where the cooldown would start in the warm-up,
    their scheduler warms up to the end; here every run has its cooldown.

    After a restart, whose optimizer has no moments yet, the rate rises linearly to this schedule.
    The rise is as long as the warm-up, but at most half of the steps before the cooldown, or of the
    remaining steps if the restart is within the cooldown.
    """
    decay = schedule.steps if training.durations else decay_start(training, schedule.steps)
    if schedule.restart:
        since = step - schedule.restart
        end = decay if schedule.restart < decay else schedule.steps
        rise = min(schedule.warmup_steps, (end - schedule.restart) // 2)
        peak *= min(1.0, since / rise) if rise else 1.0
    factor = _factor_before_decay(min(step, decay), training, schedule)
    if step > decay:
        remaining = max(0.0, (schedule.steps - step) / (schedule.steps - decay))
        factor = training.min_lr_ratio + (factor - training.min_lr_ratio) * remaining
    return peak * factor


def _factor_before_decay(step: int, training: TrainingConfig, schedule: LrSchedule) -> float:
    """Return the ratio of the learning rate to its peak before the cooldown."""
    warmup, floor = schedule.warmup_steps, training.min_lr_ratio
    if step < warmup:
        return step / warmup
    done = min(1.0, (step - warmup) / max(1, schedule.steps - warmup))
    if training.schedule == "linear":
        return floor + (1.0 - floor) * (1.0 - done)
    if training.schedule == "cosine":
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
    if training.schedule == "inverse_sqrt":
        scale = training.decay_steps or max(1, warmup)
        factor = 1.0 / math.sqrt((step - warmup + scale) / scale)
        return training.inverse_sqrt_floor + (1.0 - training.inverse_sqrt_floor) * factor
    return 1.0
