"""Learning rates and optimizers are those of the papers, to the last step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import get_inverse_sqrt_schedule

from forgetting.config.methods import Hyperparameters
from forgetting.config.training import TrainingConfig
from forgetting.schedule import LrSchedule, decay_start, learning_rate
from forgetting.training.batched_lora import trained_weights
from forgetting.training.optimizer import (
    LionW,
    learning_rate_ratios,
    make_optimizer,
    uses_fused_kernel,
)
from support.training import TrainingHarness, adapter_method

HUNDRED = LrSchedule(steps=100, steps_per_epoch=10, warmup_steps=10, evaluations=frozenset({100}))


def _rates(plan: LrSchedule = HUNDRED, **settings: Any) -> list[float]:
    training = TrainingConfig(**settings)
    return [learning_rate(step, 2.0, training, plan) for step in range(plan.steps + 1)]


def test_wsd_rises_stays_and_falls() -> None:
    """Warm-up over 10 steps, flat, and the last 20 % linear to 0: Biderman et al.'s trunk."""
    rates = _rates(schedule="wsd")
    assert rates[0] == 0.0
    assert rates[5] == pytest.approx(1.0)
    assert rates[10:81] == [2.0] * 71
    assert rates[90] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.1)
    assert rates[100] == 0.0


def test_a_cooldown_starts_where_the_inverse_root_is() -> None:
    rates = _rates(schedule="inverse_sqrt", decay_ratio=0.6, min_lr_ratio=0.1)
    assert rates[40] == pytest.approx(2.0 * math.sqrt(10 / 40))
    assert rates[70] == pytest.approx((1.0 + 0.2) / 2)
    assert rates[100] == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rate_ends_at_min_lr_ratio(schedule: str) -> None:
    """Biderman et al.'s instruction tuning ends at 0.01 of the peak."""
    rates, to_zero = _rates(schedule=schedule, min_lr_ratio=0.01), _rates(schedule=schedule)
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(0.99 * to_zero[55] + 0.02)
    assert rates[55] == pytest.approx(1.01)
    assert rates[100] == pytest.approx(0.02)


@pytest.mark.parametrize("warmup", [1, 10])
def test_inverse_sqrt_matches_transformers(warmup: int) -> None:
    plan = LrSchedule(50, 10, warmup, frozenset({50}))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = get_inverse_sqrt_schedule(optimizer, warmup)
    for rate in _rates(plan, schedule="inverse_sqrt", decay_ratio=0.0)[:50]:
        assert rate == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        theirs.step()


def test_cooldown_within_warmup_falls_from_there() -> None:
    """The shortest durations of Biderman et al. end within the warm-up of 1000 steps."""
    plan = LrSchedule(318, 25431, 1000, frozenset({318}))
    rates = _rates(plan, schedule="wsd")
    assert rates[:255] == pytest.approx([2.0 * step / 1000 for step in range(255)])
    assert rates[254:] == pytest.approx([0.508 * left / 64 for left in range(64, -1, -1)])


def _llm_foundry(
    step: int, steps: int, warmup: int, scale: int, floors: tuple[float, ...]
) -> float:
    """The multiplier of Biderman et al.'s scheduler, written down from its published formula."""
    cooldown = round(0.2 * steps)

    def before(step: int) -> float:
        if step < warmup:
            return step / warmup
        return floors[0] + (1 - floors[0]) / math.sqrt((step - warmup + scale) / scale)

    if step < steps - cooldown:
        return before(step)
    start = before(steps - cooldown)
    return start + (floors[1] - start) * (step - steps + cooldown) / cooldown


@pytest.mark.parametrize("scale", [500, 1000, 5000])
@pytest.mark.parametrize("floors", [(1.0, 0.0), (0.0, 0.0), (0.3, 0.1)])
def test_inverse_sqrt_matches_biderman_2024(scale: int, floors: tuple[float, float]) -> None:
    settings: dict[str, Any] = {
        "schedule": "inverse_sqrt",
        "epochs": 0.2,
        "batch_size": 192,
        "warmup_steps": 1000,
        "decay_steps": scale,
        "inverse_sqrt_floor": floors[0],
        "min_lr_ratio": floors[1],
    }
    plan = LrSchedule.plan(192 * 25431, TrainingConfig(**settings), 1.0)
    assert (plan.steps, plan.warmup_steps) == (5086, 1000)
    theirs = [2.0 * _llm_foundry(step, 5086, 1000, scale, floors) for step in range(5087)]
    assert _rates(plan, **settings) == pytest.approx(theirs, rel=1e-12)


def test_inverse_sqrt_with_floor_1_is_wsd() -> None:
    flat = _rates(schedule="inverse_sqrt", inverse_sqrt_floor=1.0)
    assert flat == pytest.approx(_rates(schedule="wsd"), rel=1e-12)


def test_branches_leave_the_trunk_at_four_fifths() -> None:
    """20 B tokens in batches of 192 sequences of 4096: the durations of Biderman et al. in "
    "steps."""
    billions = [0.25, 0.5, 1.0, 2.0, 4.0, 16.0, 20.0]
    training = TrainingConfig(
        schedule="wsd",
        epochs=1.0,
        batch_size=192,
        warmup_steps=1000,
        durations=[tokens / 20 for tokens in billions],
    )
    plan = LrSchedule.plan(192 * 25431, training, 0.05)
    steps = [318, 636, 1272, 2543, 5086, 20345, 25431]
    assert plan.branch_steps == {steps - round(steps / 5) for steps in steps}
    assert plan.steps == max(plan.branch_steps) == 25431 - 5086
    assert plan.evaluations == set(range(1272, plan.steps, 1272))
    rates = [learning_rate(step, 2.0, training, plan) for step in range(plan.steps + 1)]
    assert rates[:1000] == pytest.approx([2.0 * step / 1000 for step in range(1000)])
    assert set(rates[1000:]) == {2.0}


@pytest.mark.parametrize("schedule", ["wsd", "inverse_sqrt"])
def test_trunk_has_the_rates_of_every_duration(schedule: Any) -> None:
    training = TrainingConfig(
        schedule=schedule,
        epochs=4.0,
        batch_size=4,
        warmup_epochs=1.5,
        durations=[0.5, 1.0, 2.0, 4.0],
    )
    trunk = LrSchedule.plan(40, training, 1.0)
    for duration in training.durations:
        alone = training.model_copy(update={"epochs": duration, "durations": []})
        plan = LrSchedule.plan(40, alone, 1.0)
        start = decay_start(alone, plan.steps)
        assert start in trunk.branch_steps
        for step in range(start):
            ours = learning_rate(step, 2.0, training, trunk)
            assert ours == learning_rate(step, 2.0, alone, plan)


def test_shortest_cooldown_is_one_step() -> None:
    training = TrainingConfig(schedule="wsd")
    assert [decay_start(training, steps) for steps in (1, 2, 7, 8)] == [0, 1, 6, 6]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 10),
        ({"warmup_epochs": 0.25}, 2),
        ({"warmup_epochs": 9.0}, 90),
        ({"warmup_steps": 7}, 7),
        ({"warmup_steps": 0}, 0),
        ({"warmup_ratio": 0.1}, 5),
    ],
)
def test_warmup_is_given_in_epochs_steps_or_ratio(settings: dict[str, Any], steps: int) -> None:
    training = TrainingConfig(epochs=5.0, batch_size=4, **settings)
    assert LrSchedule.plan(40, training, 1.0).warmup_steps == steps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "constant", "min_lr_ratio": 0.1}, "no `min_lr_ratio`"),
        ({"schedule": "cosine", "decay_ratio": 0.1}, "no `decay_ratio`"),
        ({"optimizer": "adafactor", "betas": (0.9, 0.99)}, "no `betas`"),
        ({"scale_parameter": True}, "adamw has no `scale_parameter`"),
        ({"optimizer": "sgd"}, "adamw"),
        ({"decay_steps": 10}, "no `decay_steps`"),
        ({"schedule": "wsd", "inverse_sqrt_floor": 0.5}, "no `inverse_sqrt_floor`"),
        ({"warmup_epochs": 1.0, "warmup_steps": 9}, "twice, by `warmup_epochs` and `warmup_steps`"),
    ],
)
def test_key_without_effect_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "constant"}, "schedule linear or cosine, or wsd or inverse_sqrt"),
        ({"decay_ratio": 0.0}, "a `decay_ratio` above 0"),
        ({"epochs": 2.0}, "`durations`: 4 is more than `epochs`, 2"),
        ({"epochs": 8.0}, "the longest must be `epochs`, 8"),
        ({"warmup_ratio": 0.1}, "take `warmup_steps` or `warmup_epochs`"),
        ({"durations": [4.0, 4.0]}, "names a value twice"),
        ({"durations": [0.0, 4.0]}, "greater than 0"),
    ],
)
def test_invalid_durations_are_refused(settings: dict[str, Any], message: str) -> None:
    trunk: dict[str, Any] = {"schedule": "wsd", "epochs": 4.0, "durations": [1.0, 4.0]}
    TrainingConfig(**trunk)
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**trunk | settings)


def test_lionw_moves_by_signs_with_decoupled_decay() -> None:
    """Three steps by hand, in one dimension: decay 0.1 at the peak rate, half of it at half."""
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    lion = LionW([weight], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    value, momentum = 1.0, 0.0
    for rate, gradient in ((0.01, 1.0), (0.005, -20.0), (0.01, 0.1)):
        lion.param_groups[0]["lr"] = rate
        weight.grad = torch.tensor([gradient])
        lion.step()
        direction = math.copysign(1.0, 0.9 * momentum + 0.1 * gradient)
        value = value * (1.0 - rate / 0.01 * 0.1) - rate * direction
        momentum = 0.95 * momentum + 0.05 * gradient
        assert weight.item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "lionw", "adafactor"])
def test_every_optimizer_lowers_the_loss(optimizer: Any) -> None:
    torch.manual_seed(0)
    target, weight = torch.randn(8, 4), torch.nn.Parameter(torch.zeros(8, 4))
    made = make_optimizer(
        {"w": weight},
        TrainingConfig(optimizer=optimizer),
        Hyperparameters(learning_rate=0.05, weight_decay=1e-4),
    )
    before = (weight - target).square().sum().item()
    for _ in range(300):
        loss = (weight - target).square().sum()
        made.zero_grad()
        loss.backward()
        made.step()
    assert loss.item() < 0.1 * before


@pytest.mark.parametrize(("scaled", "moved"), [(False, 50 * 5e-5), (True, 50 * 5e-8)])
def test_adafactor_moves_a_zero_matrix_unless_steps_are_scaled(scaled: bool, moved: float) -> None:
    """LoRA's B starts at 0: scaled by its root mean square, a step is 1e-3 of the rate."""
    weight = torch.nn.Parameter(torch.zeros(8, 4))
    training = TrainingConfig(optimizer="adafactor", scale_parameter=scaled)
    made = make_optimizer(
        {"q.lora_B.default.weight": weight},
        training,
        Hyperparameters(learning_rate=5e-5, weight_decay=0.0),
    )
    for _ in range(50):
        weight.grad = torch.full((8, 4), -0.3)
        made.step()
    assert torch.allclose(weight, torch.full((8, 4), moved), rtol=1e-2)


def test_adamw_uses_the_fused_kernel_where_available() -> None:
    """The kernel computes what torch's plain loop does; other devices and optimizers have none."""
    torch.manual_seed(0)
    start, setting = torch.randn(8, 4), Hyperparameters(learning_rate=0.05, weight_decay=0.1)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    made = make_optimizer({"w": ours}, TrainingConfig(), setting)
    plain = torch.optim.AdamW([theirs], lr=0.05, weight_decay=0.1, fused=False)
    assert made.defaults["fused"]
    for _ in range(20):
        ours.grad = torch.randn(8, 4)
        theirs.grad = ours.grad.clone()
        made.step()
        plain.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    elsewhere = {"w": torch.nn.Parameter(start.to("meta"))}
    assert not make_optimizer(elsewhere, TrainingConfig(), setting).defaults["fused"]
    assert not uses_fused_kernel(TrainingConfig(optimizer="lionw"), [ours])


def test_default_betas_depend_on_the_optimizer() -> None:
    assert TrainingConfig().resolved_betas == (0.9, 0.999)
    assert TrainingConfig(optimizer="lionw").resolved_betas == (0.9, 0.95)
    assert TrainingConfig(optimizer="lionw", betas=(0.8, 0.9)).resolved_betas == (0.8, 0.9)


@pytest.mark.parametrize("optimizer", ["adamw", "lionw"])
def test_lora_plus_moves_b_by_its_multiple(harness: TrainingHarness, optimizer: Any) -> None:
    """The first step of both optimizers has the size of the rate, which is the group's own."""
    method = adapter_method(loraplus_lr_ratio=16.0)
    model = replace(harness, method=method).model()
    weights = trained_weights(model)
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    made = make_optimizer(
        weights,
        TrainingConfig(optimizer=optimizer),
        Hyperparameters(learning_rate=0.001, weight_decay=0.0),
        learning_rate_ratios(model, method),
    )
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    made.step()
    for name, weight in weights.items():
        expected = torch.full_like(weight, 0.016 if ".lora_B." in name else 0.001)
        assert torch.allclose((weight - start[name]).abs(), expected, rtol=1e-2), name


def test_norms_and_biases_are_decayed_only_on_request() -> None:
    """TOFU's script trains with the Trainer, which leaves them out; adapters are decayed whole."""
    names = ["norm.weight", "fc.bias", "q.lora_magnitude_vector.default.weight"]
    weights = {name: torch.nn.Parameter(torch.ones(3)) for name in names}
    weights["fc.weight"] = torch.nn.Parameter(torch.ones(3, 3))
    setting = Hyperparameters(learning_rate=0.1, weight_decay=0.5)

    def decayed(training: TrainingConfig) -> set[str]:
        groups = make_optimizer(weights, training, setting).param_groups
        kept = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        assert {group["weight_decay"] for group in groups} <= {0.0, 0.5}
        return {name for name, weight in weights.items() if id(weight) in kept}

    assert decayed(TrainingConfig()) == {"q.lora_magnitude_vector.default.weight", "fc.weight"}
    assert decayed(TrainingConfig(decay_norms_and_biases=True)) == set(weights)
