"""Durations of one trunk: every branch is bit-identical to the single run of its duration."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig, SelectionConfig
from forgetting.config.expand import Method, RunGroupConfig, duration_name
from forgetting.config.methods import Hyperparameters
from forgetting.config.training import TrainingConfig
from forgetting.selection import trajectory_of
from forgetting.training import branches as module
from forgetting.training import checkpoints, train_step
from forgetting.training import run_group as run_group_module
from forgetting.training import trainer as train_module
from forgetting.training.branches import single_duration, train_cooldowns, train_trunks
from forgetting.training.run_group import train_run_group
from forgetting.training.train_step import StepLoss
from forgetting.training.training_job import RunContext, TrainingJob, run_group_items, run_key
from support.kill import BEFORE_AND_AFTER, Killed, kill_at
from support.run_groups import examples_in

pytestmark = pytest.mark.usefixtures("one_thread")

Rows = list[dict[str, Any]]
Records = list[dict[str, Any]]
INPUTS = {"base": "b", "train": "t", "precision": "torch.float32", "versions": "c"}
INPUTS |= {"probe new": "p"}
LOW, HIGH = (
    Hyperparameters(learning_rate=5e-3),
    Hyperparameters(learning_rate=1e-2, weight_decay=1e-3),
)
# Three steps an epoch: branches at steps 2 (within the warm-up), 5 and 10, of 2, 6 and 12 steps.
DURATIONS = [0.75, 2.0, 4.0]
STARTS = {0.75: 1, 2.0: 5, 4.0: 10}
TRAINING = TrainingConfig(
    epochs=4.0,
    batch_size=4,
    micro_batch_size=3,
    schedule="wsd",
    warmup_epochs=1.0,
    durations=DURATIONS,
)
FULL = Method(
    name="full", kind="full", label="full", hyperparameters=[Hyperparameters(learning_rate=1e-3)]
)


@pytest.fixture
def context(base_folder: Path, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> RunContext:
    """Return a context of the tiny base, ten training rows and two probes."""
    return RunContext(
        base=base_folder,
        tokenizer=tokenizer,
        train=rows,
        probes={"new": rows[:2], "old": rows[8:]},
        base_value=0.1,
        device=torch.device("cpu"),
        precision=torch.float32,
    )


@pytest.fixture
def config(tuning: Method) -> RunGroupConfig:
    """Return a run group of one rate, evaluated twice an epoch and thus within cooldowns."""
    return RunGroupConfig(
        method=tuning.model_copy(update={"hyperparameters": [HIGH]}),
        seed=3,
        prompt=PromptConfig(),
        training=TRAINING,
        evaluation=EvaluationConfig(max_new_tokens=2, every_epochs=1 / 3),
        selection=SelectionConfig(probe="new"),
        precision="float32",
        knowledge={"new": "new", "old": "old"},
    )


class BranchHarness:
    """Train trunks and branches in one folder, and single runs of one duration in another."""

    def __init__(self, context: RunContext, folder: Path) -> None:
        self.context, self.state, self.single_state = context, folder / "state", folder / "single"
        self.logged: list[tuple[str, int]] = []

    def trunks(self, config: RunGroupConfig) -> Records:
        """Train the trunks, as `finetune` does."""
        return train_trunks(TrainingJob(config, self.context, INPUTS, self.state, self.log))

    def branches(
        self, config: RunGroupConfig, duration: float, trunks: Records | None = None
    ) -> Records:
        """Train the branches of a duration after the trunks, as `train_cooldown` does."""
        trunks = self.trunks(config) if trunks is None else trunks
        return train_cooldowns(
            TrainingJob(config, self.context, INPUTS, self.state, self.log), duration, trunks
        )

    def single(self, config: RunGroupConfig, duration: float) -> Records:
        """Train the runs of a duration without a trunk."""
        own = single_duration(config, duration)
        return train_run_group(
            TrainingJob(own, self.context, INPUTS, self.single_state, lambda *_: None),
            branches=True,
        )

    def log(self, run: str, progress: Any, schedule: Any) -> None:
        """Note the step of a run."""
        self.logged.append((run, progress.step))

    def starts(self) -> list[str]:
        """Return the remaining checkpoints of the trunk that branches start from."""
        return sorted(path.name for path in self.state.glob("*/*/*/*/branch_points/*"))


@pytest.fixture
def harness(context: RunContext, tmp_path: Path) -> BranchHarness:
    return BranchHarness(context, tmp_path)


def _assert_same(branch: dict[str, Any], expected: dict[str, Any]) -> None:
    """Assert that weights, losses, evaluations, tokens and items are bit-identical."""
    for key in (
        "losses",
        "evaluations",
        "tokens",
        "steps",
        "steps_per_epoch",
        "status",
        "hyperparameters",
    ):
        assert branch[key] == expected[key], key
    folders = Path(branch["folder"]), Path(expected["folder"])
    names = [sorted(path.name for path in folder.glob("items-*")) for folder in folders]
    assert names[0] == names[1]
    for name in names[0]:
        ours, theirs = (pd.read_parquet(folder / name) for folder in folders)
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    last = f"step-{expected['steps']:07d}"
    (file,) = (folders[1] / last).glob("*model.safetensors")
    ours, theirs = (load_file(folder / last / file.name) for folder in folders)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


# --- equal to single runs -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_branch_equals_the_single_run_of_its_duration(
    harness: BranchHarness, config: RunGroupConfig, kind: str
) -> None:
    """With dropout, weight decay, clipping and evaluations within the cooldown."""
    if kind == "full":
        config = config.model_copy(update={"method": FULL})
    trunks = harness.trunks(config)
    assert trunks[0]["steps"] == STARTS[4.0]
    for duration in DURATIONS:
        (branch,) = harness.branches(config, duration, trunks)
        (expected,) = harness.single(config, duration)
        _assert_same(branch, expected)
        assert branch["duration"] == duration
        assert branch["run"] == f"{expected['run']}/{duration_name(duration)}"
        trained = [step for run, step in harness.logged if run == branch["run"]]
        assert trained == list(range(STARTS[duration] + 1, expected["steps"] + 1))
    assert [step for run, step in harness.logged if run == trunks[0]["run"]] == list(range(1, 11))


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "lionw"},
        {"optimizer": "adafactor"},
        {
            "schedule": "inverse_sqrt",
            "inverse_sqrt_floor": 0.2,
            "min_lr_ratio": 0.1,
            "decay_ratio": 0.5,
        },
        {"warmup_epochs": None, "warmup_steps": 8},
        {"schedule": "linear", "warmup_epochs": None, "warmup_ratio": 0.3},
        {"schedule": "cosine", "min_lr_ratio": 0.01, "warmup_epochs": None, "warmup_ratio": 0.3},
    ],
    ids=["lionw", "adafactor", "inverse_sqrt", "long warm-up", "linear", "cosine"],
)
def test_a_branch_equals_its_run_for_every_schedule(
    harness: BranchHarness, config: RunGroupConfig, changes: dict[str, Any]
) -> None:
    training = TrainingConfig.model_validate(TRAINING.model_dump() | changes)
    config = config.model_copy(update={"training": training})
    for duration in (0.75, 2.0):
        _assert_same(harness.branches(config, duration)[0], harness.single(config, duration)[0])


def test_every_run_of_a_sweep_has_its_branch(
    harness: BranchHarness, config: RunGroupConfig
) -> None:
    method = config.method.model_copy(update={"hyperparameters": [LOW, HIGH]})
    config = config.model_copy(update={"method": method})
    both = harness.branches(config, 2.0)
    assert [record["hyperparameters"] for record in both] == [s.model_dump() for s in (LOW, HIGH)]
    for record, expected in zip(both, harness.single(config, 2.0), strict=True):
        _assert_same(record, expected)
    assert both[0]["losses"] != both[1]["losses"]


def test_a_duration_may_be_one_cooldown_only(
    harness: BranchHarness, config: RunGroupConfig
) -> None:
    """The cooldown is the whole run and shares no step with the trunk."""
    training = TRAINING.model_copy(update={"durations": [0.1, 4.0]})
    config = config.model_copy(update={"training": training})
    (branch,) = harness.branches(config, 0.1)
    assert branch["steps"] == 1
    _assert_same(branch, harness.single(config, 0.1)[0])


def test_durations_with_equal_steps_have_equal_losses(
    harness: BranchHarness, config: RunGroupConfig
) -> None:
    training = TRAINING.model_copy(update={"durations": [0.7, 0.75, 4.0]})
    config = config.model_copy(update={"training": training})
    one, other = harness.branches(config, 0.7), harness.branches(config, 0.75)
    assert one[0]["losses"] == other[0]["losses"]
    trajectory = trajectory_of([*one, *other], 0.1)
    assert [point.step for point in trajectory.evaluations] == [0, 2]


def test_training_seconds_of_a_branch_exclude_the_trunk(
    harness: BranchHarness, config: RunGroupConfig
) -> None:
    (branch,) = harness.branches(config, 4.0)
    (expected,) = harness.single(config, 4.0)
    whole = branch["tokens"] / branch["tokens_per_second"]
    assert branch["training_seconds"] == pytest.approx(whole * 2 / 12)
    assert expected["training_seconds"] == pytest.approx(
        expected["tokens"] / expected["tokens_per_second"]
    )


# --- trunks that diverge, and durations that come later -------------------------------------------


def _poison(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Make the loss of a step NaN, in every run that does that step."""
    original = train_module.train_batch

    def poisoned(model: Any, examples: Any, runs: Any, stack: Any) -> Any:
        losses, tokens = original(model, examples, runs, stack)
        nothing = [StepLoss(float("nan"), 0.0)] * len(runs)
        return (nothing if runs[0].state.step == at else losses), tokens

    monkeypatch.setattr(train_module, "train_batch", poisoned)


def test_branches_before_a_trunk_diverges_are_valid(
    harness: BranchHarness, config: RunGroupConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later branches are recorded as diverged, as the single run is."""
    _poison(monkeypatch, 7)
    trunks = harness.trunks(config)
    assert trunks[0]["status"] == "diverged"
    ended = {duration: harness.branches(config, duration, trunks)[0] for duration in DURATIONS}
    assert [record["status"] for record in ended.values()] == ["ok", "ok", "diverged"]
    (expected,) = harness.single(config, 4.0)
    for key in ("losses", "evaluations", "steps", "status"):
        assert ended[4.0][key] == expected[key], key
    trajectory = trajectory_of([ended[duration] for duration in DURATIONS], 0.1)
    assert trajectory.diverged
    assert [point.step for point in trajectory.evaluations] == [0, 2, 6]
    assert trajectory.run_at(None).endswith("duration2")


def test_one_more_duration_trains_one_more_branch(
    harness: BranchHarness, config: RunGroupConfig
) -> None:
    """The trunk is not retrained; the new branch starts at the last remaining checkpoint."""
    trunks = harness.trunks(config)
    harness.branches(config, 0.75, trunks)
    wider = config.model_copy(
        update={"training": TRAINING.model_copy(update={"durations": [0.75, 3.0, 2.0, 4.0]})}
    )
    harness.logged.clear()
    assert harness.trunks(wider) == trunks
    (branch,) = harness.branches(wider, 3.0, trunks)
    assert {step for _, step in harness.logged} == {6, 7, 8, 9}
    _assert_same(branch, harness.single(wider, 3.0)[0])
    longer = config.model_copy(
        update={"training": TRAINING.model_copy(update={"epochs": 5.0, "durations": [0.75, 5.0]})}
    )
    assert run_key(longer, HIGH, INPUTS) != run_key(config, HIGH, INPUTS)


def test_run_key_separates_trunks_from_ordinary_runs(config: RunGroupConfig) -> None:
    """A trunk ends before the cooldown, so the run without `durations` is a different one."""
    without = config.model_copy(update={"training": TRAINING.model_copy(update={"durations": []})})
    assert run_key(without, HIGH, INPUTS) != run_key(config, HIGH, INPUTS)


# --- files --------------------------------------------------------------------------------------


def test_starts_stay_until_their_branches_are_finished(
    harness: BranchHarness, config: RunGroupConfig
) -> None:
    trunks = harness.trunks(config)
    assert harness.starts() == ["step-0000001", "step-0000005", "step-0000010"]
    harness.branches(config, 2.0, trunks)
    assert harness.starts() == ["step-0000001", "step-0000010"]
    harness.branches(config, 4.0, trunks)
    harness.branches(config, 0.75, trunks)
    assert harness.starts() == []
    assert not list(harness.state.rglob("optimizer.safetensors"))
    kept = [path.parent.name for path in harness.state.rglob("*model.safetensors")]
    assert sorted(kept) == ["step-0000002", "step-0000006", "step-0000012"]


def test_a_finished_branch_trains_nothing(harness: BranchHarness, config: RunGroupConfig) -> None:
    trunks = harness.trunks(config)
    done = {duration: harness.branches(config, duration, trunks) for duration in DURATIONS}
    harness.logged.clear()
    assert harness.trunks(config) == trunks
    assert {duration: harness.branches(config, duration, trunks) for duration in DURATIONS} == done
    assert harness.logged == []


def test_starts_are_copied_on_a_disk_without_links(
    harness: BranchHarness, config: RunGroupConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    _assert_same(harness.branches(config, 2.0)[0], harness.single(config, 2.0)[0])


def test_items_of_a_branch_include_the_trunks(
    harness: BranchHarness, config: RunGroupConfig
) -> None:
    """In the tables, a branch is a whole run."""
    (branch,) = harness.branches(config, 2.0)
    items, _ = run_group_items([branch])
    assert list(items["step"].unique()) == [1, 2, 3, 4, 5, 6]
    assert set(items["run"]) == {branch["run"]}


# --- killed and resumed -------------------------------------------------------------------------


def _assert_kills_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
    moments: Sequence[tuple[Any, str, int]],
    begin: Callable[[], None],
    end: Callable[[], None],
    after: bool,
) -> None:
    for owner, name, call in moments:
        begin()
        with monkeypatch.context() as patch:
            kill_at(patch, owner, name, call, after)
            with pytest.raises(Killed):
                end()
        end()


# Of the six checkpoints, the first, third and sixth are those that branches start from.
TRUNK_MOMENTS = [
    (train_module, "train_batch", 6),
    (train_module, "write_table", 2),
    (train_module, "save_checkpoint", 6),
    (checkpoints, "save_weights", 3),
    (checkpoints, "save_tensors", 3),
    (checkpoints, "write_json", 6),
    (Path, "rename", 1),
    (Path, "rename", 3),
    (run_group_module, "write_json", 1),
]


@BEFORE_AND_AFTER
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_killed_trunk_stores_the_same_starts(
    harness: BranchHarness,
    config: RunGroupConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: str,
    after: bool,
) -> None:
    """Kills come in a step, in an evaluation, or while a start is written."""
    if kind == "full":
        config = config.model_copy(update={"method": FULL})
    rarely = EvaluationConfig(max_new_tokens=2, every_epochs=1.0)
    config = config.model_copy(update={"evaluation": rarely})
    whole = BranchHarness(harness.context, tmp_path / "whole")
    (expected,) = whole.trunks(config)

    def begin() -> None:
        shutil.rmtree(harness.state, ignore_errors=True)

    def end() -> None:
        (trunk,) = harness.trunks(config)
        assert (trunk["losses"], trunk["evaluations"]) == (
            expected["losses"],
            expected["evaluations"],
        )
        assert harness.starts() == whole.starts()
        for file in Path(expected["folder"], "branch_points").rglob("*.safetensors"):
            ours = Path(trunk["folder"]) / file.relative_to(expected["folder"])
            assert ours.read_bytes() == file.read_bytes()

    _assert_kills_change_nothing(monkeypatch, TRUNK_MOMENTS, begin, end, after)


def test_a_killed_trunk_resumes_from_a_start(
    harness: BranchHarness, config: RunGroupConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starts are resume points too, which helps where evaluations are rare."""
    rarely = EvaluationConfig(max_new_tokens=2, every_epochs=9.0)
    config = config.model_copy(update={"evaluation": rarely})
    with monkeypatch.context() as patch:
        kill_at(patch, train_module, "train_batch", 8, after=False)
        with pytest.raises(Killed):
            harness.trunks(config)
    assert harness.logged[-1][1] == 7
    harness.logged.clear()
    harness.trunks(config)
    assert [step for _, step in harness.logged] == [6, 7, 8, 9, 10]


BRANCH_MOMENTS = [
    (shutil, "copytree", 1),
    (module, "link_or_copy", 1),
    (module, "rename_synced", 1),
    (Path, "rename", 1),
    (Path, "rename", 2),
    (train_module, "train_batch", 1),
    (train_module, "train_batch", 2),
    (train_module, "write_table", 1),
    (checkpoints, "save_tensors", 1),
    (train_module, "prune_checkpoints", 2),
    (run_group_module, "write_json", 1),
    (module, "_prune_trunk", 1),
    (Path, "unlink", 1),
    (shutil, "rmtree", 3),
]


@BEFORE_AND_AFTER
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_killed_branch_ends_with_the_same_bits(
    harness: BranchHarness,
    config: RunGroupConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: str,
    after: bool,
) -> None:
    """Kills come while the start is linked, in the cooldown, at its end, and while starts go."""
    if kind == "full":
        config = config.model_copy(update={"method": FULL})
    trunks = harness.trunks(config)
    (expected,) = harness.single(config, 4.0)
    shutil.copytree(harness.state, tmp_path / "trunks")

    def begin() -> None:
        shutil.rmtree(harness.state)
        shutil.copytree(tmp_path / "trunks", harness.state)

    def end() -> None:
        (branch,) = harness.branches(config, 4.0, trunks)
        _assert_same(branch, expected)
        assert harness.starts() == ["step-0000001", "step-0000005"]

    _assert_kills_change_nothing(monkeypatch, BRANCH_MOMENTS, begin, end, after)


def test_a_partly_removed_start_is_not_used(
    harness: BranchHarness, config: RunGroupConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill comes while an unneeded start is removed; then a new duration would need it."""
    trunks = harness.trunks(config)
    original = shutil.rmtree

    def deadly(path: Any, *more: Any, **options: Any) -> None:
        if Path(path).parent.name == "branch_points" and Path(path).exists():
            next(Path(path).glob("*model.safetensors")).unlink()
            raise Killed
        original(path, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", deadly)
        with pytest.raises(Killed):
            harness.branches(config, 4.0, trunks)
    wider = config.model_copy(
        update={"training": TRAINING.model_copy(update={"durations": [*DURATIONS, 3.9]})}
    )
    _assert_same(harness.branches(wider, 3.9, trunks)[0], harness.single(wider, 3.9)[0])


def test_a_branch_keeps_the_micro_batch_of_its_trunk(
    harness: BranchHarness, config: RunGroupConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch does not retry the size that ran out of memory."""
    original, seen = train_step.target_logits, []

    def narrow(model: Any, batch: Any) -> torch.Tensor:
        seen.append(examples_in(batch))
        if seen[-1] > 1:
            raise torch.OutOfMemoryError("out of memory")
        return original(model, batch)

    monkeypatch.setattr(train_step, "target_logits", narrow)
    harness.context = replace(harness.context, train=harness.context.train[:4])
    trunks = harness.trunks(config)
    seen.clear()
    harness.branches(config, 4.0, trunks)
    assert set(seen) == {1}
