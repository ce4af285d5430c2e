"""The trainer: losses match a plain loop, and killed runs resume bit for bit."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, get_scheduler

from forgetting.config.expand import Method
from forgetting.config.methods import Hyperparameters, RankBudgetConfig
from forgetting.config.mitigations import MitigationConfig
from forgetting.config.training import TrainingConfig
from forgetting.digests import visible_files
from forgetting.errors import InputError
from forgetting.models.adapters import attach_adapter, cast_frozen_weights
from forgetting.models.forward import target_logits
from forgetting.models.loading import Model, load_base
from forgetting.models.tuned import load_tuned, trained_state
from forgetting.schedule import LrSchedule, learning_rate
from forgetting.training import checkpoints, microbatches, train_step
from forgetting.training import trainer as module
from forgetting.training.run_config import batch_indices
from forgetting.training.trainer import train_run
from support.kill import BEFORE_AND_AFTER, Killed, kill_at
from support.run_groups import examples_in
from support.training import (
    FULL,
    NEVER_REACHES,
    TRAINING,
    VARIANTS,
    TrainingHarness,
    assert_close,
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


# --- a plain loop -------------------------------------------------------------------


def _plain_loop(harness: TrainingHarness, steps: int) -> tuple[list[float], torch.nn.Module]:
    """Train with peft, torch's AdamW and transformers' schedule and loss only."""
    model: Any = AutoModelForCausalLM.from_pretrained(harness.base, dtype=torch.float32)
    if harness.method.kind == "lora":
        torch.manual_seed(harness.config.seed)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=harness.method.rank,
            lora_alpha=harness.method.alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
        )
        model = get_peft_model(model, config)
    model.train()
    training, setting = harness.config.training, harness.config.hyperparameters
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1]
    norms = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": setting.weight_decay}, norms],
        lr=setting.learning_rate,
        betas=training.resolved_betas,
    )
    plan = harness.config.schedule
    scheduler = get_scheduler(training.schedule, optimizer, plan.warmup_steps, plan.steps)
    losses = []
    for step in range(steps):
        batch = [
            harness.examples[index]
            for index in batch_indices(
                len(harness.examples), training.batch_size, harness.config.seed, step
            )
        ]
        length = max(len(example.ids) for example in batch)
        ids = torch.full((len(batch), length), harness.config.pad)
        labels = torch.full((len(batch), length), -100)
        for row, example in enumerate(batch):
            ids[row, : len(example.ids)] = torch.tensor(example.ids)
            labels[row, example.prompt_length : len(example.ids)] = torch.tensor(
                example.ids[example.prompt_length :]
            )
        mask = (torch.arange(length) < torch.tensor([[len(e.ids)] for e in batch])).long()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_losses_match_a_plain_loop(harness: TrainingHarness, kind: str) -> None:
    """The same batches through peft, AdamW and transformers' loss give equal weights."""
    training = TRAINING.model_copy(update={"epochs": 20 / 3})
    harness.method = harness.method.model_copy(update={"dropout": 0.0}) if kind == "lora" else FULL
    harness.config = replace(
        harness.config,
        training=training,
        hyperparameters=Hyperparameters(
            learning_rate=0.01 if kind == "lora" else 1e-3, weight_decay=0.1
        ),
        schedule=replace(LrSchedule.plan(10, training, 1.0), evaluations=frozenset()),
    )
    progress, model = harness.run()
    losses, plain = _plain_loop(harness, 20)
    assert len(progress.losses) == 20
    assert progress.losses == pytest.approx(losses, rel=2e-5)
    assert losses[-1] < 0.8 * losses[0]
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, theirs[name], atol=2e-4), name


def test_micro_batch_size_does_not_change_the_run(harness: TrainingHarness, tmp_path: Path) -> None:
    harness.method = harness.method.model_copy(update={"dropout": 0.0})
    ended = []
    for size in (1, 3, 32):
        training = TRAINING.model_copy(update={"micro_batch_size": size})
        config = replace(harness.config, training=training)
        ended.append(replace(harness, config=config, folder=tmp_path / str(size)).run()[0])
    for other in ended[1:]:
        assert other.losses == pytest.approx(ended[0].losses, rel=1e-4)
        assert other.tokens == ended[0].tokens


def test_seed_determines_the_run(harness: TrainingHarness, tmp_path: Path) -> None:
    first, second = (harness.run_in(tmp_path / name) for name in "ab")
    assert first[0].losses == second[0].losses
    harness.config = replace(harness.config, seed=6)
    assert harness.run_in(tmp_path / "c")[0].losses != first[0].losses


def test_tokens_are_counted_without_padding(harness: TrainingHarness) -> None:
    progress, _ = harness.run()
    assert progress.tokens == 4 * sum(len(example.ids) for example in harness.examples)
    assert harness.logged == list(range(1, 13))


# --- killed and resumed -------------------------------------------------------------------


MOMENTS = {
    "in a step": (module, "_train_step", (2, 12)),
    "in an evaluation": (TrainingHarness, "evaluate", (1, 4)),
    "at the items": (module, "write_table", (1, 3)),
    "at the weights": (checkpoints, "save_weights", (1, 3)),
    "at the optimizer's state": (checkpoints, "save_tensors", (2, 4)),
    "at the record of progress": (checkpoints, "write_json", (1, 4)),
    "at the name of the checkpoint": (Path, "rename", (1, 4)),
    "when old checkpoints go": (module, "prune_checkpoints", (2, 4)),
    "when telling": (TrainingHarness, "log", (6, 12)),
}


@BEFORE_AND_AFTER
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_resumes_bit_for_bit(
    harness: TrainingHarness,
    moment: str,
    kind: str,
    after: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed at any moment, before or after a file is written."""
    if kind == "full":
        harness.method, harness.values = FULL, NEVER_REACHES
    reference = harness.run_in(tmp_path / "reference")
    owner, name, calls = MOMENTS[moment]
    for call in calls:
        shutil.rmtree(harness.folder, ignore_errors=True)
        with monkeypatch.context() as patch:
            kill_at(patch, owner, name, call, after)
            with pytest.raises(Killed):
                harness.run()
        harness.assert_same_end(harness.run(), reference, tmp_path / "reference")


def test_run_killed_after_every_evaluation_ends(
    harness: TrainingHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a partition that preempts its jobs."""
    reference = harness.run_in(tmp_path / "reference")
    for _ in range(4):
        with monkeypatch.context() as patch:
            kill_at(patch, TrainingHarness, "log", 3, after=True)
            with pytest.raises(Killed):
                harness.run()
    harness.assert_same_end(harness.run(), reference, tmp_path / "reference")


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
    load_tuned(harness.base, harness.folder / "step-0000006", torch.device("cpu"))
    assert harness.run()[0].status == "ok"


@pytest.mark.parametrize("left", ["nothing", "weights", "half a file", "all but the record"])
def test_partial_checkpoint_is_not_resumed_from(
    harness: TrainingHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """Killed while the second checkpoint is written, whatever part of it is on the disk."""
    reference = harness.run_in(tmp_path / "reference")
    with monkeypatch.context() as patch:
        kill_at(patch, Path, "rename", 2, after=False)
        with pytest.raises(Killed):
            harness.run()
    ruin = harness.folder / ".step-0000006"
    assert harness.checkpoints() == [".step-0000006", "step-0000003"]
    (ruin / "progress.json").unlink()
    if left != "all but the record":
        (ruin / "optimizer.safetensors").unlink()
    if left == "half a file":
        file = ruin / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:100])
    if left == "nothing":
        shutil.rmtree(ruin)
    harness.assert_same_end(harness.run(), reference, tmp_path / "reference")


def test_half_removed_old_checkpoint_is_ignored(harness: TrainingHarness, tmp_path: Path) -> None:
    """Killed while an old checkpoint is removed: its state is there, its weights are not."""
    reference = harness.run_in(tmp_path / "reference")
    calls = 0

    def stop(model: Model) -> tuple[pd.DataFrame, float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        return harness.evaluate(model)

    with pytest.raises(Killed):
        harness.run(stop)
    old = harness.folder / "step-0000003"
    old.mkdir()
    (old / "progress.json").write_text((harness.folder / "step-0000006/progress.json").read_text())
    harness.assert_same_end(harness.run(), reference, tmp_path / "reference")


def test_finished_run_trains_nothing_again(
    harness: TrainingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress, model = harness.run()
    monkeypatch.setattr(module, "_train_step", None)
    again, same = harness.run()
    assert again == progress
    theirs = trained_state(same)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in trained_state(model).items())


@pytest.mark.parametrize("variant", ["rslora", "dora", "pissa", "adalora"])
def test_every_variant_resumes(
    harness: TrainingHarness, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.method = _as_variant(harness.method, variant)
    reference = harness.run_in(tmp_path / "reference")
    with monkeypatch.context() as patch:
        kill_at(patch, module, "_train_step", 8, after=False)
        with pytest.raises(Killed):
            harness.run()
    harness.assert_same_end(harness.run(), reference, tmp_path / "reference")


# --- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["lionw", "adafactor"])
def test_every_optimizer_resumes(
    harness: TrainingHarness, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer state, factored or not, is restored bit for bit."""
    training = TRAINING.model_copy(update={"optimizer": optimizer})
    harness.config = replace(harness.config, training=training)
    reference = harness.run_in(tmp_path / "reference")
    with monkeypatch.context() as patch:
        kill_at(patch, module, "_train_step", 8, after=False)
        with pytest.raises(Killed):
            harness.run()
    harness.assert_same_end(harness.run(), reference, tmp_path / "reference")


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


def _as_variant(method: Method, variant: str) -> Method:
    budget = RankBudgetConfig() if variant == "adalora" else None
    more = {"name": f"{variant}-r4", "rank_budget": budget, "initial_rank": 6 if budget else None}
    return method.model_copy(update={"variant": variant, **more})


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_loads_a_saved_adapter(harness: TrainingHarness, variant: str) -> None:
    harness.method = _as_variant(harness.method, variant)
    _, model = harness.run()
    base = AutoModelForCausalLM.from_pretrained(harness.base, dtype=torch.float32)
    untouched = harness.logits(base)
    loaded = PeftModel.from_pretrained(base, harness.folder / "step-0000012")
    # PiSSA's is written as the update of the original weights, and AdaLoRA's without what it has
    # pruned: the sums round otherwise.
    tolerance = 1e-5 if variant in ("pissa", "adalora") else 0.0
    assert_close(harness.logits(loaded), harness.logits(model), tolerance)
    assert not torch.allclose(harness.logits(loaded), untouched, atol=1e-2)
    ours = load_tuned(harness.base, harness.folder / "step-0000012", torch.device("cpu"))
    assert_close(harness.logits(ours), harness.logits(model), tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapter_starts_with_an_update_of_zero(harness: TrainingHarness, variant: str) -> None:
    """Every variant equals the base model; without its adapter, PiSSA does not."""
    base = load_base(harness.base, torch.device("cpu"))
    untouched = harness.logits(base)
    model = attach_adapter(base, _as_variant(harness.method, variant), 0).eval()
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
    model = attach_adapter(load_base(harness.base, torch.device("cpu")), method, 0)
    adapted = {
        name.rsplit(".", 1)[1]
        for name, part in model.named_modules()
        if isinstance(part, LoraLayer)
    }
    assert adapted == layers


def test_transformers_loads_a_full_checkpoint(harness: TrainingHarness) -> None:
    harness.method = FULL
    _, model = harness.run()
    checkpoint = harness.folder / "step-0000012"
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert torch.equal(harness.logits(loaded), harness.logits(model))
    ours = load_tuned(harness.base, checkpoint, torch.device("cpu"))
    assert torch.equal(harness.logits(ours), harness.logits(model))


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
    harness.config = replace(harness.config, hyperparameters=Hyperparameters(learning_rate=100.0))
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
    plain = replace(harness.config, hyperparameters=Hyperparameters(learning_rate=1e-5))
    harness.config = plain
    alone, _ = harness.run()
    harness.folder = harness.folder.parent / "penalized"
    harness.method = harness.method.model_copy(
        update={"mitigation": MitigationConfig.model_validate({"l2_sp": {"weight": 1e12}})}
    )
    kept, _ = harness.run()
    assert kept.status == "ok"
    assert kept.losses[0] == alone.losses[0]
    assert max(kept.penalties) > 100.0
    assert alone.penalties == [0.0] * len(alone.losses)
    assert kept.losses[-1] == pytest.approx(alone.losses[-1], rel=0.2)


def test_diverged_run_diverges_again(
    harness: TrainingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.config = replace(
        harness.config,
        hyperparameters=Hyperparameters(learning_rate=1e30),
        training=TRAINING.model_copy(
            update={"warmup_epochs": 0.0, "schedule": "constant", "max_grad_norm": None}
        ),
    )
    first, second = harness.run()[0], harness.run()[0]
    assert first.status == second.status == "diverged"
    assert first.losses == second.losses


@pytest.mark.parametrize("rate", [1e6, 1e30])
@pytest.mark.parametrize("steps", [1, 2, 3, 12])
def test_run_with_nan_weights_never_ends_ok(
    harness: TrainingHarness, rate: float, steps: int
) -> None:
    """Wherever a run at a high rate ends, `ok` means finite weights and a finite loss."""
    training = TRAINING.model_copy(
        update={"epochs": steps / 3, "warmup_epochs": 0.0, "schedule": "constant"}
    )
    harness.method = FULL
    harness.config = replace(
        harness.config,
        hyperparameters=Hyperparameters(learning_rate=rate),
        training=training,
        schedule=LrSchedule.plan(len(harness.examples), training, 1.0),
    )
    progress, model = harness.run()
    assert progress.status in ("ok", "diverged")
    assert all(math.isfinite(loss) for loss in progress.losses)
    if progress.status == "ok":
        assert harness.logits(model).isfinite().all()


def test_rounding_frozen_weights_changes_no_bit(harness: TrainingHarness) -> None:
    """Autocast rounds them in every pass; weights rounded before give the same losses."""
    config = replace(harness.config, precision=torch.bfloat16)
    method = harness.method.model_copy(update={"dropout": 0.0})
    outcomes = []
    for rounded in (False, True):
        model = attach_adapter(load_base(harness.base, torch.device("cpu")), method, config.seed)
        if rounded:
            cast_frozen_weights(model, config.precision)
        folder = harness.folder / str(rounded)
        progress = train_run(
            model,
            harness.examples,
            config,
            lambda _: (pd.DataFrame({"value": [0.5]}), 0.5),
            folder,
            harness.log,
        )
        outcomes.append((progress.losses, trained_state(model)))
    adapted = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert {layer.get_base_layer().weight.dtype for layer in adapted} == {torch.bfloat16}
    (plain, weights), (again, same) = outcomes
    assert plain == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def _limit_rows(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Limit the rows of a pass; return a list that collects the rows of all attempts."""
    attempts: list[int] = []

    def limited(model: Model, batch: Any) -> torch.Tensor:
        attempts.append(examples_in(batch))
        if attempts[-1] > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")
        return target_logits(model, batch)

    monkeypatch.setattr(train_step, "target_logits", limited)
    monkeypatch.setitem(
        microbatches.FORWARD_OVERHEAD_TOKENS, "cpu", 10_000
    )  # never split for padding's sake
    return attempts


def test_out_of_memory_halves_the_micro_batch(
    harness: TrainingHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is repeated, not skipped, and the run keeps the smaller micro-batch."""
    harness.method = harness.method.model_copy(update={"dropout": 0.0})
    roomy, _ = harness.run_in(tmp_path / "roomy")
    attempts = _limit_rows(monkeypatch, 1)
    tight, _ = harness.run_in(tmp_path / "tight")
    assert tight.losses == pytest.approx(roomy.losses, rel=1e-4)
    assert tight.micro_batch_size == 1
    assert sum(size > 1 for size in attempts) == 1


def test_single_example_out_of_memory_is_an_input_error(
    harness: TrainingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    _limit_rows(monkeypatch, 0)
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
