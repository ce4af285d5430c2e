"""Killed training runs resume bit for bit, whatever was on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from forgetting.config.expand import Method
from forgetting.config.methods import Hyperparameters
from forgetting.models.loading import Model
from forgetting.training import checkpoints, stages, trainer
from forgetting.training import pretrain as pretrain_module
from forgetting.training import run_group as run_group_module
from forgetting.training.pretrain import pretrain
from forgetting.training.stages import second_stage_step
from support.kill import BEFORE_AND_AFTER, Killed, kill_at
from support.pretraining import SPEC, file_digests, some_documents
from support.run_groups import RunGroupHarness, are_equal, run_context, run_group_config
from support.training import (
    FULL,
    NEVER_REACHES,
    VARIANTS,
    TrainingHarness,
    adapter_method,
    hybrid_method,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# --- one run ------------------------------------------------------------------------------------

MOMENTS = {
    "in a step": (trainer, "train_batch", (2, 12)),
    "in an evaluation": (TrainingHarness, "evaluate", (1, 4)),
    "at the items": (trainer, "write_table", (1, 3)),
    "at the weights": (checkpoints, "save_weights", (1, 3)),
    "at the optimizer's state": (checkpoints, "save_tensors", (2, 4)),
    "at the record of progress": (checkpoints, "write_json", (1, 4)),
    "at the name of the checkpoint": (Path, "rename", (1, 4)),
    "when old checkpoints are removed": (trainer, "prune_checkpoints", (2, 4)),
    "in the log": (TrainingHarness, "log", (6, 12)),
}
"""Moments at which a run is killed: owner, function and numbers of the calls."""


@BEFORE_AND_AFTER
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_resumes_bit_for_bit(
    harness: TrainingHarness, moment: str, kind: str, after: bool, tmp_path: Path
) -> None:
    """Killed at any moment, before or after a file is written."""
    if kind == "full":
        harness.method, harness.values = FULL, NEVER_REACHES
    reference = harness.run_in(tmp_path / "reference")
    owner, name, calls = MOMENTS[moment]
    for call in calls:
        harness.assert_resumes(tmp_path / "reference", reference, owner, name, call, after=after)


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
    partial = harness.folder / ".step-0000006"
    assert harness.checkpoints() == [".step-0000006", "step-0000003"]
    (partial / "progress.json").unlink()
    if left != "all but the record":
        (partial / "optimizer.safetensors").unlink()
    if left == "half a file":
        file = partial / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:100])
    if left == "nothing":
        shutil.rmtree(partial)
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


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "lora"])
def test_every_variant_resumes(harness: TrainingHarness, variant: str, tmp_path: Path) -> None:
    harness.method = adapter_method(variant)
    reference = harness.run_in(tmp_path / "reference")
    harness.assert_resumes(tmp_path / "reference", reference, trainer, "train_batch", 8)


@pytest.mark.parametrize("optimizer", ["lionw", "adafactor"])
def test_every_optimizer_resumes(harness: TrainingHarness, optimizer: str, tmp_path: Path) -> None:
    """The optimizer state, factored or not, is restored bit for bit."""
    harness.set_training(optimizer=optimizer)
    reference = harness.run_in(tmp_path / "reference")
    harness.assert_resumes(tmp_path / "reference", reference, trainer, "train_batch", 8)


# --- AdaLoRA, embeddings, hybrids ---------------------------------------------------------------

ADALORA_MOMENTS = {
    "before the budget falls": (trainer, "train_batch", 2),
    "while it falls": (trainer, "train_batch", 5),
    "when it has fallen": (trainer, "train_batch", 11),
    "at the method's state": (checkpoints, "adalora_training_state", 2),
    "at the file of it": (checkpoints, "save_tensors", 4),
}


@BEFORE_AND_AFTER
@pytest.mark.parametrize("moment", ADALORA_MOMENTS)
@pytest.mark.parametrize("every", [1, 2])
def test_killed_adalora_resumes_bit_for_bit(
    harness: TrainingHarness, moment: str, every: int, after: bool, tmp_path: Path
) -> None:
    """Averages, masks and pruned values are restored, so that the ranks fall as before."""
    harness.method = adapter_method("adalora", embeddings="trained", adalora={"delta_t": every})
    reference = harness.run_in(tmp_path / "reference")
    harness.assert_resumes(tmp_path / "reference", reference, *ADALORA_MOMENTS[moment], after=after)


@pytest.mark.parametrize("variant", ["lora", "pissa"])
def test_killed_run_with_trained_embeddings_resumes(
    any_head: TrainingHarness, variant: str, tmp_path: Path
) -> None:
    any_head.method = adapter_method(variant, embeddings="trained", embedding_lr_ratio=0.2)
    reference = any_head.run_in(tmp_path / "reference")
    any_head.assert_resumes(tmp_path / "reference", reference, trainer, "train_batch", 8)


@pytest.mark.parametrize("start", [0.5, 0.6])
def test_killed_hybrid_resumes_bit_for_bit(
    harness: TrainingHarness, start: float, tmp_path: Path
) -> None:
    """In each step around the switch, at an evaluation or between two, before and after it."""
    harness.method = hybrid_method("last 1", start)
    reference = harness.run_in(tmp_path / "reference")
    switch = second_stage_step(harness.method.second_stage, harness.config.schedule)
    assert switch == {0.5: 6, 0.6: 7}[start]
    for call in (2, switch, switch + 1, switch + 2, 10):
        harness.assert_resumes(tmp_path / "reference", reference, trainer, "train_batch", call)
    again, _ = harness.run()
    assert again.losses == reference[0].losses


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (stages, "select_trainable_layers", 1),
        (stages, "set_peft_model_state_dict", 1),
        (checkpoints, "save_weights", 3),
        (checkpoints, "write_json", 3),
    ],
)
def test_hybrid_killed_between_stages_resumes(
    harness: TrainingHarness, tmp_path: Path, owner: Any, name: str, call: int
) -> None:
    """Killed while the adapter is merged, and while the first full model is written."""
    harness.method = hybrid_method("last 1")
    reference = harness.run_in(tmp_path / "reference")
    harness.assert_resumes(tmp_path / "reference", reference, owner, name, call, after=True)


# --- mitigations --------------------------------------------------------------------------------

REPLAY = {"table": "world/documents", "ratio": 0.3}
MITIGATIONS: dict[str, Any] = {
    "l2_sp": {"l2_sp": {"weight": 100.0}},
    "kl": {"kl": {"weight": 30.0}},
    "ewc": {"ewc": {"table": "world/documents", "samples": 2, "weight": 1e5}},
    "kl on replay": {"replay": REPLAY, "kl": {"weight": 30.0, "tokens": "replay"}},
    "replay": {"replay": REPLAY},
}


@pytest.mark.parametrize("method", [adapter_method(), FULL], ids=["lora", "full"])
@pytest.mark.parametrize("sections", MITIGATIONS.values(), ids=MITIGATIONS)
def test_killed_run_with_mitigations_resumes(
    harness: TrainingHarness, method: Method, sections: Any, tmp_path: Path
) -> None:
    """A mitigation compares with the base, not with the checkpoint that the run resumes from."""
    harness = harness.with_mitigation(method, sections)
    reference = harness.run_in(tmp_path / "reference")
    harness.assert_resumes(tmp_path / "reference", reference, trainer, "train_batch", 5)


# --- a run group --------------------------------------------------------------------------------

LOW, MIDDLE = (Hyperparameters(learning_rate=rate) for rate in (1e-3, 5e-3))


@pytest.fixture
def train(harness: TrainingHarness, tmp_path: Path) -> RunGroupHarness:
    context = run_context(harness.base, harness.tokenizer, harness.rows)
    return RunGroupHarness(context, tmp_path / "state")


def test_a_kill_in_the_second_run_keeps_the_first(
    train: RunGroupHarness, tuning: Method, tmp_path: Path
) -> None:
    def stop(run: str, progress: Any, schedule: Any) -> None:
        if "lr0.005" in run and progress.step == 3:
            raise Killed

    config = run_group_config(tuning, [LOW, MIDDLE], "never")
    with pytest.raises(Killed):
        train(config, stop)
    records = train(config)
    assert train.logged == ["lora-r4/seed0/lr0.005-wd0"] * 2
    whole = RunGroupHarness(train.context, tmp_path / "whole")(config)
    assert all(are_equal(ours, theirs) for ours, theirs in zip(records, whole, strict=True))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_killed_before_its_record_resumes(
    train: RunGroupHarness,
    tuning: Method,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """After a full disk at the very end, a restart finishes the run."""
    config = run_group_config(tuning if kind == "lora" else FULL, [LOW], "never")
    with monkeypatch.context() as patch:

        def no_space(*_: Any) -> None:
            raise OSError("No space left on device")

        patch.setattr(run_group_module, "write_json", no_space)
        with pytest.raises(OSError, match="No space"):
            train(config)
    (record,) = train(config)
    (whole,) = RunGroupHarness(train.context, tmp_path / "whole")(config)
    assert are_equal(record, whole)
    assert record["steps"] == whole["steps"] == 4


# --- a pretraining ------------------------------------------------------------------------------

PRETRAINING_MOMENTS = {
    "in a step": (trainer, "train_batch", 6),
    "while a checkpoint is written": (checkpoints, "save_weights", 3),
    "before the checkpoints are removed": (pretrain_module, "remove_folder", 1),
}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return some_documents()


@pytest.fixture(scope="module")
def pretrained(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the files of a pretraining that was not killed."""
    folder = tmp_path_factory.mktemp("pretrained")
    pretrain(documents, SPEC, folder / "base", folder / "state", seed=3)
    return file_digests(folder / "base")


@pytest.mark.parametrize("moment", PRETRAINING_MOMENTS)
def test_killed_pretraining_resumes_with_the_same_bytes(
    documents: list[str], pretrained: dict[str, str], tmp_path: Path, moment: str
) -> None:
    out, state, steps = tmp_path / "out" / "base", tmp_path / "state", []
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, *PRETRAINING_MOMENTS[moment], after=False)
        with pytest.raises(Killed):
            pretrain(documents, SPEC, out, state, seed=3)
    pretrain(documents, SPEC, out, state, seed=3, log=lambda now, _: steps.append(now.step))
    assert 1 not in steps, "it starts from the beginning"
    assert file_digests(out) == pretrained
    assert not state.exists()
    assert [path.name for path in out.parent.iterdir()] == ["base"]


def test_checkpoints_of_another_pretraining_are_ignored(
    documents: list[str], pretrained: dict[str, str], tmp_path: Path
) -> None:
    """Of a killed pretraining whose configuration or seed has changed since."""
    out, state = tmp_path / "base", tmp_path / "state"
    for spec, seed in ((SPEC, 4), (SPEC.model_copy(update={"warmup": 0.2}), 3)):
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, trainer, "train_batch", 6, after=False)
            with pytest.raises(Killed):
                pretrain(documents, spec, out, state, seed)
    assert len([*state.iterdir()]) == 1
    pretrain(documents, SPEC, out, state, seed=3)
    assert file_digests(out) == pretrained
