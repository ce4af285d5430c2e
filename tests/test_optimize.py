"""Learning rates and optimizers are those of the papers, to the last step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import get_inverse_sqrt_schedule

from forgetting.optimize import LionW, Schedule, learning_rate, make_optimizer
from forgetting.study import Setting, Training

HUNDRED = Schedule(steps=100, steps_per_epoch=10, warmup=10, evaluations=frozenset({100}))


def _rates(plan: Schedule = HUNDRED, **settings: Any) -> list[float]:
    training = Training(**settings)
    return [learning_rate(step, 2.0, training, plan) for step in range(plan.steps + 1)]


def test_a_trapezoid_rises_stays_and_falls() -> None:
    """Warm-up over 10 steps, flat, and the last 20 % linear to 0: Biderman et al.'s trunk."""
    rates = _rates(schedule="trapezoid")
    assert rates[0] == 0.0
    assert rates[5] == pytest.approx(1.0)
    assert rates[10:81] == [2.0] * 71
    assert rates[90] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.1)
    assert rates[100] == 0.0


def test_a_cooldown_starts_where_the_inverse_root_is() -> None:
    rates = _rates(schedule="inverse_sqrt", cooldown=0.6, floor=0.1)
    assert rates[40] == pytest.approx(2.0 * math.sqrt(10 / 40))
    assert rates[70] == pytest.approx((1.0 + 0.2) / 2)
    assert rates[100] == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_floor_is_where_the_rate_ends(schedule: str) -> None:
    """Biderman et al.'s instruction tuning ends at 0.01 of the peak."""
    rates, to_zero = _rates(schedule=schedule, floor=0.01), _rates(schedule=schedule)
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(0.99 * to_zero[55] + 0.02)
    assert rates[55] == pytest.approx(1.01)
    assert rates[100] == pytest.approx(0.02)


@pytest.mark.parametrize("warmup", [1, 10])
def test_the_inverse_root_is_that_of_transformers(warmup: int) -> None:
    plan = Schedule(steps=50, steps_per_epoch=10, warmup=warmup, evaluations=frozenset({50}))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = get_inverse_sqrt_schedule(optimizer, warmup)
    for rate in _rates(plan, schedule="inverse_sqrt", cooldown=0.0)[:50]:
        assert rate == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        theirs.step()


def test_a_cooldown_never_reaches_into_the_warm_up() -> None:
    """The shortest budgets of Biderman et al. end within the warm-up."""
    plan = Schedule(steps=10, steps_per_epoch=10, warmup=10, evaluations=frozenset({10}))
    assert _rates(plan, schedule="trapezoid")[:10] == pytest.approx([0.2 * n for n in range(10)])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"schedule": "constant", "floor": 0.1}, "no `floor`"),
        ({"schedule": "cosine", "cooldown": 0.1}, "no `cooldown`"),
        ({"optimizer": "adafactor", "betas": (0.9, 0.99)}, "no `betas`"),
        ({"optimizer": "sgd"}, "adamw"),
    ],
)
def test_a_key_without_effect_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Training(**settings)


def test_lion_moves_by_signs_and_decays_by_itself() -> None:
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
def test_every_optimizer_descends(optimizer: Any) -> None:
    torch.manual_seed(0)
    target, weight = torch.randn(8, 4), torch.nn.Parameter(torch.zeros(8, 4))
    made = make_optimizer(
        {"w": weight}, Training(optimizer=optimizer), Setting(learning_rate=0.05, weight_decay=1e-4)
    )
    before = (weight - target).square().sum().item()
    for _ in range(300):
        loss = (weight - target).square().sum()
        made.zero_grad()
        loss.backward()
        made.step()
    assert loss.item() < 0.1 * before


def test_usual_moments_belong_to_the_optimizer() -> None:
    assert Training().decay_rates == (0.9, 0.999)
    assert Training(optimizer="lionw").decay_rates == (0.9, 0.95)
    assert Training(optimizer="lionw", betas=(0.8, 0.9)).decay_rates == (0.8, 0.9)


@pytest.mark.parametrize("optimizer", ["adamw", "lionw"])
def test_lora_plus_moves_b_by_its_multiple(optimizer: Any) -> None:
    """The first step of both optimizers has the size of the rate, which is the group's own."""
    names = ["q.lora_A.default.weight", "q.lora_B.default.weight"]
    weights = {name: torch.nn.Parameter(torch.ones(3)) for name in names}
    setting = Setting(learning_rate=0.001, weight_decay=0.0)
    made = make_optimizer(weights, Training(optimizer=optimizer), setting, lora_plus_ratio=16.0)
    for weight in weights.values():
        weight.grad = torch.tensor([1.0, -2.0, 3.0])
    made.step()
    moved = [(weight - 1.0).abs().detach() for weight in weights.values()]
    assert torch.allclose(moved[0], torch.full((3,), 0.001), rtol=1e-3)
    assert torch.allclose(moved[1], torch.full((3,), 0.016), rtol=1e-3)
