"""Benchmarks at every evaluation of a training, from the run group to trajectory and churn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from forgetting.benchmarks.during_training import TrainingBenchmarks
from forgetting.benchmarks.evaluate import run_benchmarks
from forgetting.benchmarks.scores import BenchmarkResult
from forgetting.benchmarks.tasks import TaskSpec
from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import TaskConfig, TrainingBenchmarksConfig
from forgetting.config.expand import Method
from forgetting.config.methods import Hyperparameters
from forgetting.io import write_jsonl
from forgetting.models.loading import load_base
from forgetting.models.tuned import load_tuned, merged_adapter
from forgetting.results.churn import churn_table
from forgetting.results.trajectories import benchmark_trajectory_items, benchmark_trajectory_table
from forgetting.training.run_group import train_run_group
from forgetting.training.training_job import TrainingJob, run_group_items
from scripts import evaluate_base
from support.benchmark_rows import TASKS, sciq
from support.params import write_params
from support.run_groups import record_base, run_context, run_group_config

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture
def trained(
    tmp_path: Path,
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    tuning: Method,
) -> Any:
    """Return a function that trains four runs of an adapter and returns their records."""

    def train(
        folder: str,
        training_benchmarks: TrainingBenchmarks | None,
        batched_lora: str = "never",
        precision: str = "float32",
        rates: Sequence[float] = (1e-2, 2e-2, 3e-2, 4e-2),
        **method: Any,
    ) -> list[dict[str, Any]]:
        settings = [Hyperparameters(learning_rate=rate) for rate in rates]
        changes = {
            "precision": getattr(torch, precision),
            "training_benchmarks": training_benchmarks,
        }
        context = run_context(base_folder, tokenizer, rows, **changes)
        spec = run_group_config(tuning, settings, batched_lora, **method)
        spec = spec.model_copy(update={"precision": precision})
        inputs = {"base": "a", "train": "b", "versions": "c"}
        return train_run_group(
            TrainingJob(spec, context, inputs, tmp_path / folder, lambda *_: None)
        )

    return train


def _weights(record: dict[str, Any]) -> dict[str, torch.Tensor]:
    (file,) = Path(record["folder"], f"step-{record['steps']:07d}").glob("*model.safetensors")
    return load_file(file)


def _answers(result: BenchmarkResult) -> pd.DataFrame:
    main = result.scores[result.scores["main"].astype(bool)]
    items = result.items.merge(main[["task", "metric"]])
    return items.merge(result.responses[["task", "item", "response", "choice"]])


def test_training_benchmarks_do_not_change_training(
    trained: Any, training_benchmarks: TrainingBenchmarks
) -> None:
    """Weights, losses and evaluations are bit-identical, dropout included."""
    benchmarked, plain = trained("benchmarked", training_benchmarks), trained("plain", None)
    for one, other in zip(benchmarked, plain, strict=True):
        assert one["losses"] == other["losses"]
        assert one["evaluations"] == other["evaluations"]
        ours, theirs = _weights(one), _weights(other)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    items, benchmarks = run_group_items(benchmarked)
    plain_items, none = run_group_items(plain)
    pd.testing.assert_frame_equal(items, plain_items, check_dtype=False)
    assert len(benchmarks) == 4 * 2 * 8  # runs, evaluations, items
    assert none.empty


def test_training_benchmarks_equal_those_of_the_checkpoint(
    trained: Any,
    training_benchmarks: TrainingBenchmarks,
    folders: dict[str, Path],
    base_folder: Path,
) -> None:
    """Choices, generated answers and log-likelihoods equal those of a benchmark job."""
    record = trained("benchmarked", training_benchmarks)[1]
    _, found = run_group_items([record])
    found = found[found["step"] == record["steps"]]
    checkpoint = Path(record["folder"], f"step-{record['steps']:07d}")
    model = load_tuned(base_folder, checkpoint, CPU)
    specs = [TaskSpec.of(name, task) for name, task in TASKS.items()]
    with merged_adapter(model, torch.float32):
        expected = _answers(run_benchmarks(model, training_benchmarks.tokenizer, specs, folders, 4))
    columns = ["task", "item", "metric", "value", "response", "choice"]
    assert set(found[found["task"] == "sciq"]["choice"]) <= {0, 1, 2, 3}
    assert found[found["task"] == "gsm8k"]["choice"].isna().all()
    pd.testing.assert_frame_equal(
        found[columns].sort_values(["task", "item"], ignore_index=True),
        expected[columns].sort_values(["task", "item"], ignore_index=True),
    )


def test_training_benchmarks_of_batched_runs_equal_separate_runs(
    trained: Any, training_benchmarks: TrainingBenchmarks
) -> None:
    _, batched = run_group_items(trained("batched", training_benchmarks, batched_lora="auto"))
    _, separate = run_group_items(trained("separate", training_benchmarks))
    key = ["run", "step", "task", "item", "value"]
    pd.testing.assert_frame_equal(batched[key], separate[key])


FULL = {"name": "full", "kind": "full", "label": "full", "rank": None, "alpha": None}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", [{}, FULL], ids=["lora", "full"])
def test_churn_of_an_unchanged_model_is_zero(
    trained: Any,
    folders: dict[str, Path],
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    tmp_path: Path,
    precision: str,
    method: dict[str, Any],
) -> None:
    """At a learning rate that moves no weight, log-likelihoods equal the base's bit for bit.

    The program that evaluates the base uses the batches of the training.
    """
    many = sciq(40)
    for split in ("train", "validation", "test"):
        write_jsonl(folders["sciq"] / f"{split}.jsonl", many)
    tasks = {"sciq": TaskConfig(num_fewshot=1, limit=30), "gsm8k": TASKS["gsm8k"]}
    spec = TrainingBenchmarksConfig(tasks=tasks, batch_size=4)
    base_items = evaluate_base_benchmarks(
        tmp_path / "base", base_folder, rows, spec, folders, precision
    )
    assert len(base_items) == 33
    one = trained(
        "still",
        TrainingBenchmarks(spec, folders, tokenizer),
        precision=precision,
        rates=[1e-30],
        **method,
    )
    probes, found = run_group_items(one)
    items = benchmark_trajectory_items(base_items, found)
    for _, answers in items[items["run"] != "base"].groupby("step"):
        pd.testing.assert_frame_equal(
            answers[base_items.columns].reset_index(drop=True), base_items, check_dtype=False
        )
    none = pd.DataFrame()
    churn = churn_table(probes, none, none, items)
    assert set(churn["probe"]) == {"sciq", "gsm8k"}
    assert (churn["agreement"] == 1.0).all()
    assert (churn["gained"] + churn["lost"] == 0.0).all()


CHOICES = ("distractor1", "distractor2", "distractor3", "correct_answer")
"""The choices in the order of the task."""


def _with_answers(rows: list[dict[str, Any]], right: Sequence[str]) -> list[dict[str, Any]]:
    """Return the same questions and choices with other right answers."""
    found = []
    for row, answer in zip(rows, right, strict=True):
        wrong = [row[name] for name in CHOICES if row[name] != answer]
        found.append(row | dict(zip(CHOICES, [*wrong, answer], strict=True)))
    return found


def test_churn_measures_a_planted_forgetting(
    trained: Any,
    folders: dict[str, Path],
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    """A first training shows which answers change.

    The right answers are then chosen so that two thirds of the changed answers are lost and one
    third is gained.
    """
    words = [
        "red",
        "cold",
        "loud",
        "even",
        "warm",
        "old",
        "soft",
        "dark",
        "odd",
        "slow",
        "deep",
        "dry",
    ]
    questions = [
        row | {name: f"{words[(n * k) % 12]} {words[(n + 5 * k) % 12]}" for k, name in numbered}
        for n, row in enumerate(sciq(30))
        if (numbered := list(enumerate(CHOICES, start=1)))
    ]
    spec = TrainingBenchmarksConfig(
        tasks={"sciq": TaskConfig(num_fewshot=0, metric="acc_norm")}, batch_size=4
    )
    tasks = {"sciq": folders["sciq"]}

    def trajectory(name: str, of: list[dict[str, Any]]) -> tuple[pd.DataFrame, Any, Any]:
        for split in ("test", "validation"):
            write_jsonl(folders["sciq"] / f"{split}.jsonl", of)
        base = evaluate_base_benchmarks(tmp_path / name, base_folder, rows, spec, tasks, "float32")
        records = trained(name, TrainingBenchmarks(spec, tasks, tokenizer), rates=[0.3])
        probes, found = run_group_items(records)
        return benchmark_trajectory_items(base, found), probes, records

    def choices_at(items: pd.DataFrame, step: int) -> list[str]:
        at = items[items["step"] == step].sort_values("item")
        return [row[CHOICES[choice]] for row, choice in zip(questions, at["choice"], strict=True)]

    items, *_ = trajectory("before", questions)
    before, after = choices_at(items, 0), choices_at(items, 4)
    moved = [n for n, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
    gained, lost = moved[::3], [n for n in moved if n not in moved[::3]]
    assert len(lost) > len(gained) > 0
    right = [
        before[n]
        if n in lost
        else after[n]
        if n in gained
        else next(row[name] for name in CHOICES if row[name] not in (before[n], after[n]))
        for n, row in enumerate(questions)
    ]
    items, probes, records = trajectory("after", _with_answers(questions, right))
    none = pd.DataFrame()
    churn = churn_table(probes, none, none, items)
    (row,) = churn[(churn["probe"] == "sciq") & (churn["step"] == 4)].to_dict("records")
    assert row["base_value"] == pytest.approx(len(lost) / 30)
    assert row["value"] == pytest.approx(len(gained) / 30)
    assert row["lost"] == pytest.approx(len(lost) / 30)
    assert row["gained"] == pytest.approx(len(gained) / 30)
    assert row["agreement"] == pytest.approx(1 - len(moved) / 30)
    scores = pd.DataFrame([{"run": "base", "task": "sciq", "main": True, "chance": 0.25}])
    table = benchmark_trajectory_table(items, scores, records).set_index("step")
    fall = table.loc[4, "value"] - table.loc[0, "value"]
    assert fall == pytest.approx((len(gained) - len(lost)) / 30)
    assert fall < 0


def evaluate_base_benchmarks(
    folder: Path,
    base: Path,
    rows: list[dict[str, Any]],
    spec: TrainingBenchmarksConfig,
    tasks: Mapping[str, Path],
    precision: str,
) -> pd.DataFrame:
    """Return the items of benchmarks that the program writes for the base."""
    write_jsonl(folder / "probes" / "new.jsonl", rows[:2])
    record_base(folder / "base.json", base)
    study = {
        "prompt": PromptConfig().model_dump(),
        "evaluation": {"max_new_tokens": 8},
        "precision": precision,
        "knowledge": {"new": "new"},
        "watched": "new",
        "metric": "rougeL_recall",
        "must_reach": False,
        "general_text": None,
        "columns": {},
        "training_benchmarks": spec.model_dump(mode="json"),
        "benchmark_rows": {task: str(path) for task, path in tasks.items()},
    }
    options = {
        "params": write_params(folder, **study),
        "base": folder / "base.json",
        "probes": folder / "probes" / "new.jsonl",
        "output": folder / "items.parquet",
        "benchmarks": folder / "benchmarks.parquet",
    }
    evaluate_base.main([f"--{key}={value}" for key, value in options.items()])
    return pd.read_parquet(folder / "benchmarks.parquet")


def test_finished_run_group_is_not_evaluated_again(
    trained: Any, training_benchmarks: TrainingBenchmarks, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, before = run_group_items(trained("benchmarked", training_benchmarks))

    def refuse(self: TrainingBenchmarks, model: Any) -> pd.DataFrame:
        raise AssertionError("evaluated again")

    monkeypatch.setattr(TrainingBenchmarks, "__call__", refuse)
    _, after = run_group_items(trained("benchmarked", training_benchmarks))
    pd.testing.assert_frame_equal(before, after)


@pytest.fixture
def trajectory(trained: Any, training_benchmarks: TrainingBenchmarks, base_folder: Path) -> Any:
    """Return the trajectory of four runs, the base's scores on all items, and the records."""
    records = trained("benchmarked", training_benchmarks)
    model = load_base(base_folder, CPU)
    whole = [
        TaskSpec.of(name, task.model_copy(update={"limit": None})) for name, task in TASKS.items()
    ]
    result = run_benchmarks(
        model, training_benchmarks.tokenizer, whole, training_benchmarks.rows_dirs, 4
    )
    _, found = run_group_items(records)
    scores = result.scores.assign(run="base", step=0)
    return benchmark_trajectory_items(training_benchmarks(model), found), scores, records


def test_trajectory_starts_with_the_base_on_the_same_items(trajectory: Any) -> None:
    items, scores, records = trajectory
    table = benchmark_trajectory_table(items, scores, records)
    base = table[table["run"] == "base"].set_index("task")
    assert base["n"].to_dict() == {"sciq": 5, "gsm8k": 3}
    assert base["chance"].to_dict() == {"sciq": 0.25, "gsm8k": 0.0}
    assert (base["step"] == 0).all()
    last = table[(table["run"] == records[0]["run"]) & (table["task"] == "sciq")].iloc[-1]
    own = items[(items["run"] == records[0]["run"]) & (items["task"] == "sciq")]
    own = own[own["step"] == 4]
    assert last["value"] == own["value"].mean()
    assert last["tokens"] == records[0]["tokens"]
    assert last["low"] <= last["value"] <= last["high"]


def test_churn_combines_training_and_job_benchmarks(trajectory: Any) -> None:
    """An unchanged model has no churn; answers of a job have more items and their own rows."""
    items, _, records = trajectory
    base = items[items["run"] == "base"]
    run = records[0]["run"]
    untouched = base.assign(run=run, step=2, epoch=1.0)
    tuned = items[(items["run"] == run) & (items["step"] == 4)]
    probes, _ = run_group_items(records)
    more = [part.assign(item=part["item"] + 100) for part in (base, tuned)]
    scored = pd.concat([base, tuned, *more]).drop(columns="epoch")
    churn = churn_table(
        probes, scored.drop(columns="value"), scored, pd.concat([base, untouched, tuned])
    )
    still = churn[churn["step"] == 2]
    assert set(still["probe"]) == set(TASKS)
    assert (still["agreement"] == 1.0).all()
    assert (still["gained"] + still["lost"] == 0.0).all()
    last = churn[churn["step"] == 4].groupby(["evaluated_by", "probe"])["n"].sum()
    assert last["training"].to_dict() == {"sciq": 5, "gsm8k": 3}
    assert last["job"].to_dict() == {"sciq": 10, "gsm8k": 6}
    assert set(churn["epoch"]) == {1.0, 2.0}
    assert not churn.duplicated(["run", "step", "probe", "answer", "evaluated_by"]).any()
