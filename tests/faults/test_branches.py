"""Durations of one trunk: each branch ends as the run of its duration that was trained alone."""

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
from forgetting.config.evaluation import EvaluationConfig
from forgetting.config.expand import Method, RunGroupConfig, duration_name
from forgetting.config.methods import Hyperparameters
from forgetting.config.selection import SelectionConfig
from forgetting.config.training import TrainingConfig
from forgetting.selection import trajectory_of
from forgetting.training import branches as module
from forgetting.training import checkpoints, train_step
from forgetting.training import run_group as run_group_module
from forgetting.training import trainer as train_module
from forgetting.training.branches import single_duration, train_cooldowns, train_trunks
from forgetting.training.run_group import RunContext, run_group_items, run_key, train_run_group
from forgetting.training.train_step import StepLoss
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
    """The tiny base, ten rows to learn, and two probes."""
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
def spec(tuning: Method) -> RunGroupConfig:
    """One rate; evaluated twice an epoch, so that some evaluations lie within a cooldown."""
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


class Lab:
    """Trains trunks and branches in one folder, and runs of one duration alone in another."""

    def __init__(self, context: RunContext, folder: Path) -> None:
        self.context, self.state, self.apart = context, folder / "state", folder / "apart"
        self.told: list[tuple[str, int]] = []

    def trunks(self, spec: RunGroupConfig) -> Records:
        """As the program `finetune` does."""
        return train_trunks([spec], self.context, INPUTS, self.state, self.tell)

    def branches(
        self, spec: RunGroupConfig, duration: float, trunks: Records | None = None
    ) -> Records:
        """As the program `train_cooldown` does; the trunks must have ended before."""
        trunks = self.trunks(spec) if trunks is None else trunks
        return train_cooldowns(spec, duration, trunks, self.context, INPUTS, self.state, self.tell)

    def alone(self, spec: RunGroupConfig, duration: float) -> Records:
        """What the duration's runs are when nothing else is trained."""
        own, told = single_duration(spec, duration), lambda *_: None
        return train_run_group([own], self.context, INPUTS, self.apart, told, branches=True)

    def tell(self, run: str, progress: Any, schedule: Any) -> None:
        """Note the steps that were told."""
        self.told.append((run, progress.step))

    def starts(self) -> list[str]:
        """The trunk's checkpoints that are still there."""
        return sorted(path.name for path in self.state.glob("*/*/*/*/starts/*"))


@pytest.fixture
def lab(context: RunContext, tmp_path: Path) -> Lab:
    return Lab(context, tmp_path)


def _assert_same(branch: dict[str, Any], expected: dict[str, Any]) -> None:
    """Weights, losses, points, tokens and items are equal bit for bit."""
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


# --- the same as alone --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_branch_is_the_run_of_its_duration_alone(
    lab: Lab, spec: RunGroupConfig, kind: str
) -> None:
    """Dropout, decay, clipping and evaluations in between: every bit of every duration's run."""
    if kind == "full":
        spec = spec.model_copy(update={"method": FULL})
    trunks = lab.trunks(spec)
    assert trunks[0]["steps"] == STARTS[4.0]
    for duration in DURATIONS:
        (branch,) = lab.branches(spec, duration, trunks)
        (expected,) = lab.alone(spec, duration)
        _assert_same(branch, expected)
        assert branch["duration"] == duration
        assert branch["run"] == f"{expected['run']}/{duration_name(duration)}"
        trained = [step for run, step in lab.told if run == branch["run"]]
        assert trained == list(range(STARTS[duration] + 1, expected["steps"] + 1))
    assert [step for run, step in lab.told if run == trunks[0]["run"]] == list(range(1, 11))


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
def test_it_is_so_with_every_schedule_and_optimizer(
    lab: Lab, spec: RunGroupConfig, changes: dict[str, Any]
) -> None:
    training = TrainingConfig.model_validate(TRAINING.model_dump() | changes)
    spec = spec.model_copy(update={"training": training})
    for duration in (0.75, 2.0):
        _assert_same(lab.branches(spec, duration)[0], lab.alone(spec, duration)[0])


def test_every_run_of_a_sweep_has_its_branch(lab: Lab, spec: RunGroupConfig) -> None:
    tuning = spec.method.model_copy(update={"hyperparameters": [LOW, HIGH]})
    spec = spec.model_copy(update={"method": tuning})
    both = lab.branches(spec, 2.0)
    assert [record["hyperparameters"] for record in both] == [s.model_dump() for s in (LOW, HIGH)]
    for record, expected in zip(both, lab.alone(spec, 2.0), strict=True):
        _assert_same(record, expected)
    assert both[0]["losses"] != both[1]["losses"]


def test_the_shortest_duration_starts_with_the_trunk(lab: Lab, spec: RunGroupConfig) -> None:
    """A cooldown that is the whole run: nothing of the trunk is in it."""
    training = TRAINING.model_copy(update={"durations": [0.1, 4.0]})
    spec = spec.model_copy(update={"training": training})
    (branch,) = lab.branches(spec, 0.1)
    assert branch["steps"] == 1
    _assert_same(branch, lab.alone(spec, 0.1)[0])


def test_durations_of_as_many_steps_end_alike(lab: Lab, spec: RunGroupConfig) -> None:
    training = TRAINING.model_copy(update={"durations": [0.7, 0.75, 4.0]})
    spec = spec.model_copy(update={"training": training})
    one, other = lab.branches(spec, 0.7), lab.branches(spec, 0.75)
    assert one[0]["losses"] == other[0]["losses"]
    course = trajectory_of([*one, *other], 0.1)
    assert [point.step for point in course.evaluations] == [0, 2]


def test_the_time_of_a_branch_is_without_the_trunks(lab: Lab, spec: RunGroupConfig) -> None:
    (branch,) = lab.branches(spec, 4.0)
    (expected,) = lab.alone(spec, 4.0)
    whole = branch["tokens"] / branch["tokens_per_second"]
    assert branch["training_seconds"] == pytest.approx(whole * 2 / 12)
    assert expected["training_seconds"] == pytest.approx(
        expected["tokens"] / expected["tokens_per_second"]
    )


# --- trunks that diverge, and durations that come later -------------------------------------------


def _poison(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Make the loss of a step no number, in every run that makes that step."""
    original = train_module._train_step

    def poisoned(model: Any, examples: Any, runs: Any, stack: Any) -> Any:
        losses, tokens = original(model, examples, runs, stack)
        nothing = [StepLoss(float("nan"), 0.0)] * len(runs)
        return (nothing if runs[0].state.step == at else losses), tokens

    monkeypatch.setattr(train_module, "_train_step", poisoned)


def test_branches_before_a_trunk_diverges_are_sound(
    lab: Lab, spec: RunGroupConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those after it are recorded as diverged, as the run alone would be."""
    _poison(monkeypatch, 7)
    trunks = lab.trunks(spec)
    assert trunks[0]["status"] == "diverged"
    ended = {duration: lab.branches(spec, duration, trunks)[0] for duration in DURATIONS}
    assert [record["status"] for record in ended.values()] == ["ok", "ok", "diverged"]
    (expected,) = lab.alone(spec, 4.0)
    for key in ("losses", "evaluations", "steps", "status"):
        assert ended[4.0][key] == expected[key], key
    course = trajectory_of([ended[duration] for duration in DURATIONS], 0.1)
    assert course.diverged
    assert [point.step for point in course.evaluations] == [0, 2, 6]
    assert course.run_at(None).endswith("duration2")


def test_one_more_duration_trains_one_more_branch(lab: Lab, spec: RunGroupConfig) -> None:
    """The trunk stays; the new branch starts at the last state that is still there."""
    trunks = lab.trunks(spec)
    lab.branches(spec, 0.75, trunks)
    wider = spec.model_copy(
        update={"training": TRAINING.model_copy(update={"durations": [0.75, 3.0, 2.0, 4.0]})}
    )
    lab.told.clear()
    assert lab.trunks(wider) == trunks
    (branch,) = lab.branches(wider, 3.0, trunks)
    assert {step for _, step in lab.told} == {6, 7, 8, 9}
    _assert_same(branch, lab.alone(wider, 3.0)[0])
    longer = spec.model_copy(
        update={"training": TRAINING.model_copy(update={"epochs": 5.0, "durations": [0.75, 5.0]})}
    )
    assert run_key(longer, HIGH, INPUTS) != run_key(spec, HIGH, INPUTS)


def test_a_trunk_is_not_taken_for_the_run_without_durations(spec: RunGroupConfig) -> None:
    """It ends before the cooldown; without `durations` in the study the run is another."""
    without = spec.model_copy(update={"training": TRAINING.model_copy(update={"durations": []})})
    assert run_key(without, HIGH, INPUTS) != run_key(spec, HIGH, INPUTS)


# --- what lies on the disk ----------------------------------------------------------------------


def test_starts_stay_until_their_branches_are_done(lab: Lab, spec: RunGroupConfig) -> None:
    trunks = lab.trunks(spec)
    assert lab.starts() == ["step-0000001", "step-0000005", "step-0000010"]
    lab.branches(spec, 2.0, trunks)
    assert lab.starts() == ["step-0000001", "step-0000010"]
    lab.branches(spec, 4.0, trunks)
    lab.branches(spec, 0.75, trunks)
    assert lab.starts() == []
    assert not list(lab.state.rglob("optimizer.safetensors"))
    kept = [path.parent.name for path in lab.state.rglob("*model.safetensors")]
    assert sorted(kept) == ["step-0000002", "step-0000006", "step-0000012"]


def test_a_finished_branch_trains_nothing_again(lab: Lab, spec: RunGroupConfig) -> None:
    trunks = lab.trunks(spec)
    done = {duration: lab.branches(spec, duration, trunks) for duration in DURATIONS}
    lab.told.clear()
    assert lab.trunks(spec) == trunks
    assert {duration: lab.branches(spec, duration, trunks) for duration in DURATIONS} == done
    assert lab.told == []


def test_a_file_system_without_links_is_served_by_copies(
    lab: Lab, spec: RunGroupConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    _assert_same(lab.branches(spec, 2.0)[0], lab.alone(spec, 2.0)[0])


def test_items_of_a_branch_begin_with_the_trunks(lab: Lab, spec: RunGroupConfig) -> None:
    """A branch is a whole run to whoever reads the tables."""
    (branch,) = lab.branches(spec, 2.0)
    items, _ = run_group_items([branch])
    assert list(items["step"].unique()) == [1, 2, 3, 4, 5, 6]
    assert set(items["run"]) == {branch["run"]}


# --- killed and started again -------------------------------------------------------------------


def _ends_whatever_kills_it(
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
    (train_module, "_train_step", 6),
    (train_module, "write_table", 2),
    (train_module, "write_checkpoint", 6),
    (checkpoints, "save_checkpoint", 3),
    (checkpoints, "save_tensors", 3),
    (checkpoints, "write_json", 6),
    (Path, "rename", 1),
    (Path, "rename", 3),
    (run_group_module, "write_json", 1),
]


@BEFORE_AND_AFTER
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_killed_trunk_stores_the_same_starts(
    lab: Lab,
    spec: RunGroupConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: str,
    after: bool,
) -> None:
    """In a step, an evaluation, or while a start is written: the same bytes in every start."""
    if kind == "full":
        spec = spec.model_copy(update={"method": FULL})
    rarely = EvaluationConfig(max_new_tokens=2, every_epochs=1.0)
    spec = spec.model_copy(update={"evaluation": rarely})
    whole = Lab(lab.context, tmp_path / "whole")
    (expected,) = whole.trunks(spec)

    def begin() -> None:
        shutil.rmtree(lab.state, ignore_errors=True)

    def end() -> None:
        (trunk,) = lab.trunks(spec)
        assert (trunk["losses"], trunk["evaluations"]) == (
            expected["losses"],
            expected["evaluations"],
        )
        assert lab.starts() == whole.starts()
        for file in Path(expected["folder"], "starts").rglob("*.safetensors"):
            ours = Path(trunk["folder"]) / file.relative_to(expected["folder"])
            assert ours.read_bytes() == file.read_bytes()

    _ends_whatever_kills_it(monkeypatch, TRUNK_MOMENTS, begin, end, after)


def test_a_killed_trunk_goes_on_from_a_start(
    lab: Lab, spec: RunGroupConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where evaluations are rare, less is lost."""
    rarely = EvaluationConfig(max_new_tokens=2, every_epochs=9.0)
    spec = spec.model_copy(update={"evaluation": rarely})
    with monkeypatch.context() as patch:
        kill_at(patch, train_module, "_train_step", 8, after=False)
        with pytest.raises(Killed):
            lab.trunks(spec)
    assert lab.told[-1][1] == 7
    lab.told.clear()
    lab.trunks(spec)
    assert [step for _, step in lab.told] == [6, 7, 8, 9, 10]


BRANCH_MOMENTS = [
    (shutil, "copytree", 1),
    (module, "link_or_copy", 1),
    (module, "rename_synced", 1),
    (Path, "rename", 1),
    (Path, "rename", 2),
    (train_module, "_train_step", 1),
    (train_module, "_train_step", 2),
    (train_module, "write_table", 1),
    (checkpoints, "save_tensors", 1),
    (train_module, "prune_checkpoints", 2),
    (run_group_module, "write_json", 1),
    (module, "_forget_trunk", 1),
    (Path, "unlink", 1),
    (shutil, "rmtree", 3),
]


@BEFORE_AND_AFTER
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_killed_branch_ends_like_one_that_was_not(
    lab: Lab,
    spec: RunGroupConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: str,
    after: bool,
) -> None:
    """While the trunk's state is taken over, in the cooldown, at its end, and as starts go."""
    if kind == "full":
        spec = spec.model_copy(update={"method": FULL})
    trunks = lab.trunks(spec)
    (expected,) = lab.alone(spec, 4.0)
    shutil.copytree(lab.state, tmp_path / "trunks")

    def begin() -> None:
        shutil.rmtree(lab.state)
        shutil.copytree(tmp_path / "trunks", lab.state)

    def end() -> None:
        (branch,) = lab.branches(spec, 4.0, trunks)
        _assert_same(branch, expected)
        assert lab.starts() == ["step-0000001", "step-0000005"]

    _ends_whatever_kills_it(monkeypatch, BRANCH_MOMENTS, begin, end, after)


def test_a_half_removed_start_is_not_taken_over(
    lab: Lab, spec: RunGroupConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while a state goes that nobody needs any more; then comes a duration that would."""
    trunks = lab.trunks(spec)
    original = shutil.rmtree

    def deadly(path: Any, *more: Any, **options: Any) -> None:
        if Path(path).parent.name == "starts" and Path(path).exists():
            next(Path(path).glob("*model.safetensors")).unlink()
            raise Killed
        original(path, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", deadly)
        with pytest.raises(Killed):
            lab.branches(spec, 4.0, trunks)
    wider = spec.model_copy(
        update={"training": TRAINING.model_copy(update={"durations": [*DURATIONS, 3.9]})}
    )
    _assert_same(lab.branches(wider, 3.9, trunks)[0], lab.alone(wider, 3.9)[0])


def test_memory_that_ran_out_in_the_trunk_is_remembered(
    lab: Lab, spec: RunGroupConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch does not try again what did not fit; alone it would have ended the same."""
    original, seen = train_step.target_logits, []

    def narrow(model: Any, batch: Any) -> torch.Tensor:
        seen.append(examples_in(batch))
        if seen[-1] > 1:
            raise torch.OutOfMemoryError("out of memory")
        return original(model, batch)

    monkeypatch.setattr(train_step, "target_logits", narrow)
    lab.context = replace(lab.context, train=lab.context.train[:4])
    trunks = lab.trunks(spec)
    seen.clear()
    lab.branches(spec, 4.0, trunks)
    assert set(seen) == {1}
