"""Choose the hyperparameters of a method and the checkpoint of each run, from their trajectories.

The rules are those of *Low-Rank Fine-tuning Forgets More*. Methods are compared at about equal new
knowledge: at the last checkpoint before ROUGE on the new knowledge reaches a threshold. A value
that is not finite counts as not measured. All functions are pure.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any, Literal

from forgetting.config.evaluation import SelectionConfig
from forgetting.config.methods import Hyperparameters

SelectionStatus = Literal[
    "selected", "late", "last", "not_reached", "first_above", "base_above", "diverged"
]


@dataclass(frozen=True)
class EvalPoint:
    """Value of the selection metric at one evaluation; the base model is step 0, epoch 0."""

    step: int
    epoch: float
    value: float


@dataclass(frozen=True)
class CheckpointChoice:
    """The chosen checkpoint of a run, or the reason why there is none (`point` is None)."""

    status: SelectionStatus
    point: EvalPoint | None
    reason: str


def recorded_evaluations(recorded: Sequence[Sequence[float]], base: float) -> list[EvalPoint]:
    """Return the evaluations of a run, preceded by that of the base model.

    Args:
        recorded: step, epoch and value of each evaluation.
        base: value of the base model.
    """
    return [
        EvalPoint(0, 0.0, base),
        *(EvalPoint(int(step), epoch, value) for step, epoch, value in recorded),
    ]


@dataclass(frozen=True)
class Trajectory:
    """The evaluations of one setting of hyperparameters and seed.

    For an ordinary run they are all evaluations. With several durations only the end of each
    cooldown counts, since earlier checkpoints are not finished models.

    Attributes:
        evaluations: in order of steps, beginning with the base model.
        runs: name of the run that holds the checkpoint, by step.
        diverged: whether a run diverged.
    """

    evaluations: list[EvalPoint]
    runs: Mapping[int, str]
    diverged: bool

    def run_at(self, point: EvalPoint | None) -> str:
        """Return the run of a checkpoint; without a checkpoint, the last run."""
        return self.runs[max(self.runs) if point is None else point.step]


def trajectory_of(records: Sequence[Mapping[str, Any]], base: float) -> Trajectory:
    """Return the trajectory of one setting and seed.

    Branches that diverged are left out, and durations with equally many steps count once.

    Args:
        records: the record of a run, or those of the cooldown branches of several durations.
        base: value of the base model.
    """
    diverged = any(record["status"] == "diverged" for record in records)
    if len(records) == 1 and records[0].get("duration") is None:
        evaluations = recorded_evaluations(records[0]["evaluations"], base)
        runs = {evaluation.step: records[0]["run"] for evaluation in evaluations}
        return Trajectory(evaluations, runs, diverged)
    sound = [record for record in records if record["status"] != "diverged"]
    by_steps = {int(record["steps"]): record for record in sound}
    last = [by_steps[steps]["evaluations"][-1] for steps in sorted(by_steps)]
    runs = {0: str(records[0]["run"])}
    runs |= {steps: str(record["run"]) for steps, record in by_steps.items()}
    return Trajectory(recorded_evaluations(last, base), runs, diverged)


def finite_evaluations(points: Sequence[EvalPoint]) -> list[EvalPoint]:
    """Return the evaluations with a finite value, beginning with the base model.

    Raises:
        ValueError: the first evaluation is not a finite one of the base model.
    """
    if not points or points[0].step != 0:
        raise ValueError("a trajectory begins with the base, at step 0")
    if not math.isfinite(points[0].value):
        raise ValueError("a trajectory begins with the value of the base, which is not finite")
    return [point for point in points if math.isfinite(point.value)]


def first_reaching(points: Sequence[EvalPoint], threshold: float) -> int | None:
    """Return the index of the first evaluation whose value is at least the threshold, or None."""
    return next(
        (
            index
            for index, point in enumerate(points)
            if math.isfinite(point.value) and point.value >= threshold
        ),
        None,
    )


def select_checkpoint(
    points: Sequence[EvalPoint],
    threshold: float,
    if_not_reached: Literal["none", "last"] = "none",
    diverged: bool = False,
    deadline: float | None = None,
) -> CheckpointChoice:
    """Choose the last evaluation before the value first reaches the threshold.

    Args:
        points: evaluations in order of steps, beginning with the base model (step 0).
        threshold: of the selection metric, reached when value >= threshold.
        if_not_reached: choose no checkpoint or the last one if the run never reaches it.
        diverged: whether the run diverged.
        deadline: epoch by which the threshold should be reached; a later run is marked `late`.

    Raises:
        ValueError: the steps do not rise, or the base model is missing or has no finite value.
    """
    if any(later.step <= earlier.step for earlier, later in pairwise(points)):
        raise ValueError("the steps of a trajectory must rise")
    end, points = points[-1:], finite_evaluations(points)
    index = first_reaching(points, threshold)
    if index is None and diverged:
        return CheckpointChoice(
            "diverged", None, "the loss ceased to be a number before the threshold"
        )
    if index is None:
        best = max(point.value for point in points)
        reason = f"never reaches {threshold:g}; its best value is {best:.3f}"
        if if_not_reached == "last" and len(points) > 1:
            which = "the last checkpoint" + ("" if points[-1:] == end else " with a finite value")
            return CheckpointChoice("last", points[-1], f"{reason}; {which} stands in")
        return CheckpointChoice("not_reached", None, reason)
    if index == 0:
        reason = f"the base itself is at {points[0].value:.3f}: there is nothing new to learn"
        return CheckpointChoice("base_above", None, reason)
    if index == 1:
        reason = (
            f"already {points[1].value:.3f} at step {points[1].step}, and nothing was measured "
            "between it and the base; evaluate more often (evaluation.every_epochs)"
        )
        return CheckpointChoice("first_above", None, reason)
    before, reached = points[index - 1], points[index]
    reason = (
        f"{before.value:.3f} at step {before.step}, the last evaluation before {threshold:g} is "
        f"reached ({reached.value:.3f} at step {reached.step})"
    )
    if deadline is not None and reached.epoch > deadline:
        return CheckpointChoice(
            "late", before, f"{reason}, after the deadline of {deadline:g} epochs"
        )
    return CheckpointChoice("selected", before, reason)


def is_finished(
    points: Sequence[EvalPoint], threshold: float, stop_after_evaluations: int | None
) -> bool:
    """Return whether a run has had `stop_after_evaluations` evaluations after the threshold."""
    index = first_reaching(points, threshold)
    return (
        stop_after_evaluations is not None
        and index is not None
        and len(points) - 1 - index >= stop_after_evaluations
    )


def steps_to_keep(points: Sequence[EvalPoint], threshold: float) -> set[int]:
    """Return the steps whose checkpoints can still be chosen, and the newest, to resume from."""
    trained = [point for point in points if point.step > 0]
    if not trained:
        return set()
    finite = finite_evaluations(points)
    index = first_reaching(finite, threshold)
    end = len(finite) if index is None else index
    return {trained[-1].step, finite[max(end - 1, 0)].step} - {0}


def choose_hyperparameters(
    trajectories: Mapping[Hyperparameters, Sequence[Sequence[EvalPoint]]],
    rule: SelectionConfig,
    selected: Hyperparameters | None = None,
    diverged: Collection[Hyperparameters] = (),
) -> tuple[Hyperparameters | None, str]:
    """Choose the hyperparameters of a method.

    Settings with a checkpoint before the threshold in more seeds come first. Among them `earliest`
    chooses the smallest mean step at the threshold, `smallest-lr` the smallest learning rate. Ties
    go to the smaller learning rate, then to the smaller weight decay.

    Args:
        trajectories: for each setting of the sweep, one trajectory per seed. A run that diverged
            before the threshold never reaches it.
        rule: of the study.
        selected: setting that the study prescribes.
        diverged: settings with a run that diverged; they are the last fallback.

    Returns:
        The setting, None if there is none, and the reason in a sentence.
    """
    if selected is not None:
        return selected, "fixed in the study"
    if rule.hyperparameters == "fixed" and len(trajectories) == 1:
        return next(iter(trajectories)), "the only setting"
    finite = {
        setting: [finite_evaluations(run) for run in runs] for setting, runs in trajectories.items()
    }
    base = max((run[0].value for runs in finite.values() for run in runs), default=-math.inf)
    if base >= rule.threshold:
        reason = f"the base itself is at {base:.3f}, so that no setting learns sooner than another"
        return min(finite, key=_tie_break), f"{reason}; the smallest learning rate stands in"
    deadline = rule.deadline_epochs if rule.hyperparameters == "smallest-lr" else None
    within = f" within {deadline:g} epochs" if deadline else ""
    crossings = {
        setting: reached
        for setting, runs in finite.items()
        if (reached := _crossings(runs, rule.threshold, deadline))
    }
    if not crossings:
        reason = f"no setting reaches {rule.threshold:g}{within}"
        return _best_fallback(finite, rule, reason, diverged)

    def order(setting: Hyperparameters) -> tuple[float, float, float]:
        steps = mean(crossing.step for crossing in crossings[setting])
        return steps if rule.hyperparameters == "earliest" else 0.0, *_tie_break(setting)

    # A run above the threshold at its first evaluation has no checkpoint before it.
    most = max(map(_checkpoint_count, crossings.values()))
    preferred = [one for one in crossings if _checkpoint_count(crossings[one]) == most]
    chosen = min(preferred, key=order)
    reason = {
        "earliest": f"reaches {rule.threshold:g} at the earliest step ({order(chosen)[0]:g})",
        "smallest-lr": f"smallest learning rate that reaches {rule.threshold:g}{within}",
    }[rule.hyperparameters]
    seeds = len(finite[chosen])
    preferred_for_checkpoint = chosen != min(crossings, key=order)
    return chosen, reason + _describe_seeds(crossings[chosen], seeds, preferred_for_checkpoint)


@dataclass(frozen=True)
class _ThresholdCrossing:
    """Step at which a seed first reaches the threshold; whether a checkpoint precedes it."""

    step: int
    has_checkpoint: bool


def _crossings(
    runs: Sequence[Sequence[EvalPoint]], threshold: float, deadline: float | None
) -> list[_ThresholdCrossing]:
    """Return the crossings of the seeds that reach the threshold by the deadline."""
    return [
        _ThresholdCrossing(run[index].step, index > 1)
        for run in runs
        if (index := first_reaching(run, threshold)) is not None
        and (deadline is None or run[index].epoch <= deadline)
    ]


def _checkpoint_count(crossings: Sequence[_ThresholdCrossing]) -> int:
    return sum(crossing.has_checkpoint for crossing in crossings)


def _tie_break(setting: Hyperparameters) -> tuple[float, float]:
    return setting.learning_rate, setting.weight_decay


def _describe_seeds(
    crossings: Sequence[_ThresholdCrossing], seeds: int, preferred_for_checkpoint: bool
) -> str:
    """Describe how many seeds reach the threshold, and how many have a checkpoint before it."""
    reached, with_checkpoint = len(crossings), _checkpoint_count(crossings)
    text = "" if reached == seeds else f", in {reached} of {seeds} seeds"
    between = "an evaluation between the base and the threshold"
    if preferred_for_checkpoint:
        text += f", among those with {between}" + (" in as many seeds" if seeds > 1 else "")
    if with_checkpoint == 0:
        text += f"; without {between}"
    elif with_checkpoint < reached:
        verb = "has" if with_checkpoint == 1 else "have"
        text += f"; {with_checkpoint} of {reached} seeds that reach it {verb} {between}"
    return text


def _best_fallback(
    trajectories: Mapping[Hyperparameters, Sequence[Sequence[EvalPoint]]],
    rule: SelectionConfig,
    reason: str,
    diverged: Collection[Hyperparameters],
) -> tuple[Hyperparameters | None, str]:
    """Choose the setting with the highest last value if the rule allows it."""
    if rule.if_not_reached == "none":
        return None, reason

    def order(setting: Hyperparameters) -> tuple[int, bool, float, float, float]:
        runs = trajectories[setting]
        unmeasured = sum(len(run) < 2 for run in runs)
        last = mean(run[-1].value for run in runs)
        return unmeasured, setting in diverged, -last, *_tie_break(setting)

    return min(trajectories, key=order), f"{reason}; the highest last value stands in"
