"""The trainer: schedules, checkpoints, divergence and memory."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import get_scheduler

from forgetting.config.expand import Method
from forgetting.config.mitigations import MitigationConfig
from forgetting.config.training import TrainingConfig
from forgetting.digests import visible_files
from forgetting.errors import InputError
from forgetting.models.adapters import attach_adapter
from forgetting.models.loading import Model
from forgetting.models.tuned import load_tuned, trained_state
from forgetting.schedule import LrSchedule, learning_rate
from forgetting.training import train_step
from forgetting.training import trainer as module
from forgetting.training.run_config import batch_indices
from support.kill import Killed
from support.training import (
    CPU,
    FULL,
    TRAINING,
    VARIANTS,
    TrainingHarness,
    adapter_method,
    assert_close,
    limit_examples,
    no_items,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# --- schedule -----------------------------------------------------------------------------------


def test_schedule_counts_whole_batches_and_evaluates_the_end() -> None:
    plan = LrSchedule.plan(10, TRAINING, 1.0)
    assert (plan.steps, plan.steps_per_epoch, plan.warmup_steps) == (12, 3, 2)
    assert plan.evaluations == {3, 6, 9, 12}
    half = LrSchedule.plan(10, TRAINING.model_copy(update={"epochs": 2.5}), 2.0)
    assert (half.steps, half.evaluations) == (8, {6, 8})
    often = LrSchedule.plan(10, TRAINING.model_copy(update={"epochs": 1.0}), 0.01)
    assert often.evaluations == {1, 2, 3}
    assert LrSchedule.plan(1, TRAINING.model_copy(update={"epochs": 0.1}), 1.0).steps == 1


@pytest.mark.parametrize("warmup_epochs", [0.0, 1.0, 4.0])
@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")],
)
def test_learning_rates_match_transformers(
    schedule: str, theirs: str, warmup_epochs: float
) -> None:
    training = TrainingConfig.model_validate(
        TRAINING.model_dump() | {"schedule": schedule, "warmup_epochs": warmup_epochs}
    )
    plan = LrSchedule.plan(10, training, 1.0)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = get_scheduler(theirs, optimizer, plan.warmup_steps, plan.steps)
    for step in range(plan.steps):
        assert learning_rate(step, 0.01, training, plan) == pytest.approx(
            scheduler.get_last_lr()[0], abs=1e-15
        )
        optimizer.step()
        scheduler.step()


def test_every_epoch_is_another_permutation() -> None:
    epochs = []
    for epoch in range(3):
        parts = [batch_indices(10, 4, 7, epoch * 3 + step) for step in range(3)]
        assert [len(part) for part in parts] == [4, 4, 2]
        order = [index for part in parts for index in part]
        assert sorted(order) == list(range(10))
        epochs.append(order)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batch_indices(10, 4, 7, 1) == batch_indices(10, 4, 7, 1)
    assert batch_indices(100, 100, 7, 0) != batch_indices(100, 100, 8, 0)


# --- a run --------------------------------------------------------------------------------------


def test_seed_determines_the_run(harness: TrainingHarness, tmp_path: Path) -> None:
    first, second = (harness.copy_to(tmp_path / name).run(no_items)[0] for name in "ab")
    assert first.losses == second.losses
    harness.config = replace(harness.config, seed=6)
    assert harness.run(no_items)[0].losses != first.losses


def test_tokens_are_counted_without_padding(harness: TrainingHarness) -> None:
    progress, _ = harness.run(no_items)
    assert progress.tokens == 4 * sum(len(example.ids) for example in harness.examples)
    assert harness.logged == list(range(1, 13))


# --- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [adapter_method(), FULL], ids=["lora", "full"])
def test_killed_run_resumes_bit_for_bit(
    harness: TrainingHarness, method: Method, tmp_path: Path
) -> None:
    """One of the kills of faults/test_resume.py."""
    harness.method = method
    reference = harness.run_in(tmp_path / "reference")
    harness.assert_resumes(tmp_path / "reference", reference, module, "train_batch", 8)


def test_only_newest_checkpoint_has_optimizer_state(harness: TrainingHarness) -> None:
    """The checkpoint that is kept for selection has weights only, and still loads."""

    def stop(model: Model) -> tuple[pd.DataFrame, float]:
        if len(harness.logged) == 11:
            raise Killed
        return harness.evaluate(model)

    harness.config = replace(harness.config, threshold=0.7)  # passed at the third evaluation
    with pytest.raises(Killed):
        harness.run(stop)
    assert harness.checkpoints() == ["step-0000006", "step-0000009"]
    picked, newest = (
        {path.name for path in visible_files(harness.folder / name)}
        for name in harness.checkpoints()
    )
    assert newest - picked == {"optimizer.safetensors"}
    load_tuned(harness.base, harness.folder / "step-0000006", CPU)
    assert harness.run()[0].status == "ok"


def test_finished_run_trains_nothing_again(
    harness: TrainingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress, model = harness.run()
    monkeypatch.setattr(module, "train_batch", None)
    again, same = harness.run()
    assert again == progress
    theirs = trained_state(same)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in trained_state(model).items())


def test_checkpoints_that_cannot_be_chosen_are_pruned(harness: TrainingHarness) -> None:
    """The third of four evaluations is the last below 0.9; the newest is kept to resume from."""
    seen = []

    def evaluate(model: Model) -> tuple[pd.DataFrame, float]:
        seen.append(harness.checkpoints() if harness.folder.exists() else [])
        return harness.evaluate(model)

    harness.run(evaluate)
    assert seen == [[], ["step-0000003"], ["step-0000006"], ["step-0000009"]]
    assert harness.checkpoints() == ["step-0000009", "step-0000012"]
    assert sorted(path.name for path in harness.folder.glob("items-*")) == [
        f"items-{step:07d}.parquet" for step in (3, 6, 9, 12)
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapter_starts_with_an_update_of_zero(harness: TrainingHarness, variant: str) -> None:
    """Every variant equals the base model; without its adapter, PiSSA does not."""
    base = harness.load()
    untouched = harness.logits(base)
    model = attach_adapter(base, adapter_method(variant), 0).eval()
    assert_close(harness.logits(model), untouched, 1e-5)
    with model.disable_adapter():
        is_base = torch.allclose(harness.logits(model), untouched, atol=1e-3)
    assert is_base == (variant != "pissa")


@pytest.mark.parametrize(
    ("words", "layers"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_target_modules_name_parts_of_the_model(
    harness: TrainingHarness, words: str, layers: set[str]
) -> None:
    method = harness.method.model_copy(update={"target_modules": words})
    model = attach_adapter(harness.load(), method, 0)
    adapted = {
        name.rsplit(".", 1)[1]
        for name, part in model.named_modules()
        if isinstance(part, LoraLayer)
    }
    assert adapted == layers


def test_only_safetensors_and_json_are_written(harness: TrainingHarness) -> None:
    """No file runs code when it is read, and every checkpoint has a state."""
    harness.run()
    for checkpoint in harness.folder.glob("step-*"):
        assert {path.suffix for path in visible_files(checkpoint)} <= {".safetensors", ".json"}
        assert json.loads((checkpoint / "progress.json").read_text())["status"] == "running"


# --- divergence ---------------------------------------------------------------------------------


def test_nan_loss_ends_the_run_and_keeps_its_records(
    harness: TrainingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier evaluations are kept, and the fatal step does not change the weights."""
    original = train_step.logprobs_of

    def poisoned(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        result = original(logits, batch)
        return result * math.nan if len(harness.logged) == 7 else result

    monkeypatch.setattr(train_step, "logprobs_of", poisoned)
    progress, model = harness.run()
    assert (progress.status, progress.step) == ("diverged", 7)
    assert len(progress.losses) == 7
    assert [point[0] for point in progress.evaluations] == [3, 6]
    assert harness.checkpoints() == ["step-0000006"]
    assert len(list(harness.folder.glob("items-*"))) == 2
    assert all(torch.isfinite(tensor).all() for tensor in trained_state(model).values())


def test_exploding_loss_ends_the_run(harness: TrainingHarness) -> None:
    """At a high rate the loss passes the limit long before it is not finite."""
    harness.method = FULL
    harness.set_rate(100.0)
    progress, model = harness.run()
    guess = math.log(model.config.vocab_size)
    assert progress.status == "diverged"
    assert 0 < progress.step < harness.config.schedule.steps
    assert max(progress.losses) <= 3.0 * max(progress.losses[0], guess)
    assert all(math.isfinite(loss) for loss in progress.losses)
    again, _ = harness.run()
    assert (again.status, again.losses) == (progress.status, progress.losses)


def test_penalty_does_not_count_as_divergence(harness: TrainingHarness) -> None:
    """Losses exclude penalties, so that methods can be compared."""
    harness.set_rate(1e-5)
    alone, _ = harness.run(no_items)
    harness.folder = harness.folder.parent / "penalized"
    harness.method = harness.method.model_copy(
        update={"mitigation": MitigationConfig.model_validate({"l2_sp": {"weight": 1e12}})}
    )
    kept, _ = harness.run(no_items)
    assert kept.status == "ok"
    assert kept.losses[0] == alone.losses[0]
    assert max(kept.penalties) > 100.0
    assert alone.penalties == [0.0] * len(alone.losses)
    assert kept.losses[-1] == pytest.approx(alone.losses[-1], rel=0.2)


def test_diverged_run_diverges_again(harness: TrainingHarness) -> None:
    harness.set_rate(1e30)
    harness.set_training(warmup_epochs=0.0, schedule="constant", max_grad_norm=None)
    first, second = harness.run()[0], harness.run()[0]
    assert first.status == second.status == "diverged"
    assert first.losses == second.losses


@pytest.mark.parametrize("rate", [1e6, 1e30])
@pytest.mark.parametrize("steps", [1, 2, 3, 12])
def test_run_with_nan_weights_never_ends_ok(
    harness: TrainingHarness, rate: float, steps: int
) -> None:
    """Wherever a run at a high rate ends, `ok` means finite weights and a finite loss."""
    harness.method = FULL
    harness.set_rate(rate)
    harness.set_training(epochs=steps / 3, warmup_epochs=0.0, schedule="constant")
    progress, model = harness.run(no_items)
    assert progress.status in ("ok", "diverged")
    assert all(math.isfinite(loss) for loss in progress.losses)
    if progress.status == "ok":
        assert harness.logits(model).isfinite().all()


def test_out_of_memory_halves_the_micro_batch(
    harness: TrainingHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is repeated, not skipped, and the run keeps the smaller micro-batch."""
    harness.method = adapter_method(dropout=0.0)
    roomy, _ = harness.copy_to(tmp_path / "roomy").run(no_items)
    attempts = limit_examples(monkeypatch, 1)
    tight, _ = harness.run(no_items)
    assert tight.losses == pytest.approx(roomy.losses, rel=1e-4)
    assert tight.micro_batch_size == 1
    assert sum(size > 1 for size in attempts) == 1


def test_single_example_out_of_memory_is_an_input_error(
    harness: TrainingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_examples(monkeypatch, 0)
    with pytest.raises(InputError, match="single example"):
        harness.run()


def test_other_errors_are_not_out_of_memory(
    harness: TrainingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Model, batch: Any) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(train_step, "target_logits", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        harness.run()
