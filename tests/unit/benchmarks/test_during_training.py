"""Benchmarks at the evaluations of a training: their digest, their metrics, their items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from forgetting.benchmarks import during_training as module
from forgetting.benchmarks.during_training import TrainingBenchmarks, merge_items, split_items
from forgetting.benchmarks.scores import BenchmarkResult
from forgetting.config.evaluation import TrainingBenchmarksConfig
from forgetting.errors import InputError
from forgetting.io import write_jsonl
from forgetting.models.loading import load_base
from support.benchmark_rows import SUMS, TASKS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_digest_changes_with_rows_and_settings(
    training_benchmarks: TrainingBenchmarks,
    folders: dict[str, Path],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Runs are evaluated again with other rows or settings."""
    fewer = {"sciq": TASKS["sciq"].model_copy(update={"limit": 2})}
    spec = TrainingBenchmarksConfig(tasks=fewer, batch_size=4)
    assert (
        TrainingBenchmarks(spec, {"sciq": folders["sciq"]}, tokenizer).digest
        != training_benchmarks.digest
    )
    write_jsonl(folders["gsm8k"] / "test.jsonl", SUMS[1:])
    again = TrainingBenchmarks(training_benchmarks.config, folders, tokenizer)
    assert again.digest != training_benchmarks.digest


def test_digest_ignores_settings_that_change_no_answer(
    training_benchmarks: TrainingBenchmarks,
) -> None:
    """Chance, revision and batch size change no answer; the metric changes the stored items."""

    def digest(batch_size: int, **changed: Any) -> str:
        tasks = {name: task.model_copy(update=changed) for name, task in TASKS.items()}
        return TrainingBenchmarks(
            TrainingBenchmarksConfig(tasks=tasks, batch_size=batch_size),
            training_benchmarks.rows_dirs,
            None,
        ).digest

    assert digest(1, chance=0.3, revision="0" * 40) == training_benchmarks.digest
    assert digest(training_benchmarks.config.batch_size, metric="acc") != training_benchmarks.digest


def test_training_benchmarks_refuse_metrics_that_are_no_means(
    training_benchmarks: TrainingBenchmarks, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(model: Any, loaded: Any) -> BenchmarkResult:
        result = evaluate_tasks(model, loaded)
        result.scores["value"] += 0.25
        return result

    evaluate_tasks = module.evaluate_tasks
    monkeypatch.setattr(module, "evaluate_tasks", worse)
    with pytest.raises(
        InputError, match=r"benchmarks\.during_training: the metric of (sciq|gsm8k)"
    ):
        training_benchmarks(load_base(base_folder, torch.device("cpu")))


def test_split_items_reverses_merge_items() -> None:
    probes = pd.DataFrame({"probe": ["new"], "item": ["a/1"], "value": [0.5]})
    benchmark_items = pd.DataFrame(
        {"task": ["t"], "item": [3], "metric": ["acc,none"], "value": [1.0], "response": ["[]"]}
    ).assign(choice=pd.array([2], dtype="Int64"))
    ours, theirs = split_items(merge_items(probes, benchmark_items))
    pd.testing.assert_frame_equal(ours, probes, check_dtype=False)
    pd.testing.assert_frame_equal(theirs, benchmark_items, check_dtype=False)
    assert split_items(probes)[1].empty
