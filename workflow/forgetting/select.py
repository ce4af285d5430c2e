"""Which checkpoint and which hyper-parameters stand for a method: pure functions over trajectories.

The rules are those of *Low-Rank Fine-tuning Forgets More*: methods are compared at equal new
knowledge, at the last checkpoint before ROUGE on the new knowledge reaches a threshold.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any, Literal

from forgetting.study import Selection, Setting

Status = Literal["selected", "late", "last", "not_reached", "first_above", "base_above", "diverged"]


@dataclass(frozen=True)
class Point:
    """The selection metric of one run at one evaluation; the base is step 0, epoch 0."""

    step: int
    epoch: float
    value: float


@dataclass(frozen=True)
class Choice:
    """The checkpoint of one run, or why there is none (`point` is None then)."""

    status: Status
    point: Point | None
    reason: str


def recorded_points(recorded: Sequence[Sequence[float]], base: float) -> list[Point]:
    """A trajectory from a run's records of step, epoch and value, the base's value first."""
    return [Point(0, 0.0, base), *(Point(int(step), epoch, v) for step, epoch, v in recorded)]


@dataclass(frozen=True)
class Course:
    """What the rules see of one setting and seed, and the run that holds the checkpoint of a step.

    Of a run the points are its evaluations. Of the branches of a trunk they are their ends, each at
    the steps of its budget: what is measured before a cooldown is over stands for no training.
    """

    points: list[Point]
    runs: Mapping[int, str]
    diverged: bool

    def run_at(self, point: Point | None) -> str:
        """The run that a checkpoint is of; without one the last."""
        return self.runs[max(self.runs) if point is None else point.step]


def course_of(records: Sequence[Mapping[str, Any]], base: float) -> Course:
    """From the record of a run, or those of the branches of its budgets.

    Branches that diverged are left out; of several budgets of as many steps one counts.
    """
    diverged = any(record["status"] == "diverged" for record in records)
    if len(records) == 1 and records[0].get("budget") is None:
        points = recorded_points(records[0]["points"], base)
        return Course(points, {point.step: records[0]["run"] for point in points}, diverged)
    ended = {int(record["steps"]): record for record in records if record["status"] != "diverged"}
    ends = [ended[steps]["points"][-1] for steps in sorted(ended)]
    runs = {steps: str(record["run"]) for steps, record in ended.items()}
    first = {0: str(records[0]["run"])}
    return Course(recorded_points(ends, base), first | runs, diverged)


def first_reaching(points: Sequence[Point], threshold: float) -> int | None:
    """Index of the first evaluation whose value is at least the threshold, or None."""
    return next((i for i, point in enumerate(points) if point.value >= threshold), None)


def select_checkpoint(
    points: Sequence[Point],
    threshold: float,
    if_not_reached: Literal["none", "last"] = "none",
    diverged: bool = False,
    deadline: float | None = None,
) -> Choice:
    """The last evaluation before the value first reaches the threshold.

    Args:
        points: evaluations in order of steps, beginning with the base (step 0).
        threshold: of the selection metric, reached when value >= threshold.
        if_not_reached: what to do with a run that never reaches it.
        diverged: did the loss of the run cease to be a number?
        deadline: epoch by which the threshold was to be reached; a later run is marked `late`.
    """
    if not points or points[0].step != 0:
        raise ValueError("a trajectory begins with the base, at step 0")
    if any(later.step <= earlier.step for earlier, later in pairwise(points)):
        raise ValueError("the steps of a trajectory must rise")
    index = first_reaching(points, threshold)
    if index is None and diverged:
        return Choice("diverged", None, "the loss ceased to be a number before the threshold")
    if index is None:
        best = max(point.value for point in points)
        told = f"never reaches {threshold:g}; its best value is {best:.3f}"
        if if_not_reached == "last" and len(points) > 1:
            return Choice("last", points[-1], f"{told}; the last checkpoint stands in")
        return Choice("not_reached", None, told)
    if index == 0:
        told = f"the base itself is at {points[0].value:.3f}: there is nothing new to learn"
        return Choice("base_above", None, told)
    if index == 1:
        told = (
            f"already {points[1].value:.3f} at the first evaluation, step {points[1].step}: the "
            "only one before is the base; evaluate more often (measurement.every_epochs)"
        )
        return Choice("first_above", None, told)
    before, reached = points[index - 1], points[index]
    told = (
        f"{before.value:.3f} at step {before.step}, the last evaluation before {threshold:g} is "
        f"reached ({reached.value:.3f} at step {reached.step})"
    )
    if deadline is not None and reached.epoch > deadline:
        return Choice("late", before, f"{told}, after the deadline of {deadline:g} epochs")
    return Choice("selected", before, told)


def is_over(points: Sequence[Point], threshold: float, stop_after: int | None) -> bool:
    """Has a run been followed for `stop_after` evaluations after the one at the threshold?"""
    index = first_reaching(points, threshold)
    return stop_after is not None and index is not None and len(points) - 1 - index >= stop_after


def steps_to_keep(points: Sequence[Point], threshold: float) -> set[int]:
    """Steps whose checkpoints the rule can still pick, and the newest, from which to resume."""
    trained = [point for point in points if point.step > 0]
    if not trained:
        return set()
    kept = {trained[-1].step}
    index = first_reaching(points, threshold)
    if index is not None and index > 0:
        kept.add(points[index - 1].step)
    return kept - {0}


def choose_setting(
    trajectories: Mapping[Setting, Sequence[Sequence[Point]]],
    rule: Selection,
    fixed: Setting | None = None,
    diverged: Collection[Setting] = (),
) -> tuple[Setting | None, str]:
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
    deadline = rule.within_epochs if rule.hyperparameters == "smallest-lr" else None
    # A run that is above at its first evaluation has no checkpoint before it: second choice.
    reached = _reaching(trajectories, rule.threshold, deadline, first_index=2)
    passed_over = _reaching(trajectories, rule.threshold, deadline, first_index=0) != reached
    if not any(reached.values()):
        passed_over = False
        reached = _reaching(trajectories, rule.threshold, deadline, first_index=0)
    most = max(map(len, reached.values()), default=0)
    if most == 0:
        return _closest(trajectories, rule, deadline, diverged)
    able = {setting: points for setting, points in reached.items() if len(points) == most}

    def order(setting: Setting) -> tuple[float, float, float]:
        steps = mean(point.step for point in able[setting])
        first = steps if rule.hyperparameters == "earliest" else 0.0
        return first, setting.learning_rate, setting.weight_decay

    chosen = min(able, key=order)
    seeds = len(trajectories[chosen])
    within = f" within {deadline:g} epochs" if deadline else ""
    extent = "" if most == seeds else f", in {most} of {seeds} seeds"
    told = {
        "earliest": f"reaches {rule.threshold:g} at the earliest step ({order(chosen)[0]:g})",
        "smallest-lr": f"smallest learning rate that reaches {rule.threshold:g}{within}",
    }[rule.hyperparameters]
    among = ", among those with an evaluation between the base and the threshold"
    return chosen, told + extent + (among if passed_over else "")


def _reaching(
    trajectories: Mapping[Setting, Sequence[Sequence[Point]]],
    threshold: float,
    deadline: float | None,
    first_index: int,
) -> dict[Setting, list[Point]]:
    """For each setting, where its seeds first reach the threshold: in time, and not too early."""
    return {
        setting: [
            points[index]
            for points in seeds
            if (index := first_reaching(points, threshold)) is not None
            and index >= first_index
            and (deadline is None or points[index].epoch <= deadline)
        ]
        for setting, seeds in trajectories.items()
    }


def _closest(
    trajectories: Mapping[Setting, Sequence[Sequence[Point]]],
    rule: Selection,
    deadline: float | None,
    diverged: Collection[Setting],
) -> tuple[Setting | None, str]:
    within = f" within {deadline:g} epochs" if deadline else ""
    told = f"no setting reaches {rule.threshold:g}{within}"
    if rule.if_not_reached == "none":
        return None, told

    def last(setting: Setting) -> tuple[bool, float, float, float]:
        value = mean(points[-1].value for points in trajectories[setting])
        return setting in diverged, -value, setting.learning_rate, setting.weight_decay

    return min(trajectories, key=last), f"{told}; the highest last value stands in"
