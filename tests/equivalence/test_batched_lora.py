"""Batched LoRA: each run equals the run trained singly, and kills change no bit of a batch."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from forgetting.config.expand import Method, RunGroupConfig
from forgetting.config.methods import Hyperparameters
from forgetting.config.mitigations import MitigationConfig
from forgetting.io import write_json
from forgetting.models.forward import target_logits
from forgetting.models.loading import Model
from forgetting.schedule import LrSchedule
from forgetting.study import run_groups
from forgetting.training import checkpoints, microbatches, train_step
from forgetting.training import trainer as module
from forgetting.training.batched_lora import meta_model, trained_weights
from forgetting.training.checkpoints import ResumePoints, TrainState, resume_groups
from forgetting.training.mitigations import Mitigations
from forgetting.training.training_job import RunContext, run_key
from support.kill import BEFORE_AND_AFTER, Killed, kill_at
from support.run_groups import RunGroupHarness, run_context, run_group_config
from support.training import TrainingHarness, limit_examples

pytestmark = pytest.mark.usefixtures("one_thread")

Rows = list[dict[str, Any]]
SETTINGS = (
    Hyperparameters(learning_rate=0.01),
    Hyperparameters(learning_rate=0.003, weight_decay=0.1),
    Hyperparameters(learning_rate=0.02, weight_decay=0.01),
)


@pytest.fixture
def harness(harness: TrainingHarness) -> TrainingHarness:
    """Ten rows in batches of four for four epochs: twelve steps, four evaluations, dropout."""
    harness.settings, harness.values = SETTINGS, None
    harness.config = replace(harness.config, base_value=0.001, threshold=1.0)
    harness.set_training(schedule="constant")
    return harness


def _assert_close(
    batched: TrainingHarness, single: TrainingHarness, rel: float = 1e-4, atol: float = 2e-4
) -> None:
    """Assert that items and checkpoints of all runs agree, up to rounding."""
    for number in range(len(batched.settings)):
        ours, theirs = (harness.folder / str(number) for harness in (batched, single))
        # Only the other runs of the batch need the final state.
        names = {path.name for path in ours.glob("[!.]*")} - {"end.json"}
        assert names == {path.name for path in theirs.glob("[!.]*")}
        for path in theirs.glob("items-*"):
            pd.testing.assert_frame_equal(
                pd.read_parquet(ours / path.name), pd.read_parquet(path), rtol=rel
            )
        for path in theirs.glob("step-*/*.safetensors"):
            weights = load_file(ours / path.parent.name / path.name)
            for name, tensor in load_file(path).items():
                torch.testing.assert_close(weights[name], tensor, rtol=rel, atol=atol)


# --- equal to single runs -----------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "rslora", "pissa"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_batched_run_equals_the_single_run(
    harness: TrainingHarness, tmp_path: Path, variant: str, dropout: float
) -> None:
    """36 steps with three rates and decays and the same dropout masks: equal losses and weights.

    The test uses float64. In float32, AdamW turns rounding of a gradient near zero into a fraction
    of a step, and the losses agree to 1e-4 only.
    """
    harness.dtype = torch.float64
    harness.method = harness.method.model_copy(update={"variant": variant, "dropout": dropout})
    harness.set_training(every=6.0, epochs=12.0, schedule="linear")
    reference = harness.copy_to(tmp_path / "single")
    for ours, theirs in zip(harness.batched(), reference.single(), strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-9)
        assert ours.losses[-1] < ours.losses[0]
        assert [point[:2] for point in ours.evaluations] == [
            point[:2] for point in theirs.evaluations
        ]
        assert (ours.step, ours.tokens, ours.status) == (36, theirs.tokens, "ok")
    _assert_close(harness, reference, rel=1e-7, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["lionw", "adafactor"])
def test_every_batched_run_has_its_own_optimizer(
    harness: TrainingHarness, tmp_path: Path, optimizer: str
) -> None:
    """With momentum (LionW) or factored moments (Adafactor), and with LoRA+."""
    harness.method = harness.method.model_copy(update={"loraplus_lr_ratio": 4.0})
    harness.set_training(every=2.0, optimizer=optimizer)
    harness.settings = [
        setting.model_copy(update={"learning_rate": setting.learning_rate / 10})
        for setting in SETTINGS
    ]
    reference = harness.copy_to(tmp_path / "single")
    for ours, theirs in zip(harness.batched(), reference.single(), strict=True):
        # LionW steps by the sign: for a momentum near zero, rounding decides.
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-3)


def test_batched_runs_replay_general_text(harness: TrainingHarness, tmp_path: Path) -> None:
    mitigations = Mitigations(replay=harness.examples[6:], replay_ratio=0.4)
    harness.examples = harness.examples[:6]
    harness.config = replace(harness.config, mitigations=mitigations)
    harness.set_training(every=2.0)
    reference = harness.copy_to(tmp_path / "single")
    for ours, theirs in zip(harness.batched(), reference.single(), strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
        assert ours.tokens == theirs.tokens > 4 * sum(len(e.ids) for e in harness.examples)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("modules", [["q_proj", "down_proj"], ["q_proj", "lm_head"]])
def test_batched_runs_may_adapt_some_modules_only(
    harness: TrainingHarness, tmp_path: Path, modules: list[str], dropout: float
) -> None:
    """The output head reads the target positions only, which are those of every run."""
    changes = {"target_modules": modules, "dropout": dropout}
    harness.method = harness.method.model_copy(update=changes)
    reference = harness.copy_to(tmp_path / "single")
    for ours, theirs in zip(harness.batched(), reference.single(), strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)


def test_gradients_are_clipped_per_run(harness: TrainingHarness, tmp_path: Path) -> None:
    """A bound that is always exceeded: with a common norm, the runs would depend on each other."""
    harness.set_training(every=4.0, max_grad_norm=1e-3)
    reference = harness.copy_to(tmp_path / "single")
    for ours, theirs in zip(harness.batched(), reference.single(), strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)


def test_batched_bfloat16_is_within_its_rounding(harness: TrainingHarness, tmp_path: Path) -> None:
    harness.config = replace(harness.config, precision=torch.bfloat16)
    reference = harness.copy_to(tmp_path / "single")
    for ours, theirs in zip(harness.batched(), reference.single(), strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=2e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_batched_rows_are_padding_free_without_dropout(
    harness: TrainingHarness, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The passes have exactly the tokens of the runs, unless dropout forbids it."""
    harness.method = harness.method.model_copy(update={"dropout": dropout})
    passed = []

    def counting(model: Model, batch: Any) -> torch.Tensor:
        passed.append(batch.ids.numel())
        return target_logits(model, batch)

    monkeypatch.setattr(train_step, "target_logits", counting)
    tokens = sum(progress.tokens for progress in harness.batched())
    assert sum(passed) == tokens if dropout == 0.0 else sum(passed) > tokens


# --- runs that end early ------------------------------------------------------------------------


def _poison(monkeypatch: pytest.MonkeyPatch, rate: float, step: int) -> None:
    """Make the loss of the run with this rate NaN at a step."""
    original = module.train_batch

    def poisoned(model: Model, examples: Any, runs: Any, stack: Any) -> Any:
        for run in runs:
            if (run.config.hyperparameters.learning_rate, run.state.step) == (rate, step):
                next(iter(run.adapter.weights.values())).data.fill_(math.nan)
        return original(model, examples, runs, stack)

    monkeypatch.setattr(module, "train_batch", poisoned)


@pytest.fixture
def mixed(harness: TrainingHarness, monkeypatch: pytest.MonkeyPatch) -> TrainingHarness:
    """The second run diverges at step 7; the third ends at step 9, at the threshold."""
    harness.config = replace(harness.config, threshold=0.022, stop_after_evaluations=0)
    _poison(monkeypatch, 0.003, 7)
    return harness


def test_a_run_that_ends_leaves_the_batch(mixed: TrainingHarness, tmp_path: Path) -> None:
    reference = mixed.copy_to(tmp_path / "single")
    ended, expected = mixed.batched(), reference.single()
    assert [(p.status, p.step) for p in ended] == [("ok", 12), ("diverged", 7), ("ok", 9)]
    for ours, theirs in zip(ended, expected, strict=True):
        assert (ours.status, ours.step, ours.tokens) == (theirs.status, theirs.step, theirs.tokens)
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    _assert_close(mixed, reference)
    assert mixed.logged == [
        *[(number, step) for step in range(1, 8) for number in range(3)],
        *[(number, step) for step in (8, 9) for number in (0, 2)],
        *[(0, step) for step in (10, 11, 12)],
    ]


def test_an_ended_run_keeps_no_other_weights_in_memory(
    mixed: TrainingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are no longer slices of the stacked tensors."""
    original, adapters, ended = module.train_batch, {}, set()

    def watched(model: Model, examples: Any, runs: Any, stack: Any) -> Any:
        adapters.update({run.folder: run.adapter for run in runs})
        for folder in adapters.keys() - {run.folder for run in runs}:
            ended.add(folder)
            for weight in adapters[folder].weights.values():
                assert weight.untyped_storage().nbytes() == weight.numel() * weight.itemsize
        return original(model, examples, runs, stack)

    monkeypatch.setattr(module, "train_batch", watched)
    mixed.batched()
    assert len(ended) == 2


def test_infinite_products_stay_in_their_run(harness: TrainingHarness, tmp_path: Path) -> None:
    """A rate far too high harms no other run."""
    harness.settings = [SETTINGS[0], Hyperparameters(learning_rate=1e30), SETTINGS[1]]
    reference = harness.copy_to(tmp_path / "single")
    ended, expected = harness.batched(), reference.single()
    assert [progress.status for progress in ended] == ["ok", "diverged", "ok"]
    for ours, theirs in zip(ended, expected, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)


def test_all_runs_of_a_batch_may_diverge(harness: TrainingHarness) -> None:
    harness.settings = [Hyperparameters(learning_rate=1e30), Hyperparameters(learning_rate=1e25)]
    first = harness.batched()
    assert [progress.status for progress in first] == ["diverged", "diverged"]
    assert harness.batched() == first


def test_step_time_is_divided_among_the_runs(
    harness: TrainingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    assert [progress.seconds for progress in harness.batched()] == pytest.approx([4.0] * 3)


# --- killed and resumed -------------------------------------------------------------------------


# Evaluations: of runs 0, 1, 2 at steps 3 and 6, of 0 and 2 at 9, of 0 at 12.
MOMENTS = {
    "in a step": (module, "train_batch", (2, 5, 8, 9, 11)),
    "in an evaluation": (TrainingHarness, "evaluate", (2, 5, 8)),
    "at the items": (module, "write_table", (3, 7)),
    "at the weights": (checkpoints, "save_weights", (2, 6)),
    "at the record of progress": (checkpoints, "write_json", (1, 5, 7, 9)),
    "at a final state": (module, "write_final_state", (1, 2, 3)),
    "at pruning": (module, "prune_checkpoints", (2, 5, 7, 8, 10, 11)),
    "at logging": (TrainingHarness, "log_batched", (9, 16, 24)),
}


def _assert_same_bits(
    harness: TrainingHarness,
    ended: list[TrainState],
    other: TrainingHarness,
    expected: list[TrainState],
) -> None:
    for ours, theirs in zip(ended, expected, strict=True):
        assert replace(ours, seconds=0.0) == replace(theirs, seconds=0.0)
    files = {path.relative_to(other.folder) for path in other.folder.rglob("*.*")}
    assert {path.relative_to(harness.folder) for path in harness.folder.rglob("*.*")} == files
    for path in files:
        if path.suffix == ".safetensors":
            assert (harness.folder / path).read_bytes() == (other.folder / path).read_bytes(), path
        if path.suffix == ".parquet":
            pd.testing.assert_frame_equal(
                pd.read_parquet(harness.folder / path),
                pd.read_parquet(other.folder / path),
                check_exact=True,
            )


@BEFORE_AND_AFTER
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_batch_ends_with_the_same_bits(
    mixed: TrainingHarness,
    moment: str,
    after: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kills come at any moment, also between the checkpoints of two runs.

    The bits of a step depend on its runs, so the same runs must share it again.
    """
    reference = mixed.copy_to(tmp_path / "reference")
    expected = reference.batched()
    owner, name, calls = MOMENTS[moment]
    for call in calls:
        shutil.rmtree(mixed.folder, ignore_errors=True)
        with monkeypatch.context() as patch:
            kill_at(patch, owner, name, call, after)
            with pytest.raises(Killed):
                mixed.batched()
        _assert_same_bits(mixed, mixed.batched(), reference, expected)


def test_a_batch_that_is_killed_repeatedly_ends(
    mixed: TrainingHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a partition with preemption: each start gets a few steps further."""
    reference = mixed.copy_to(tmp_path / "reference")
    expected = reference.batched()
    for _ in range(3):
        with monkeypatch.context() as patch:
            kill_at(patch, module, "train_batch", 4, after=True)
            with pytest.raises(Killed):
                mixed.batched()
    _assert_same_bits(mixed, mixed.batched(), reference, expected)


def test_a_finished_batch_trains_nothing(
    mixed: TrainingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = mixed.batched()
    monkeypatch.setattr(module, "train_batch", None)
    assert mixed.batched() == ended


def _write_run(folder: Path, *steps: int, points: int = 2, ended: int | None = None) -> Path:
    for step in steps:
        checkpoint = folder / f"step-{step:07d}"
        checkpoint.mkdir(parents=True)
        write_json(checkpoint / "progress.json", {"evaluations": [[step, 0.0, 0.0]] * points})
        (checkpoint / "optimizer.safetensors").touch()
    folder.mkdir(exist_ok=True)
    if ended is not None:
        write_json(folder / "end.json", {"step": ended, "progress": {}})
    return folder


def test_resume_groups_separates_runs_by_step(tmp_path: Path) -> None:
    """A rate that is added to a killed sweep does not send the other runs back."""
    old = [_write_run(tmp_path / "a", 6, 9), _write_run(tmp_path / "b", 6)]
    ended = [_write_run(tmp_path / "c", 3, ended=6), _write_run(tmp_path / "d", 6, ended=9)]
    new = _write_run(tmp_path / "e")
    assert resume_groups([*old, *ended, new]) == [[new], [*old, *ended]]
    assert resume_groups(old[:1]) == [old[:1]]
    assert resume_groups(ended) == [ended]


def test_resume_groups_restarts_before_two_evaluations(tmp_path: Path) -> None:
    """After a kill between the first checkpoints of two runs, both restart."""
    first, second = _write_run(tmp_path / "a", 3, points=1), _write_run(tmp_path / "b")
    assert ResumePoints.of(first).checkpoints == {0, 3}
    assert resume_groups([first, second]) == [[first, second]]


def test_resume_groups_ignores_checkpoints_without_moments(tmp_path: Path) -> None:
    """Such a checkpoint can only be selected: runs at its step resume in another group."""
    ahead, behind = _write_run(tmp_path / "a", 3, 9), _write_run(tmp_path / "b", 3)
    assert resume_groups([ahead, behind]) == [[ahead, behind]]
    (ahead / "step-0000003" / "optimizer.safetensors").unlink()
    assert ResumePoints.of(ahead).checkpoints == {9}
    assert resume_groups([ahead, behind]) == [[behind], [ahead]]


# --- memory -------------------------------------------------------------------------------------


def test_out_of_memory_halves_the_pass_of_all_runs(
    harness: TrainingHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.method = harness.method.model_copy(update={"dropout": 0.0})
    roomy = harness.copy_to(tmp_path / "roomy").batched()
    attempts = limit_examples(monkeypatch, 5)
    for ours, theirs in zip(harness.batched(), roomy, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
        assert ours.micro_batch_size == 1
    assert sum(rows > 5 for rows in attempts) == 1


@pytest.mark.parametrize(("dropout", "passes"), [(0.0, 2), (0.1, 1)])
def test_rows_of_many_runs_are_split_into_passes(
    harness: TrainingHarness, dropout: float, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout they are not, because masks are drawn per pass."""
    harness.method = harness.method.model_copy(update={"dropout": dropout})
    harness.set_training(micro_batch_size=4)
    monkeypatch.setattr(run_groups, "TOKENS_PER_PASS", 3 * 2 * 40)
    monkeypatch.setitem(microbatches.FORWARD_OVERHEAD_TOKENS, "cpu", 10**6)
    counted: list[int] = []
    original = microbatches.split_batch

    def counting(*args: Any) -> Any:
        groups = original(*args)
        counted.append(len(groups[0]))
        return groups

    monkeypatch.setattr(train_step, "split_batch", counting)
    harness.batched()
    assert max(counted) == passes


# --- in a run group -----------------------------------------------------------------------------


@pytest.fixture
def context(
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
) -> RunContext:
    """Eight rows to learn; two runs suffice for a batch."""
    monkeypatch.setattr(run_groups, "MIN_RUNS", 2)
    return run_context(base_folder, tokenizer, rows, base_value=0.001)


def test_run_group_is_batched_unless_the_study_says_never(
    context: RunContext, tuning: Method, tmp_path: Path
) -> None:
    """Records agree up to rounding, and plain peft reads the checkpoints."""
    batched = RunGroupHarness(context, tmp_path / "batched")(
        run_group_config(tuning, SETTINGS, "auto")
    )
    single = RunGroupHarness(context, tmp_path / "single")(
        run_group_config(tuning, SETTINGS, "never")
    )
    assert [record["batched_runs"] for record in batched + single] == [3, 3, 3, 1, 1, 1]
    for ours, theirs in zip(batched, single, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
        assert ours.keys() == theirs.keys()
        same = ("run", "status", "steps", "tokens", "trainable_parameters", "key", "cut_rows")
        assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
        assert 0 < ours["training_seconds"] <= ours["wall_seconds"]
        base = AutoModelForCausalLM.from_pretrained(context.base, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, Path(ours["folder"]) / "step-0000004")
        weights = {n: w for n, w in loaded.named_parameters() if "lora_B" in n}
        assert all(weight.abs().max() > 0 for weight in weights.values())
        left = {path.name for path in Path(ours["folder"]).rglob("*")}
        assert not left & {"end.json", "optimizer.safetensors"}


def test_batched_checkpoint_reloads_its_rank_and_scale(
    context: RunContext, tuning: Method, tmp_path: Path
) -> None:
    """Plain peft computes with the rank and scale of the run, and other logits than the base."""
    changes = {"rank": 2, "variant": "rslora", "alpha": 3.0}
    trainer = RunGroupHarness(context, tmp_path)
    ids = torch.tensor([context.tokenizer("Where was the author born?")["input_ids"]])
    for record in trainer(run_group_config(tuning, SETTINGS, "auto", **changes)):
        checkpoint = Path(record["folder"]) / "step-0000004"
        assert json.loads((checkpoint / "adapter_config.json").read_text())["r"] == 2
        base = AutoModelForCausalLM.from_pretrained(context.base, dtype=torch.float32)
        before = base(ids).logits
        model = PeftModel.from_pretrained(base, checkpoint)
        layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
        assert layer.scaling["default"] == pytest.approx(3.0 / 2**0.5)
        assert not torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(("before", "after"), [("auto", "never"), ("never", "auto")])
def test_half_trained_runs_resume_under_another_batched_lora(
    context: RunContext,
    tuning: Method,
    tmp_path: Path,
    before: str,
    after: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = [*SETTINGS, SETTINGS[0].model_copy(update={"learning_rate": 0.005})]
    single = RunGroupHarness(context, tmp_path / "single")(
        run_group_config(tuning, settings, "never")
    )
    trainer = RunGroupHarness(context, tmp_path / "killed")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, module, "save_checkpoint", 5, after=True)
        trainer(run_group_config(tuning, settings, before))
    for ours, theirs in zip(
        trainer(run_group_config(tuning, settings, after)), single, strict=True
    ):
        assert (ours["run"], ours["status"]) == (theirs["run"], "ok")
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
        assert [e[0] for e in ours["evaluations"]] == [e[0] for e in theirs["evaluations"]]


def test_a_run_without_memory_in_a_pass_is_trained_singly(
    context: RunContext, tuning: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = trained_weights(meta_model(context.base, tuning)).values()
    monkeypatch.setattr(run_groups, "CPU_BYTES", 2 * 16 * sum(w.numel() for w in weights))
    batched = RunGroupHarness(context, tmp_path / "batched")(
        run_group_config(tuning, SETTINGS, "auto")
    )
    single = RunGroupHarness(context, tmp_path / "single")(
        run_group_config(tuning, SETTINGS, "never")
    )
    assert [record["batched_runs"] for record in batched] == [2, 2, 1]
    for ours, theirs in zip(batched, single, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)


def test_batched_run_group_trains_only_missing_runs(
    context: RunContext, tuning: Method, tmp_path: Path
) -> None:
    trainer = RunGroupHarness(context, tmp_path)
    first = trainer(run_group_config(tuning, SETTINGS[:2], "auto"))
    records = trainer(run_group_config(tuning, SETTINGS, "auto"))
    assert records[:2] == first
    assert set(trainer.logged) == {records[2]["run"]}
    assert trainer(run_group_config(tuning, SETTINGS, "never")) == records
    assert trainer.logged == []


def test_a_rate_added_to_a_killed_sweep_loses_no_work(
    context: RunContext, tuning: Method, tmp_path: Path
) -> None:
    """The new run is trained singly, and the others resume from their checkpoints."""

    def stop(run: str, progress: TrainState, schedule: LrSchedule) -> None:
        if progress.step == 7:
            raise Killed

    def long(settings: Sequence[Hyperparameters]) -> RunGroupConfig:
        config = run_group_config(tuning, settings, "auto")
        return config.model_copy(
            update={"training": config.training.model_copy(update={"epochs": 4.0})}
        )

    trainer = RunGroupHarness(context, tmp_path)
    with pytest.raises(Killed):
        trainer(long(SETTINGS[:2]), stop)
    records = trainer(long(SETTINGS))
    steps = {record["run"]: trainer.logged.count(record["run"]) for record in records}
    assert list(steps.values()) == [2, 2, 8]
    assert [record["status"] for record in records] == ["ok"] * 3


@pytest.mark.parametrize(
    "changes", [{"variant": "dora"}, {"mitigation": MitigationConfig(l2_sp={"weight": 0.1})}]
)
def test_other_methods_train_one_run_after_the_other(
    context: RunContext, tuning: Method, tmp_path: Path, changes: dict[str, Any]
) -> None:
    records = RunGroupHarness(context, tmp_path)(
        run_group_config(tuning, SETTINGS[:2], "auto", **changes)
    )
    assert [record["batched_runs"] for record in records] == [1, 1]
    assert [record["status"] for record in records] == ["ok", "ok"]


def test_run_key_ignores_batching(tuning: Method) -> None:
    keys: set[str] = {
        run_key(run_group_config(tuning, SETTINGS, batched), SETTINGS[0], {})
        for batched in ("never", "auto")
    }
    assert len(keys) == 1


@pytest.mark.parametrize(("dropout", "keys"), [(0.0, 1), (0.1, 2)])
def test_run_key_has_micro_batch_size_only_with_dropout(
    tuning: Method, dropout: float, keys: int
) -> None:
    """Masks are drawn per pass; nothing else depends on how a batch is split."""
    config = run_group_config(tuning, SETTINGS, "auto", dropout=dropout)
    changed = [
        config.model_copy(
            update={"training": config.training.model_copy(update={"micro_batch_size": n})}
        )
        for n in (2, 4)
    ]
    assert len({run_key(each, SETTINGS[0], {}) for each in changed}) == keys


def test_seconds_of_batched_runs_are_shares(
    context: RunContext, tuning: Method, tmp_path: Path
) -> None:
    """The seconds of a batch are neither counted per run nor lost."""
    records: Sequence[Mapping[str, Any]] = RunGroupHarness(context, tmp_path)(
        run_group_config(tuning, SETTINGS, "auto")
    )
    shares = {record["wall_seconds"] for record in records}
    assert len(shares) == 1
    assert sum(record["training_seconds"] for record in records) < sum(
        record["wall_seconds"] for record in records
    )
    for record in records:
        rate = record["tokens"] / record["training_seconds"]
        assert record["tokens_per_second"] == pytest.approx(rate)
