"""A run group trains what is not there yet, each run as if alone, whatever became of the others."""

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
from forgetting.config.evaluation import EvaluationConfig
from forgetting.config.expand import Method, RunGroupConfig
from forgetting.config.methods import Hyperparameters
from forgetting.config.selection import SelectionConfig
from forgetting.config.training import TrainingConfig
from forgetting.errors import InputError
from forgetting.models.adapters import attach_adapter
from forgetting.models.loading import load_base
from forgetting.training import run_group as module
from forgetting.training.run_group import RunContext, run_group_items, run_key, train_run_group
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
def spec(tuning: Method) -> RunGroupConfig:
    """Two learning rates for two epochs of two steps, one after the other."""
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


def _with(spec: RunGroupConfig, *settings: Hyperparameters, **changes: Any) -> RunGroupConfig:
    tuning = spec.method.model_copy(update={"hyperparameters": list(settings)} if settings else {})
    return spec.model_copy(update={"method": tuning, **changes})


class Trainer:
    """Train run groups in one folder and note which runs were trained."""

    def __init__(self, context: RunContext, state: Path) -> None:
        self.context, self.state, self.told = context, state, []

    def __call__(self, spec: RunGroupConfig, **inputs: str) -> list[dict[str, Any]]:
        self.told: list[str] = []
        return train_run_group(
            [spec],
            self.context,
            INPUTS | inputs,
            self.state,
            lambda run, *_: self.told.append(run),
        )

    @property
    def trained(self) -> list[str]:
        """Names of the runs that made a step, in order."""
        return list(dict.fromkeys(self.told))

    def files(self) -> dict[str, int]:
        """Every file with the time of its last change."""
        paths = [path for path in self.state.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.state)): path.stat().st_mtime_ns for path in paths}


@pytest.fixture
def train(context: RunContext, tmp_path: Path) -> Trainer:
    return Trainer(context, tmp_path / "state")


def _weights(record: dict[str, Any], step: int = 4) -> dict[str, torch.Tensor]:
    (file,) = Path(record["folder"], f"step-{step:07d}").glob("*model.safetensors")
    return load_file(file)


def _equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    ours, theirs = _weights(first), _weights(second)
    same = all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    return (
        same
        and first["losses"] == second["losses"]
        and first["evaluations"] == second["evaluations"]
    )


def test_a_finished_run_group_trains_nothing_again(train: Trainer, spec: RunGroupConfig) -> None:
    records = train(spec)
    assert train.trained == ["lora-r4/seed0/lr0.001-wd0", "lora-r4/seed0/lr0.005-wd0"]
    before = train.files()
    assert train(spec) == records
    assert train.trained == []
    assert train.files() == before


def test_one_more_learning_rate_trains_one_more_run(train: Trainer, spec: RunGroupConfig) -> None:
    """Not a byte of the others is touched; the records come in the order of the sweep."""
    first = train(spec)
    before = train.files()
    records = train(_with(spec, HIGH, LOW, MIDDLE))
    assert train.trained == ["lora-r4/seed0/lr0.01-wd0"]
    assert records[1:] == first
    after = train.files()
    assert {name: after[name] for name in before} == before
    fewer = train(_with(spec, MIDDLE))
    assert train.trained == []
    assert fewer == [first[1]]


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: (_with(spec, training=spec.training.model_copy(update={"epochs": 1.0})), {}),
        lambda spec: (_with(spec, evaluation=EvaluationConfig(max_new_tokens=5)), {}),
        lambda spec: (_with(spec, prompt=PromptConfig(question="Q: {question}\n")), {}),
        lambda spec: (_with(spec, selection=SelectionConfig(probe="new", threshold=0.5)), {}),
        lambda spec: (_with(spec, method=spec.method.model_copy(update={"alpha": 9.0})), {}),
        lambda spec: (spec, {"train": "other rows"}),
        lambda spec: (spec, {"probe new": "other questions"}),
        lambda spec: (spec, {"base": "another model"}),
        lambda spec: (spec, {"versions": "train 2"}),
        lambda spec: (spec, {"precision": "torch.bfloat16"}),
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
def test_what_a_run_depends_on_makes_another_run(
    spec: RunGroupConfig, change: Callable[[RunGroupConfig], tuple[RunGroupConfig, dict[str, str]]]
) -> None:
    other, inputs = change(spec)
    assert run_key(other, LOW, INPUTS | inputs) != run_key(spec, LOW, INPUTS)


def test_seed_and_setting_make_another_run(spec: RunGroupConfig) -> None:
    keys = [
        run_key(_with(spec, seed=seed), setting, INPUTS)
        for seed in (0, 1)
        for setting in (LOW, MIDDLE, Hyperparameters(learning_rate=1e-3, weight_decay=0.1))
    ]
    assert len(set(keys)) == 6


def test_what_a_run_does_not_depend_on_does_not_retrain_it(spec: RunGroupConfig) -> None:
    """Other settings of the sweep, names for the report, and how runs are compared afterwards."""
    key = run_key(spec, LOW, INPUTS)
    compared = SelectionConfig(probe="new", hyperparameters="smallest-lr", if_not_reached="last")
    assert run_key(_with(spec, LOW, HIGH), LOW, INPUTS) == key
    assert run_key(_with(spec, selection=compared), LOW, INPUTS) == key
    renamed = spec.method.model_copy(update={"label": "rank four", "selected_hyperparameters": LOW})
    assert run_key(_with(spec, method=renamed), LOW, INPUTS) == key


def test_a_raised_version_retrains_and_keeps_what_was_finished(
    train: Trainer, spec: RunGroupConfig
) -> None:
    (old,) = train(_with(spec, LOW))
    (new,) = train(_with(spec, LOW), versions="train 2")
    assert train.trained == ["lora-r4/seed0/lr0.001-wd0"]
    assert old["folder"] != new["folder"]
    assert new["losses"] == old["losses"]
    assert train(_with(spec, LOW)) == [old]
    assert train.trained == []


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_is_the_same_alone_and_after_others(
    train: Trainer, spec: RunGroupConfig, tmp_path: Path, kind: str
) -> None:
    """The base is shared: what one run does to it must not reach the next."""
    if kind == "full":
        full = Method(name="full", kind="full", label="full", hyperparameters=[])
        spec = _with(spec, method=full)
    together = train(_with(spec, HIGH, LOW, MIDDLE))
    alone = Trainer(train.context, tmp_path / "alone")
    for record, setting in zip(together, (HIGH, LOW, MIDDLE), strict=True):
        assert _equal(record, alone(_with(spec, setting))[0])
    assert not _equal(together[0], together[1])


def test_a_sweep_starts_every_rate_from_the_same_adapter(base_folder: Path, tuning: Method) -> None:
    """The random half of an adapter is the seed's, whatever was drawn before."""
    drawn = []
    for seed in (0, 0, 1):
        torch.rand(7)
        model = attach_adapter(load_base(base_folder, torch.device("cpu")), tuning, seed)
        drawn.append(next(p for n, p in model.named_parameters() if "lora_A" in n).clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("steps", [4, 500])
def test_a_warm_up_that_a_run_does_not_outlast_is_refused(
    train: Trainer, spec: RunGroupConfig, steps: int
) -> None:
    """Where the rows were not here to be counted, and before anything is trained."""
    long = spec.training.model_copy(update={"warmup_epochs": None, "warmup_steps": steps})
    told = rf"training\.warmup_steps: {steps} steps of warm-up .* has 4 \(2 epochs of 8 examples"
    with pytest.raises(InputError, match=told):
        train(_with(spec, training=long))
    assert train.told == []
    assert not list(train.state.glob("**/step-*"))
    just = long.model_copy(update={"warmup_steps": 3})
    assert train(_with(spec, training=just))[0]["steps"] == 4


def test_a_run_group_killed_in_its_second_run_keeps_the_first(
    train: Trainer, spec: RunGroupConfig, tmp_path: Path
) -> None:
    def stop(run: str, progress: Any, schedule: Any) -> None:
        if "lr0.005" in run and progress.step == 3:
            raise Killed

    with pytest.raises(Killed):
        train_run_group([spec], train.context, INPUTS, train.state, stop)
    records = train(spec)
    assert train.told == ["lora-r4/seed0/lr0.005-wd0"] * 2
    whole = Trainer(train.context, tmp_path / "whole")(spec)
    assert all(_equal(ours, theirs) for ours, theirs in zip(records, whole, strict=True))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_killed_just_before_its_record_is_written_goes_on(
    train: Trainer, spec: RunGroupConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As by a full disk at the very end: started again, the run ends; it is not broken for good."""
    spec = _with(spec, LOW)
    if kind == "full":
        spec = _with(
            spec, method=Method(name="full", kind="full", label="full", hyperparameters=[LOW])
        )
    with monkeypatch.context() as patch:

        def no_space(*_: Any) -> None:
            raise OSError("No space left on device")

        patch.setattr(module, "write_json", no_space)
        with pytest.raises(OSError, match="No space"):
            train(spec)
    (record,) = train(spec)
    (whole,) = Trainer(train.context, tmp_path / "whole")(spec)
    assert _equal(record, whole)
    assert record["steps"] == whole["steps"] == 4


def test_training_state_is_gone_once_a_run_is_finished(
    train: Trainer, spec: RunGroupConfig
) -> None:
    """Moments of the optimizer are twice the weights; nothing needs them after the end."""
    train(spec)
    assert not [name for name in train.files() if "optimizer" in name]
    assert [name for name in train.files() if name.endswith("adapter_model.safetensors")]


def test_a_diverging_run_is_recorded_and_the_next_is_trained(
    train: Trainer, spec: RunGroupConfig
) -> None:
    """Rates a sweep may well try: whatever comes of them, the other runs of the run group "
    "end well."""
    wild = [Hyperparameters(learning_rate=rate) for rate in (1e2, 1e6, 1e18)]
    endless = spec.training.model_copy(update={"epochs": 4.0, "max_grad_norm": None})
    full = Method(name="full", kind="full", label="full", hyperparameters=[*wild, LOW])
    records = train(_with(spec, method=full, training=endless))
    assert records[-1]["status"] == "ok"
    assert records[-2]["status"] == "diverged"
    assert records[-2]["steps"] == len(records[-2]["losses"]) < records[-1]["steps"]
    items, _ = run_group_items(records)
    assert set(items[items["run"] == records[-1]["run"]]["step"]) == {2, 4, 6, 8}


def test_items_of_all_runs_come_with_run_step_and_epoch(
    train: Trainer, spec: RunGroupConfig
) -> None:
    records = train(spec)
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


def test_a_record_tells_what_was_trained_and_what_it_cost(
    train: Trainer, spec: RunGroupConfig, context: RunContext
) -> None:
    (record,) = train(_with(spec, LOW))
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


def test_an_answer_that_is_cut_away_is_told_by_key_and_row(
    train: Trainer, spec: RunGroupConfig
) -> None:
    short = spec.training.model_copy(update={"max_length": 8})
    with pytest.raises(InputError) as error:
        train(_with(spec, training=short))
    assert "training.max_length: 8 tokens leave nothing of the answer in made/0" in str(error.value)
    assert not [name for name in train.files() if name.endswith(".parquet")]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank": 17}, "lora-r4: rank: rank 17 is larger than the smallest"),
        ({"target_modules": ["query"]}, "lora-r4: target_modules: "),
    ],
)
def test_an_adapter_that_does_not_fit_is_told_by_method(
    train: Trainer, spec: RunGroupConfig, changes: dict[str, Any], told: str
) -> None:
    """A hub model's shapes are known only here: keys and values of this one have rank 16."""
    with pytest.raises(InputError, match="methods: ") as error:
        train(_with(spec, method=spec.method.model_copy(update=changes)))
    assert told in str(error.value)


def test_the_largest_rank_that_fits_is_trained(train: Trainer, spec: RunGroupConfig) -> None:
    tuning = spec.method.model_copy(update={"rank": 16, "hyperparameters": [LOW]})
    assert train(_with(spec, method=tuning))[0]["status"] == "ok"


def test_bfloat16_trains_and_keeps_float32_weights(train: Trainer, spec: RunGroupConfig) -> None:
    train.context = replace(train.context, precision=torch.bfloat16)
    (record,) = train(_with(spec, LOW))
    assert record["precision"] == "bfloat16"
    assert {tensor.dtype for tensor in _weights(record).values()} == {torch.float32}
