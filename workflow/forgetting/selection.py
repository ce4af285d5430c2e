"""Which checkpoint and which hyper-parameters stand for a method: pure functions over trajectories.

The rules are those of *Low-Rank Fine-tuning Forgets More*: methods are compared at about equal new
knowledge, at the last checkpoint before ROUGE on the new knowledge reaches a threshold. A value
that is not finite was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any, Literal

from forgetting.config.methods import Hyperparameters
from forgetting.config.selection import SelectionConfig

SelectionStatus = Literal[
    "selected", "late", "last", "not_reached", "first_above", "base_above", "diverged"
]


@dataclass(frozen=True)
class EvalPoint:
    """The selection metric of one run at one evaluation; the base is step 0, epoch 0."""

    step: int
    epoch: float
    value: float


@dataclass(frozen=True)
class CheckpointChoice:
    """The checkpoint of one run, or why there is none (`point` is None then)."""

    status: SelectionStatus
    point: EvalPoint | None
    reason: str


def recorded_evaluations(recorded: Sequence[Sequence[float]], base: float) -> list[EvalPoint]:
    """A trajectory from a run's records of step, epoch and value, the base's value first."""
    return [
        EvalPoint(0, 0.0, base),
        *(EvalPoint(int(step), epoch, v) for step, epoch, v in recorded),
    ]


@dataclass(frozen=True)
class Trajectory:
    """What the rules see of one setting and seed, and the run that holds the checkpoint of a step.

    Of a run the points are its evaluations. Of the branches of a trunk they are their ends, each at
    the steps of its duration: what is measured before a cooldown is over stands for no training.
    """

    evaluations: list[EvalPoint]
    runs: Mapping[int, str]
    diverged: bool

    def run_at(self, point: EvalPoint | None) -> str:
        """The run that a checkpoint is of; without one the last."""
        return self.runs[max(self.runs) if point is None else point.step]


def trajectory_of(records: Sequence[Mapping[str, Any]], base: float) -> Trajectory:
    """From the record of a run, or those of the branches of its durations.

    Branches that diverged are left out; of several durations of as many steps one counts.
    """
    diverged = any(record["status"] == "diverged" for record in records)
    if len(records) == 1 and records[0].get("duration") is None:
        points = recorded_evaluations(records[0]["evaluations"], base)
        return Trajectory(points, {point.step: records[0]["run"] for point in points}, diverged)
    ended = {int(record["steps"]): record for record in records if record["status"] != "diverged"}
    ends = [ended[steps]["evaluations"][-1] for steps in sorted(ended)]
    runs = {steps: str(record["run"]) for steps, record in ended.items()}
    first = {0: str(records[0]["run"])}
    return Trajectory(recorded_evaluations(ends, base), first | runs, diverged)


def measured_value(points: Sequence[EvalPoint]) -> list[EvalPoint]:
    """The base and the evaluations that gave a number."""
    if not points or points[0].step != 0:
        raise ValueError("a trajectory begins with the base, at step 0")
    if not math.isfinite(points[0].value):
        raise ValueError("a trajectory begins with the value of the base, which is not finite")
    return [point for point in points if math.isfinite(point.value)]


def first_reaching(points: Sequence[EvalPoint], threshold: float) -> int | None:
    """Index of the first evaluation whose value is at least the threshold, or None."""
    return next(
        (i for i, p in enumerate(points) if math.isfinite(p.value) and p.value >= threshold), None
    )


def select_checkpoint(
    points: Sequence[EvalPoint],
    threshold: float,
    if_not_reached: Literal["none", "last"] = "none",
    diverged: bool = False,
    deadline: float | None = None,
) -> CheckpointChoice:
    """The last evaluation before the value first reaches the threshold.

    Args:
        points: evaluations in order of steps, beginning with the base (step 0).
        threshold: of the selection metric, reached when value >= threshold.
        if_not_reached: what to do with a run that never reaches it.
        diverged: did the loss of the run cease to be a number?
        deadline: epoch by which the threshold was to be reached; a later run is marked `late`.
    """
    if any(later.step <= earlier.step for earlier, later in pairwise(points)):
        raise ValueError("the steps of a trajectory must rise")
    end, points = points[-1:], measured_value(points)
    index = first_reaching(points, threshold)
    if index is None and diverged:
        return CheckpointChoice(
            "diverged", None, "the loss ceased to be a number before the threshold"
        )
    if index is None:
        best = max(point.value for point in points)
        told = f"never reaches {threshold:g}; its best value is {best:.3f}"
        if if_not_reached == "last" and len(points) > 1:
            which = "the last checkpoint" + ("" if points[-1:] == end else " with a finite value")
            return CheckpointChoice("last", points[-1], f"{told}; {which} stands in")
        return CheckpointChoice("not_reached", None, told)
    if index == 0:
        told = f"the base itself is at {points[0].value:.3f}: there is nothing new to learn"
        return CheckpointChoice("base_above", None, told)
    if index == 1:
        told = (
            f"already {points[1].value:.3f} at step {points[1].step}, and nothing was measured "
            "between it and the base; evaluate more often (evaluation.every_epochs)"
        )
        return CheckpointChoice("first_above", None, told)
    before, reached = points[index - 1], points[index]
    told = (
        f"{before.value:.3f} at step {before.step}, the last evaluation before {threshold:g} is "
        f"reached ({reached.value:.3f} at step {reached.step})"
    )
    if deadline is not None and reached.epoch > deadline:
        return CheckpointChoice(
            "late", before, f"{told}, after the deadline of {deadline:g} epochs"
        )
    return CheckpointChoice("selected", before, told)


def is_finished(
    points: Sequence[EvalPoint], threshold: float, stop_after_evaluations: int | None
) -> bool:
    """Has a run been followed for `stop_after_evaluations` evaluations after the one at the "
    "threshold?"""
    index = first_reaching(points, threshold)
    return (
        stop_after_evaluations is not None
        and index is not None
        and len(points) - 1 - index >= stop_after_evaluations
    )


def steps_to_keep(points: Sequence[EvalPoint], threshold: float) -> set[int]:
    """Steps whose checkpoints the rule can still pick, and the newest, from which to resume."""
    trained = [point for point in points if point.step > 0]
    if not trained:
        return set()
    known = measured_value(points)
    index = first_reaching(known, threshold)
    last = len(known) if index is None else index
    return {trained[-1].step, known[max(last - 1, 0)].step} - {0}


def choose_hyperparameters(
    trajectories: Mapping[Hyperparameters, Sequence[Sequence[EvalPoint]]],
    rule: SelectionConfig,
    fixed: Hyperparameters | None = None,
    diverged: Collection[Hyperparameters] = (),
) -> tuple[Hyperparameters | None, str]:
    """The hyper-parameters of a method, and the reason in a sentence.

    Args:
        trajectories: for each setting of the sweep, one trajectory per seed; runs that diverged
            before the threshold never reach it.
        rule: of the study. Settings that reach the threshold later than at the first evaluation,
            so that there is a checkpoint, and with more seeds, go before the others; then
            `earliest` takes the smallest mean step, `smallest-lr` the smallest learning rate. Ties
            go to the smaller learning rate, then weight decay.
        fixed: this setting, whatever the rule.
        diverged: settings with a run that diverged; they stand in only if no other can.
    """
    if fixed is not None:
        return fixed, "fixed in the study"
    if rule.hyperparameters == "fixed" and len(trajectories) == 1:
        return next(iter(trajectories)), "the only setting"
    known = {
        setting: [measured_value(run) for run in runs] for setting, runs in trajectories.items()
    }
    base = max((run[0].value for runs in known.values() for run in runs), default=-math.inf)
    if base >= rule.threshold:
        told = f"the base itself is at {base:.3f}, so that no setting learns sooner than another"
        return min(known, key=_size), f"{told}; the smallest learning rate stands in"
    deadline = rule.deadline_epochs if rule.hyperparameters == "smallest-lr" else None
    within = f" within {deadline:g} epochs" if deadline else ""
    arrivals = {
        setting: _crossings(runs, rule.threshold, deadline) for setting, runs in known.items()
    }
    able = {setting: found for setting, found in arrivals.items() if found}
    if not able:
        return _best_fallback(
            known, rule, f"no setting reaches {rule.threshold:g}{within}", diverged
        )

    def order(setting: Hyperparameters) -> tuple[float, float, float]:
        steps = mean(arrival.step for arrival in able[setting])
        return steps if rule.hyperparameters == "earliest" else 0.0, *_size(setting)

    # A run that is above at its first evaluation has no checkpoint before it: second choice.
    most = max(map(_with_checkpoint, able.values()))
    chosen = min((one for one in able if _with_checkpoint(able[one]) == most), key=order)
    told = {
        "earliest": f"reaches {rule.threshold:g} at the earliest step ({order(chosen)[0]:g})",
        "smallest-lr": f"smallest learning rate that reaches {rule.threshold:g}{within}",
    }[rule.hyperparameters]
    seeds = len(known[chosen])
    among = chosen != min(able, key=order)
    return chosen, told + _describe_seeds(able[chosen], seeds, among)


@dataclass(frozen=True)
class _ThresholdCrossing:
    """Where a seed first reaches the threshold, and whether it has a checkpoint before that."""

    step: int
    has_checkpoint: bool


def _crossings(
    runs: Sequence[Sequence[EvalPoint]], threshold: float, deadline: float | None
) -> list[_ThresholdCrossing]:
    """Of the seeds of a setting that reach the threshold in time."""
    return [
        _ThresholdCrossing(run[index].step, index > 1)
        for run in runs
        if (index := first_reaching(run, threshold)) is not None
        and (deadline is None or run[index].epoch <= deadline)
    ]


def _with_checkpoint(arrivals: Sequence[_ThresholdCrossing]) -> int:
    return sum(arrival.has_checkpoint for arrival in arrivals)


def _size(setting: Hyperparameters) -> tuple[float, float]:
    return setting.learning_rate, setting.weight_decay


def _describe_seeds(arrivals: Sequence[_ThresholdCrossing], seeds: int, among: bool) -> str:
    """How many seeds arrive, and how many of them have a checkpoint to show."""
    reached, able = len(arrivals), _with_checkpoint(arrivals)
    told = "" if reached == seeds else f", in {reached} of {seeds} seeds"
    between = "an evaluation between the base and the threshold"
    if among:
        told += f", among those with {between}" + (" in as many seeds" if seeds > 1 else "")
    if able == 0:
        told += f"; without {between}"
    elif able < reached:
        told += (
            f"; {able} of {reached} seeds that reach it {'has' if able == 1 else 'have'} {between}"
        )
    return told


def _best_fallback(
    known: Mapping[Hyperparameters, Sequence[Sequence[EvalPoint]]],
    rule: SelectionConfig,
    told: str,
    diverged: Collection[Hyperparameters],
) -> tuple[Hyperparameters | None, str]:
    if rule.if_not_reached == "none":
        return None, told

    def last(setting: Hyperparameters) -> tuple[int, bool, float, float, float]:
        runs = known[setting]
        bare = sum(len(run) < 2 for run in runs)
        return bare, setting in diverged, -mean(run[-1].value for run in runs), *_size(setting)

    return min(known, key=last), f"{told}; the highest last value stands in"
