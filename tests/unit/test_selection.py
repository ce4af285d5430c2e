"""The selection rules on trajectories made by hand and at random."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Literal

import pytest

from forgetting.config.evaluation import SelectionConfig
from forgetting.config.methods import Hyperparameters
from forgetting.selection import (
    CheckpointChoice,
    EvalPoint,
    choose_hyperparameters,
    is_finished,
    select_checkpoint,
    steps_to_keep,
    trajectory_of,
)

SLOW = Hyperparameters(learning_rate=1e-4)
MIDDLE = Hyperparameters(learning_rate=1e-3)
FAST = Hyperparameters(learning_rate=1e-2)
DECAYED = Hyperparameters(learning_rate=1e-3, weight_decay=0.1)
NAN = math.nan


def _points(*values: float, every: int = 10) -> list[EvalPoint]:
    """Return evaluations every `every` steps at ten steps an epoch; the first is the base's."""
    return [EvalPoint(number * every, number * every / 10, v) for number, v in enumerate(values)]


def _rule(
    hyperparameters: Literal["earliest", "smallest-lr", "fixed"] = "earliest",
    if_not_reached: Literal["none", "last"] = "none",
    deadline_epochs: float | None = None,
) -> SelectionConfig:
    return SelectionConfig(
        probe="new",
        threshold=0.9,
        hyperparameters=hyperparameters,
        if_not_reached=if_not_reached,
        deadline_epochs=deadline_epochs,
    )


CHECKPOINTS: list[tuple[str, Sequence[float], bool, str, int | None]] = [
    ("in the middle", (0.1, 0.5, 0.8, 0.95), False, "selected", 20),
    ("exactly at the threshold reaches it", (0.1, 0.5, 0.9, 0.95), False, "selected", 10),
    ("a hair below does not", (0.1, 0.5, 0.8999, 0.9), False, "selected", 20),
    ("falls again afterwards", (0.1, 0.7, 0.95, 0.3, 0.2), False, "selected", 10),
    ("dips before it", (0.1, 0.8, 0.2, 0.95), False, "selected", 20),
    ("second time does not count", (0.1, 0.7, 0.92, 0.5, 0.93), False, "selected", 10),
    ("at the first evaluation", (0.1, 0.95, 0.99), False, "first_above", None),
    ("only one evaluation, above", (0.1, 0.95), False, "first_above", None),
    ("the base is above", (0.9, 0.95), False, "base_above", None),
    ("the base is above and falls", (0.95, 0.2), False, "base_above", None),
    ("never", (0.1, 0.5, 0.89), False, "not_reached", None),
    ("nothing was evaluated", (0.1,), False, "not_reached", None),
    ("diverged before", (0.1, 0.5), True, "diverged", None),
    ("diverged before any evaluation", (0.1,), True, "diverged", None),
    ("diverged after", (0.1, 0.5, 0.95), True, "selected", 10),
    ("no number just before it", (0.1, 0.5, NAN, 0.95), False, "selected", 10),
    ("no number but the base's before it", (0.1, NAN, 0.95), False, "first_above", None),
    ("no number at the end", (0.1, 0.5, NAN), False, "not_reached", None),
    ("infinite is no number", (0.1, 0.5, math.inf), False, "not_reached", None),
]


@pytest.mark.parametrize(
    ("values", "diverged", "status", "step"),
    [c[1:] for c in CHECKPOINTS],
    ids=[c[0] for c in CHECKPOINTS],
)
def test_last_checkpoint_before_the_threshold_is_selected(
    values: Sequence[float], diverged: bool, status: str, step: int | None
) -> None:
    choice = select_checkpoint(_points(*values), 0.9, diverged=diverged)
    assert choice.status == status
    assert (choice.point.step if choice.point else None) == step
    assert choice.reason


def test_last_checkpoint_may_replace_a_missing_one() -> None:
    choice = select_checkpoint(_points(0.1, 0.7, 0.5), 0.9, "last")
    assert (choice.status, choice.point) == ("last", EvalPoint(20, 2.0, 0.5))
    assert "best value is 0.700" in choice.reason


@pytest.mark.parametrize(
    ("values", "diverged", "status"),
    [
        ((0.1,), False, "not_reached"),
        ((0.1, 0.5), True, "diverged"),
        ((0.1, 0.9), False, "first_above"),
    ],
)
def test_run_without_evaluations_has_no_checkpoint(
    values: Sequence[float], diverged: bool, status: str
) -> None:
    assert select_checkpoint(_points(*values), 0.9, "last", diverged) == CheckpointChoice(
        status,
        None,
        select_checkpoint(_points(*values), 0.9, "none", diverged).reason,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "points",
    [
        [],
        _points(NAN, 0.5),
        [EvalPoint(10, 1.0, 0.5)],
        [EvalPoint(0, 0.0, 0.1), EvalPoint(5, 1.0, 0.2), EvalPoint(5, 1.0, 0.3)],
    ],
)
def test_trajectory_without_base_or_order_is_refused(points: list[EvalPoint]) -> None:
    with pytest.raises(ValueError, match="trajectory"):
        select_checkpoint(points, 0.9)


def test_checkpoints_that_may_be_chosen_are_kept() -> None:
    """Checkpoints are pruned at each evaluation of a random trajectory; the choice remains."""
    draw = random.Random(0)
    for _ in range(3000):
        length = draw.randint(1, 8)
        values = [draw.choice([0.1, 0.5, 0.9])]
        values += [draw.choice([0.1, 0.5, 0.89, 0.9, 1.0, NAN]) for _ in range(length)]
        points = _points(*values, every=draw.randint(1, 30))
        on_disk: set[int] = set()
        for end in range(2, len(points) + 1):
            seen = points[:end]
            on_disk = (on_disk | {seen[-1].step}) & steps_to_keep(seen, 0.9)
            assert seen[-1].step in on_disk, "nothing to resume from"
            assert len(on_disk) <= 2
            for rule in ("none", "last"):
                for diverged in (False, True):
                    choice = select_checkpoint(seen, 0.9, rule, diverged)
                    assert choice.point is None or choice.point.step in on_disk


def test_checkpoints_that_cannot_be_chosen_are_dropped() -> None:
    assert steps_to_keep(_points(0.1), 0.9) == set()
    assert steps_to_keep(_points(0.1, 0.5), 0.9) == {10}
    assert steps_to_keep(_points(0.1, 0.5, 0.8), 0.9) == {20}
    assert steps_to_keep(_points(0.1, 0.5, 0.95), 0.9) == {10, 20}
    assert steps_to_keep(_points(0.1, 0.5, 0.95, 0.2, 0.99), 0.9) == {10, 40}
    assert steps_to_keep(_points(0.1, 0.95, 0.99), 0.9) == {20}
    assert steps_to_keep(_points(0.95, 0.99, 0.99), 0.9) == {20}


def test_earliest_selects_the_first_setting_at_the_threshold() -> None:
    trajectories = {
        SLOW: [_points(0.1, 0.3, 0.5, 0.95)],
        FAST: [_points(0.1, 0.5, 0.6, 0.7)],
        MIDDLE: [_points(0.1, 0.5, 0.95, 0.95)],
    }
    chosen, reason = choose_hyperparameters(trajectories, _rule())
    assert chosen == MIDDLE
    assert "earliest step (20)" in reason


def test_earliest_takes_the_mean_over_seeds() -> None:
    """Steps 20 and 50 are later on average than 30 and 30."""
    trajectories = {
        SLOW: [_points(0.1, 0.5, 0.9), _points(0.1, 0.5, 0.5, 0.5, 0.5, 0.9)],
        MIDDLE: [_points(0.1, 0.5, 0.5, 0.9), _points(0.1, 0.5, 0.5, 0.9)],
    }
    assert choose_hyperparameters(trajectories, _rule())[0] == MIDDLE


def test_more_seeds_with_checkpoint_beat_earlier_arrival() -> None:
    trajectories = {
        FAST: [_points(0.1, 0.5, 0.9), _points(0.1, 0.5, 0.5, 0.5)],
        SLOW: [_points(0.1, 0.3, 0.5, 0.9), _points(0.1, 0.3, 0.5, 0.9)],
    }
    assert choose_hyperparameters(trajectories, _rule())[0] == SLOW
    chosen, reason = choose_hyperparameters({FAST: trajectories[FAST]}, _rule())
    assert chosen == FAST
    assert "in 1 of 2 seeds" in reason


def test_ties_go_to_the_smaller_rate_and_then_the_smaller_decay() -> None:
    same = [_points(0.1, 0.5, 0.9)]
    for order in ([FAST, DECAYED, MIDDLE], [MIDDLE, FAST, DECAYED], [DECAYED, MIDDLE, FAST]):
        assert choose_hyperparameters(dict.fromkeys(order, same), _rule())[0] == MIDDLE
    assert choose_hyperparameters({FAST: same, DECAYED: same}, _rule())[0] == DECAYED


def test_smallest_lr_selects_the_smallest_rate_at_the_threshold() -> None:
    trajectories = {
        FAST: [_points(0.1, 0.5, 0.9)],
        MIDDLE: [_points(0.1, 0.3, 0.5, 0.5, 0.9)],
        SLOW: [_points(0.1, 0.2, 0.3, 0.4, 0.5)],
    }
    chosen, reason = choose_hyperparameters(trajectories, _rule("smallest-lr"))
    assert chosen == MIDDLE
    assert "smallest learning rate that reaches 0.9" in reason


def test_deadline_includes_its_epoch() -> None:
    trajectories = {
        FAST: [_points(0.1, 0.5, 0.9)],
        MIDDLE: [_points(0.1, 0.3, 0.5, 0.5, 0.9)],
    }
    assert (
        choose_hyperparameters(trajectories, _rule("smallest-lr", deadline_epochs=4.0))[0] == MIDDLE
    )
    chosen, reason = choose_hyperparameters(trajectories, _rule("smallest-lr", deadline_epochs=3.9))
    assert chosen == FAST
    assert "within 3.9 epochs" in reason
    chosen, reason = choose_hyperparameters(trajectories, _rule("smallest-lr", deadline_epochs=1.0))
    assert chosen is None
    assert reason == "no setting reaches 0.9 within 1 epochs"


def test_fallback_where_no_setting_arrives() -> None:
    trajectories = {
        SLOW: [_points(0.1, 0.2), _points(0.1, 0.4)],
        MIDDLE: [_points(0.1, 0.8), _points(0.1, 0.1)],
        FAST: [_points(0.1, 0.85, 0.2), _points(0.1, 0.3, 0.1)],
    }
    assert choose_hyperparameters(trajectories, _rule())[0] is None
    chosen, reason = choose_hyperparameters(trajectories, _rule(if_not_reached="last"))
    assert chosen == MIDDLE
    assert "the highest last value stands in" in reason


def test_fixed_setting_is_selected() -> None:
    trajectories = {SLOW: [_points(0.1, 0.2)], FAST: [_points(0.1, 0.5, 0.9)]}
    for rule in (_rule(), _rule("smallest-lr"), _rule("fixed")):
        assert choose_hyperparameters(trajectories, rule, selected=SLOW) == (
            SLOW,
            "fixed in the study",
        )
    assert choose_hyperparameters({SLOW: trajectories[SLOW]}, _rule("fixed"))[0] == SLOW


def test_setting_with_a_checkpoint_is_preferred() -> None:
    """A rate that is too high passes the threshold at the first evaluation and has no checkpoint.

    A setting that passes the threshold later has a checkpoint, which the comparison needs.
    """
    trajectories = {
        FAST: [_points(0.1, 0.95, 0.99, 0.99)],
        MIDDLE: [_points(0.1, 0.6, 0.95, 0.99)],
    }
    for rule in (_rule(), _rule("smallest-lr")):
        chosen, _ = choose_hyperparameters(trajectories, rule)
        assert chosen == MIDDLE, rule.hyperparameters


@pytest.mark.parametrize(
    ("values", "stop_after_evaluations", "over"),
    [
        ((0.1, 0.5, 0.9), None, False),
        ((0.1, 0.5, 0.9), 0, True),
        ((0.1, 0.5, 0.9), 1, False),
        ((0.1, 0.5, 0.9, 0.7), 1, True),
        ((0.1, 0.5, 0.8, 0.89), 0, False),
    ],
)
def test_run_ends_after_the_declared_evaluations(
    values: Sequence[float], stop_after_evaluations: int | None, over: bool
) -> None:
    """Early stopping cuts only what lies after the declared number of evaluations."""
    assert is_finished(_points(*values), 0.9, stop_after_evaluations) is over


def test_run_after_the_deadline_is_marked_late() -> None:
    """Its status differs from that of a run that met the rule of the study."""
    points = _points(0.1, 0.5, 0.8, 0.95)
    assert select_checkpoint(points, 0.9, deadline=3.0).status == "selected"
    late = select_checkpoint(points, 0.9, deadline=2.0)
    assert (late.status, late.point) == ("late", points[2])
    assert "after the deadline of 2 epochs" in late.reason


def test_diverged_setting_is_the_last_fallback() -> None:
    trajectories = {FAST: [_points(0.1, 0.6)], SLOW: [_points(0.1, 0.2, 0.5)]}
    rule = _rule(if_not_reached="last")
    assert choose_hyperparameters(trajectories, rule, diverged={FAST})[0] == SLOW
    assert choose_hyperparameters(trajectories, rule)[0] == FAST


def test_reason_names_a_preferred_checkpoint() -> None:
    """`earliest` would be false where an earlier setting has nothing to select."""
    trajectories = {FAST: [_points(0.1, 0.95)], SLOW: [_points(0.1, 0.5, 0.95)]}
    chosen, reason = choose_hyperparameters(trajectories, _rule())
    assert chosen == SLOW
    assert "among those with an evaluation between the base and the threshold" in reason


def test_fallback_skips_values_that_are_not_finite() -> None:
    choice = select_checkpoint(_points(0.1, 0.7, NAN), 0.9, "last")
    assert choice.point == EvalPoint(10, 1.0, 0.7)
    assert choice.reason == (
        "never reaches 0.9; its best value is 0.700; the last checkpoint with a finite value "
        "stands in"
    )


def test_nan_values_do_not_choose_a_setting() -> None:
    """This holds in any order of the sweep, also if all values of a run are NaN."""
    rule = _rule(if_not_reached="last")
    runs = {SLOW: [_points(0.1, 0.2, NAN)], FAST: [_points(0.1, 0.5, 0.6)]}
    for order in ((SLOW, FAST), (FAST, SLOW)):
        assert (
            choose_hyperparameters({setting: runs[setting] for setting in order}, rule)[0] == FAST
        )
    runs = {SLOW: [_points(0.1, NAN, NAN)], FAST: [_points(0.1, 0.05)]}
    assert choose_hyperparameters(runs, rule)[0] == FAST


def test_reason_counts_seeds_and_checkpoints() -> None:
    """Both seeds reach the threshold, one of them at once; the step is the mean of both."""
    trajectories = {
        SLOW: [_points(0.1, 0.95), _points(0.1, 0.5, 0.95)],
        FAST: [_points(0.1, 0.2, 0.3, 0.95), _points(0.1, 0.2, 0.3, 0.4)],
    }
    chosen, reason = choose_hyperparameters(trajectories, _rule())
    assert chosen == SLOW
    assert reason == (
        "reaches 0.9 at the earliest step (15); 1 of 2 seeds that reach it has an evaluation "
        "between the base and the threshold"
    )
    chosen, reason = choose_hyperparameters({FAST: trajectories[FAST]}, _rule())
    assert reason == "reaches 0.9 at the earliest step (30), in 1 of 2 seeds"


def test_reason_names_seeds_below_the_threshold() -> None:
    trajectories = {
        FAST: [_points(0.1, 0.5, 0.9), _points(0.1, 0.5, 0.5, 0.5)],
        SLOW: [_points(0.1, 0.3, 0.5, 0.9), _points(0.1, 0.3, 0.5, 0.9)],
    }
    assert choose_hyperparameters(trajectories, _rule()) == (
        SLOW,
        "reaches 0.9 at the earliest step (30), among those with an evaluation between the base "
        "and the threshold in as many seeds",
    )


def test_settings_above_at_once_have_no_checkpoint() -> None:
    chosen, reason = choose_hyperparameters(
        {FAST: [_points(0.1, 0.95)], SLOW: [_points(0.1, 0.9)]}, _rule()
    )
    assert chosen == SLOW
    assert reason == (
        "reaches 0.9 at the earliest step (10); without an evaluation between the base and the "
        "threshold"
    )


def test_base_above_the_threshold_is_the_reason() -> None:
    trajectories = {FAST: [_points(0.95, 0.96)], SLOW: [_points(0.95, 0.2)]}
    for rule in (_rule(), _rule("smallest-lr", deadline_epochs=3)):
        chosen, reason = choose_hyperparameters(trajectories, rule)
        assert chosen == SLOW
        assert reason == (
            "the base itself is at 0.950, so that no setting learns sooner than another; the "
            "smallest learning rate stands in"
        )


# --- one run, or the branches of a trunk --------------------------------------------------------


def _record(run: str, *points: tuple[int, float], **more: object) -> dict[str, object]:
    """Return the record of a run with ten steps an epoch."""
    evaluations = [[step, step / 10, value] for step, value in points]
    record = {"run": run, "status": "ok", "steps": points[-1][0], "evaluations": evaluations}
    return record | more


def test_trajectory_of_a_run_is_its_evaluations() -> None:
    course = trajectory_of([_record("a", (10, 0.5), (20, 0.95))], 0.1)
    assert course.evaluations == _points(0.1, 0.5, 0.95)
    assert course.run_at(course.evaluations[1]) == course.run_at(None) == "a"
    assert not course.diverged


def test_trajectory_of_branches_is_their_ends() -> None:
    """Earlier evaluations of trunk and branches do not count."""
    branches = [
        _record("a/duration4", (10, 0.6), (30, 0.95), (40, 0.97), duration=4.0),
        _record("a/duration1", (5, 0.2), (10, 0.4), duration=1.0),
        _record("a/duration2", (10, 0.6), (20, 0.8), duration=2.0),
    ]
    course = trajectory_of(branches, 0.1)
    assert [(point.step, point.value) for point in course.evaluations] == [
        (0, 0.1),
        (10, 0.4),
        (20, 0.8),
        (40, 0.97),
    ]
    choice = select_checkpoint(course.evaluations, 0.9)
    assert (choice.status, course.run_at(choice.point)) == ("selected", "a/duration2")
    assert course.run_at(None) == "a/duration4"


def test_trajectory_of_one_duration_has_one_evaluation() -> None:
    course = trajectory_of([_record("a/duration4", (10, 0.6), (40, 0.7), duration=4.0)], 0.1)
    assert [point.step for point in course.evaluations] == [0, 40]


def test_diverged_branches_are_left_out() -> None:
    broken = {"duration": 2.0, "status": "diverged"}
    ended = _record("a/duration1", (10, 0.4), duration=1.0)
    course = trajectory_of([ended, _record("a/duration2", (10, 0.6), **broken)], 0.1)
    assert [point.step for point in course.evaluations] == [0, 10]
    assert course.diverged
    none = trajectory_of([_record("a/duration2", (10, 0.6), **broken)], 0.1)
    assert select_checkpoint(none.evaluations, 0.9, "last", none.diverged).status == "diverged"
    assert none.run_at(None) == "a/duration2"
