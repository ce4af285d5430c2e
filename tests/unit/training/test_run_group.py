"""A run group trains the runs that are missing, and no run depends on the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig, SelectionConfig
from forgetting.config.expand import Method, RunGroupConfig
from forgetting.config.methods import Hyperparameters
from forgetting.errors import InputError
from forgetting.models.adapters import attach_adapter
from forgetting.models.loading import load_base
from forgetting.training.training_job import run_group_items, run_key
from support.run_groups import (
    RunGroupHarness,
    are_equal,
    changed,
    checkpoint_weights,
    run_context,
    run_group_config,
)
from support.training import FULL, TrainingHarness

pytestmark = pytest.mark.usefixtures("one_thread")

Rows = list[dict[str, Any]]
INPUTS = {"base": "b", "train": "t", "precision": "torch.float32", "versions": "c"}
INPUTS |= {"probe new": "p"}
LOW, MIDDLE, HIGH = (Hyperparameters(learning_rate=rate) for rate in (1e-3, 5e-3, 1e-2))


@pytest.fixture
def config(tuning: Method) -> RunGroupConfig:
    """Two learning rates for two epochs of two steps, one run after the other."""
    return run_group_config(tuning, [LOW, MIDDLE], "never")


@pytest.fixture
def train(harness: TrainingHarness, tmp_path: Path) -> RunGroupHarness:
    """Eight rows to learn, and two probes."""
    rows = harness.rows
    context = run_context(
        harness.base, harness.tokenizer, rows, probes={"new": rows[:2], "old": rows[8:]}
    )
    return RunGroupHarness(context, tmp_path / "state", INPUTS)


def test_a_finished_run_group_trains_nothing(
    train: RunGroupHarness, config: RunGroupConfig
) -> None:
    records = train(config)
    assert train.trained == ["lora-r4/seed0/lr0.001-wd0", "lora-r4/seed0/lr0.005-wd0"]
    before = train.files()
    assert train(config) == records
    assert train.trained == []
    assert train.files() == before


def test_one_more_learning_rate_trains_one_more_run(
    train: RunGroupHarness, config: RunGroupConfig
) -> None:
    """The files of the other runs stay; the records come in the order of the sweep."""
    first = train(config)
    before = train.files()
    records = train(changed(config, HIGH, LOW, MIDDLE))
    assert train.trained == ["lora-r4/seed0/lr0.01-wd0"]
    assert records[1:] == first
    after = train.files()
    assert {name: after[name] for name in before} == before
    fewer = train(changed(config, MIDDLE))
    assert train.trained == []
    assert fewer == [first[1]]


@pytest.mark.parametrize(
    "change",
    [
        lambda config: (
            changed(config, training=config.training.model_copy(update={"epochs": 1.0})),
            {},
        ),
        lambda config: (changed(config, evaluation=EvaluationConfig(max_new_tokens=5)), {}),
        lambda config: (changed(config, prompt=PromptConfig(question="Q: {question}\n")), {}),
        lambda config: (
            changed(config, selection=SelectionConfig(probe="new", threshold=0.5)),
            {},
        ),
        lambda config: (
            changed(config, method=config.method.model_copy(update={"alpha": 9.0})),
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
        run_key(changed(config, seed=seed), setting, INPUTS)
        for seed in (0, 1)
        for setting in (LOW, MIDDLE, Hyperparameters(learning_rate=1e-3, weight_decay=0.1))
    ]
    assert len(set(keys)) == 6


def test_run_key_ignores_what_changes_no_run(config: RunGroupConfig) -> None:
    """The rest of the sweep, names for the report, and how runs are compared."""
    key = run_key(config, LOW, INPUTS)
    compared = SelectionConfig(probe="new", hyperparameters="smallest-lr", if_not_reached="last")
    assert run_key(changed(config, LOW, HIGH), LOW, INPUTS) == key
    assert run_key(changed(config, selection=compared), LOW, INPUTS) == key
    renamed = config.method.model_copy(
        update={"label": "rank four", "selected_hyperparameters": LOW}
    )
    assert run_key(changed(config, method=renamed), LOW, INPUTS) == key


def test_a_raised_version_retrains_and_keeps_old_runs(
    train: RunGroupHarness, config: RunGroupConfig
) -> None:
    (old,) = train(changed(config, LOW))
    (new,) = train(changed(config, LOW), versions="train 2")
    assert train.trained == ["lora-r4/seed0/lr0.001-wd0"]
    assert old["folder"] != new["folder"]
    assert new["losses"] == old["losses"]
    assert train(changed(config, LOW)) == [old]
    assert train.trained == []


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_does_not_depend_on_earlier_runs(
    train: RunGroupHarness, config: RunGroupConfig, tmp_path: Path, kind: str
) -> None:
    """What one run does to the base must not reach the next."""
    if kind == "full":
        full = FULL
        config = changed(config, method=full)
    records = train(changed(config, HIGH, LOW, MIDDLE))
    single = RunGroupHarness(train.context, tmp_path / "single")
    for record, setting in zip(records, (HIGH, LOW, MIDDLE), strict=True):
        assert are_equal(record, single(changed(config, setting))[0])
    assert not are_equal(records[0], records[1])


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
    train: RunGroupHarness, config: RunGroupConfig, steps: int
) -> None:
    """The rows are counted in the job only; the error comes before any training."""
    long = config.training.model_copy(update={"warmup_epochs": None, "warmup_steps": steps})
    message = rf"training\.warmup_steps: {steps} steps of warm-up .* has 4 \(2 epochs of 8 examples"
    with pytest.raises(InputError, match=message):
        train(changed(config, training=long))
    assert train.logged == []
    assert not list(train.state.glob("**/step-*"))
    just = long.model_copy(update={"warmup_steps": 3})
    assert train(changed(config, training=just))[0]["steps"] == 4


def test_training_state_of_a_finished_run_is_removed(
    train: RunGroupHarness, config: RunGroupConfig
) -> None:
    """The moments take twice the bytes of the weights, and nothing needs them after the end."""
    train(config)
    assert not [name for name in train.files() if "optimizer" in name]
    assert [name for name in train.files() if name.endswith("adapter_model.safetensors")]


def test_a_diverging_run_does_not_stop_the_others(
    train: RunGroupHarness, config: RunGroupConfig
) -> None:
    """A sweep may contain rates that are far too high."""
    wild = [Hyperparameters(learning_rate=rate) for rate in (1e2, 1e6, 1e18)]
    endless = config.training.model_copy(update={"epochs": 4.0, "max_grad_norm": None})
    full = Method(name="full", kind="full", label="full", hyperparameters=[*wild, LOW])
    records = train(changed(config, method=full, training=endless))
    assert records[-1]["status"] == "ok"
    assert records[-2]["status"] == "diverged"
    assert records[-2]["steps"] == len(records[-2]["losses"]) < records[-1]["steps"]
    items, _ = run_group_items(records)
    assert set(items[items["run"] == records[-1]["run"]]["step"]) == {2, 4, 6, 8}


def test_run_group_items_have_run_step_and_epoch(
    train: RunGroupHarness, config: RunGroupConfig
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


def test_run_record_has_training_and_cost(train: RunGroupHarness, config: RunGroupConfig) -> None:
    (record,) = train(changed(config, LOW))
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
    train: RunGroupHarness, config: RunGroupConfig
) -> None:
    short = config.training.model_copy(update={"max_length": 8})
    with pytest.raises(InputError) as error:
        train(changed(config, training=short))
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
    train: RunGroupHarness, config: RunGroupConfig, changes: dict[str, Any], message: str
) -> None:
    """The shapes of a hub model are known in the job only; keys and values here have rank 16."""
    with pytest.raises(InputError, match="methods: ") as error:
        train(changed(config, method=config.method.model_copy(update=changes)))
    assert message in str(error.value)


def test_the_largest_rank_that_fits_is_trained(
    train: RunGroupHarness, config: RunGroupConfig
) -> None:
    method = config.method.model_copy(update={"rank": 16, "hyperparameters": [LOW]})
    assert train(changed(config, method=method))[0]["status"] == "ok"


def test_bfloat16_trains_and_keeps_float32_weights(
    train: RunGroupHarness, config: RunGroupConfig
) -> None:
    train.context = replace(train.context, precision=torch.bfloat16)
    (record,) = train(changed(config, LOW))
    assert record["precision"] == "bfloat16"
    assert {tensor.dtype for tensor in checkpoint_weights(record).values()} == {torch.float32}
