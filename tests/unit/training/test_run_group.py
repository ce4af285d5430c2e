"""A run group trains the runs that are missing, and no run depends on the others."""

from __future__ import annotations

from collections.abc import Callable
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
from forgetting.config.expand import Method, RunGroupConfig
from forgetting.config.methods import Hyperparameters
from forgetting.config.training import TrainingConfig
from forgetting.errors import InputError
from forgetting.models.adapters import attach_adapter
from forgetting.models.loading import load_base
from forgetting.training import run_group as module
from forgetting.training.run_group import train_run_group
from forgetting.training.training_job import RunContext, TrainingJob, run_group_items, run_key
from support.kill import Killed

pytestmark = pytest.mark.usefixtures("one_thread")

Rows = list[dict[str, Any]]
INPUTS = {"base": "b", "train": "t", "precision": "torch.float32", "versions": "c"}
INPUTS |= {"probe new": "p"}
LOW, MIDDLE, HIGH = (Hyperparameters(learning_rate=rate) for rate in (1e-3, 5e-3, 1e-2))


@pytest.fixture
def context(base_folder: Path, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> RunContext:
    """The tiny base, eight rows to learn, and two probes."""
    return RunContext(
        base=base_folder,
        tokenizer=tokenizer,
        train=rows[:8],
        probes={"new": rows[:2], "old": rows[8:]},
        base_value=0.1,
        device=torch.device("cpu"),
        precision=torch.float32,
    )


@pytest.fixture
def config(tuning: Method) -> RunGroupConfig:
    """Two learning rates for two epochs of two steps, one run after the other."""
    return RunGroupConfig(
        method=tuning.model_copy(update={"hyperparameters": [LOW, MIDDLE]}),
        seed=0,
        prompt=PromptConfig(),
        training=TrainingConfig(epochs=2.0, batch_size=4, warmup_epochs=0.0, batched_lora="never"),
        evaluation=EvaluationConfig(max_new_tokens=4),
        selection=SelectionConfig(probe="new"),
        precision="float32",
        knowledge={"new": "new", "old": "old"},
    )


def _changed(config: RunGroupConfig, *settings: Hyperparameters, **changes: Any) -> RunGroupConfig:
    method = config.method.model_copy(
        update={"hyperparameters": list(settings)} if settings else {}
    )
    return config.model_copy(update={"method": method, **changes})


class GroupTrainer:
    """Train run groups in one folder and note which runs were trained."""

    def __init__(self, context: RunContext, state: Path) -> None:
        self.context, self.state, self.logged = context, state, []

    def __call__(self, config: RunGroupConfig, **inputs: str) -> list[dict[str, Any]]:
        self.logged: list[str] = []
        return train_run_group(
            TrainingJob(
                config,
                self.context,
                INPUTS | inputs,
                self.state,
                lambda run, *_: self.logged.append(run),
            )
        )

    @property
    def trained(self) -> list[str]:
        """Return the names of the runs that made a step, in order."""
        return list(dict.fromkeys(self.logged))

    def files(self) -> dict[str, int]:
        """Return every file with the time of its last change."""
        paths = [path for path in self.state.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.state)): path.stat().st_mtime_ns for path in paths}


@pytest.fixture
def train(context: RunContext, tmp_path: Path) -> GroupTrainer:
    return GroupTrainer(context, tmp_path / "state")


def _weights(record: dict[str, Any], step: int = 4) -> dict[str, torch.Tensor]:
    (file,) = Path(record["folder"], f"step-{step:07d}").glob("*model.safetensors")
    return load_file(file)


def _are_equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    ours, theirs = _weights(first), _weights(second)
    same = all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    return (
        same
        and first["losses"] == second["losses"]
        and first["evaluations"] == second["evaluations"]
    )


def test_a_finished_run_group_trains_nothing(train: GroupTrainer, config: RunGroupConfig) -> None:
    records = train(config)
    assert train.trained == ["lora-r4/seed0/lr0.001-wd0", "lora-r4/seed0/lr0.005-wd0"]
    before = train.files()
    assert train(config) == records
    assert train.trained == []
    assert train.files() == before


def test_one_more_learning_rate_trains_one_more_run(
    train: GroupTrainer, config: RunGroupConfig
) -> None:
    """The files of the other runs stay; the records come in the order of the sweep."""
    first = train(config)
    before = train.files()
    records = train(_changed(config, HIGH, LOW, MIDDLE))
    assert train.trained == ["lora-r4/seed0/lr0.01-wd0"]
    assert records[1:] == first
    after = train.files()
    assert {name: after[name] for name in before} == before
    fewer = train(_changed(config, MIDDLE))
    assert train.trained == []
    assert fewer == [first[1]]


@pytest.mark.parametrize(
    "change",
    [
        lambda config: (
            _changed(config, training=config.training.model_copy(update={"epochs": 1.0})),
            {},
        ),
        lambda config: (_changed(config, evaluation=EvaluationConfig(max_new_tokens=5)), {}),
        lambda config: (_changed(config, prompt=PromptConfig(question="Q: {question}\n")), {}),
        lambda config: (
            _changed(config, selection=SelectionConfig(probe="new", threshold=0.5)),
            {},
        ),
        lambda config: (
            _changed(config, method=config.method.model_copy(update={"alpha": 9.0})),
            {},
        ),
        lambda config: (config, {"train": "other rows"}),
        lambda config: (config, {"probe new": "other questions"}),
        lambda config: (config, {"base": "another model"}),
        lambda config: (config, {"versions": "train 2"}),
        lambda config: (config, {"precision": "torch.bfloat16"}),
    ],
    ids=[
        "epochs",
        "evaluation",
        "prompt",
        "threshold",
        "alpha",
        "rows",
        "questions",
        "base",
        "versions",
        "precision",
    ],
)
def test_run_key_changes_with_what_a_run_depends_on(
    config: RunGroupConfig,
    change: Callable[[RunGroupConfig], tuple[RunGroupConfig, dict[str, str]]],
) -> None:
    other, inputs = change(config)
    assert run_key(other, LOW, INPUTS | inputs) != run_key(config, LOW, INPUTS)


def test_run_key_changes_with_seed_and_hyperparameters(config: RunGroupConfig) -> None:
    keys = [
        run_key(_changed(config, seed=seed), setting, INPUTS)
        for seed in (0, 1)
        for setting in (LOW, MIDDLE, Hyperparameters(learning_rate=1e-3, weight_decay=0.1))
    ]
    assert len(set(keys)) == 6


def test_run_key_ignores_what_changes_no_run(config: RunGroupConfig) -> None:
    """The rest of the sweep, names for the report, and how runs are compared."""
    key = run_key(config, LOW, INPUTS)
    compared = SelectionConfig(probe="new", hyperparameters="smallest-lr", if_not_reached="last")
    assert run_key(_changed(config, LOW, HIGH), LOW, INPUTS) == key
    assert run_key(_changed(config, selection=compared), LOW, INPUTS) == key
    renamed = config.method.model_copy(
        update={"label": "rank four", "selected_hyperparameters": LOW}
    )
    assert run_key(_changed(config, method=renamed), LOW, INPUTS) == key


def test_a_raised_version_retrains_and_keeps_old_runs(
    train: GroupTrainer, config: RunGroupConfig
) -> None:
    (old,) = train(_changed(config, LOW))
    (new,) = train(_changed(config, LOW), versions="train 2")
    assert train.trained == ["lora-r4/seed0/lr0.001-wd0"]
    assert old["folder"] != new["folder"]
    assert new["losses"] == old["losses"]
    assert train(_changed(config, LOW)) == [old]
    assert train.trained == []


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_does_not_depend_on_earlier_runs(
    train: GroupTrainer, config: RunGroupConfig, tmp_path: Path, kind: str
) -> None:
    """What one run does to the base must not reach the next."""
    if kind == "full":
        full = Method(name="full", kind="full", label="full", hyperparameters=[])
        config = _changed(config, method=full)
    records = train(_changed(config, HIGH, LOW, MIDDLE))
    single = GroupTrainer(train.context, tmp_path / "single")
    for record, setting in zip(records, (HIGH, LOW, MIDDLE), strict=True):
        assert _are_equal(record, single(_changed(config, setting))[0])
    assert not _are_equal(records[0], records[1])


def test_initial_adapter_depends_on_the_seed_only(base_folder: Path, tuning: Method) -> None:
    """Earlier random numbers do not change the random half of an adapter."""
    drawn = []
    for seed in (0, 0, 1):
        torch.rand(7)
        model = attach_adapter(load_base(base_folder, torch.device("cpu")), tuning, seed)
        drawn.append(next(p for n, p in model.named_parameters() if "lora_A" in n).clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("steps", [4, 500])
def test_a_warmup_as_long_as_the_run_is_refused(
    train: GroupTrainer, config: RunGroupConfig, steps: int
) -> None:
    """The rows are counted in the job only; the error comes before any training."""
    long = config.training.model_copy(update={"warmup_epochs": None, "warmup_steps": steps})
    message = rf"training\.warmup_steps: {steps} steps of warm-up .* has 4 \(2 epochs of 8 examples"
    with pytest.raises(InputError, match=message):
        train(_changed(config, training=long))
    assert train.logged == []
    assert not list(train.state.glob("**/step-*"))
    just = long.model_copy(update={"warmup_steps": 3})
    assert train(_changed(config, training=just))[0]["steps"] == 4


def test_a_kill_in_the_second_run_keeps_the_first(
    train: GroupTrainer, config: RunGroupConfig, tmp_path: Path
) -> None:
    def stop(run: str, progress: Any, schedule: Any) -> None:
        if "lr0.005" in run and progress.step == 3:
            raise Killed

    with pytest.raises(Killed):
        train_run_group(TrainingJob(config, train.context, INPUTS, train.state, stop))
    records = train(config)
    assert train.logged == ["lora-r4/seed0/lr0.005-wd0"] * 2
    whole = GroupTrainer(train.context, tmp_path / "whole")(config)
    assert all(_are_equal(ours, theirs) for ours, theirs in zip(records, whole, strict=True))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_killed_before_its_record_resumes(
    train: GroupTrainer,
    config: RunGroupConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """After a full disk at the very end, a restart finishes the run."""
    config = _changed(config, LOW)
    if kind == "full":
        config = _changed(
            config, method=Method(name="full", kind="full", label="full", hyperparameters=[LOW])
        )
    with monkeypatch.context() as patch:

        def no_space(*_: Any) -> None:
            raise OSError("No space left on device")

        patch.setattr(module, "write_json", no_space)
        with pytest.raises(OSError, match="No space"):
            train(config)
    (record,) = train(config)
    (whole,) = GroupTrainer(train.context, tmp_path / "whole")(config)
    assert _are_equal(record, whole)
    assert record["steps"] == whole["steps"] == 4


def test_training_state_of_a_finished_run_is_removed(
    train: GroupTrainer, config: RunGroupConfig
) -> None:
    """The moments take twice the bytes of the weights, and nothing needs them after the end."""
    train(config)
    assert not [name for name in train.files() if "optimizer" in name]
    assert [name for name in train.files() if name.endswith("adapter_model.safetensors")]


def test_a_diverging_run_does_not_stop_the_others(
    train: GroupTrainer, config: RunGroupConfig
) -> None:
    """A sweep may contain rates that are far too high."""
    wild = [Hyperparameters(learning_rate=rate) for rate in (1e2, 1e6, 1e18)]
    endless = config.training.model_copy(update={"epochs": 4.0, "max_grad_norm": None})
    full = Method(name="full", kind="full", label="full", hyperparameters=[*wild, LOW])
    records = train(_changed(config, method=full, training=endless))
    assert records[-1]["status"] == "ok"
    assert records[-2]["status"] == "diverged"
    assert records[-2]["steps"] == len(records[-2]["losses"]) < records[-1]["steps"]
    items, _ = run_group_items(records)
    assert set(items[items["run"] == records[-1]["run"]]["step"]) == {2, 4, 6, 8}


def test_run_group_items_have_run_step_and_epoch(
    train: GroupTrainer, config: RunGroupConfig
) -> None:
    records = train(config)
    items, _ = run_group_items(records)
    assert list(items.columns[:4]) == ["run", "step", "epoch", "probe"]
    counts = items.groupby(["run", "step", "epoch"]).size()
    assert counts.to_dict() == {
        (record["run"], step, step / 2): 4 for record in records for step in (2, 4)
    }
    value = items[(items["run"] == records[0]["run"]) & (items["step"] == 4)]
    value = value[value["probe"] == "new"]["rougeL_recall"].mean()
    assert records[0]["evaluations"][-1] == [4, 2.0, value]
    assert run_group_items([])[0].empty
    without = [record | {"evaluations": []} for record in records]
    assert isinstance(run_group_items(without)[0], pd.DataFrame)


def test_run_record_has_training_and_cost(
    train: GroupTrainer, config: RunGroupConfig, context: RunContext
) -> None:
    (record,) = train(_changed(config, LOW))
    assert record["status"] == "ok"
    assert (record["steps"], record["steps_per_epoch"], len(record["losses"])) == (4, 2, 4)
    # Rank 4 on q, o (32x32), k, v (16x32), gate, up, down (64x32) of two layers.
    assert record["trainable_parameters"] == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
    assert record["tokens"] > 0
    assert 0 < record["training_seconds"] <= record["wall_seconds"]
    assert record["tokens_per_second"] == pytest.approx(
        record["tokens"] / record["training_seconds"]
    )
    assert record["peak_memory_gib"] > 0
    assert (record["precision"], record["hyperparameters"]["learning_rate"]) == ("float32", 1e-3)


def test_an_answer_cut_away_is_named_by_key_and_row(
    train: GroupTrainer, config: RunGroupConfig
) -> None:
    short = config.training.model_copy(update={"max_length": 8})
    with pytest.raises(InputError) as error:
        train(_changed(config, training=short))
    assert "training.max_length: 8 tokens leave nothing of the answer in made/0" in str(error.value)
    assert not [name for name in train.files() if name.endswith(".parquet")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 17}, "lora-r4: rank: rank 17 is larger than the smallest"),
        ({"target_modules": ["query"]}, "lora-r4: target_modules: "),
    ],
)
def test_an_adapter_that_does_not_fit_names_its_method(
    train: GroupTrainer, config: RunGroupConfig, changes: dict[str, Any], message: str
) -> None:
    """The shapes of a hub model are known in the job only; keys and values here have rank 16."""
    with pytest.raises(InputError, match="methods: ") as error:
        train(_changed(config, method=config.method.model_copy(update=changes)))
    assert message in str(error.value)


def test_the_largest_rank_that_fits_is_trained(train: GroupTrainer, config: RunGroupConfig) -> None:
    method = config.method.model_copy(update={"rank": 16, "hyperparameters": [LOW]})
    assert train(_changed(config, method=method))[0]["status"] == "ok"


def test_bfloat16_trains_and_keeps_float32_weights(
    train: GroupTrainer, config: RunGroupConfig
) -> None:
    train.context = replace(train.context, precision=torch.bfloat16)
    (record,) = train(_changed(config, LOW))
    assert record["precision"] == "bfloat16"
    assert {tensor.dtype for tensor in _weights(record).values()} == {torch.float32}
