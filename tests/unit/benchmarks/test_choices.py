"""The stored choice of an item is the one that the harness's metric scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forgetting.benchmarks.evaluate import run_benchmarks
from forgetting.benchmarks.scores import argmax_choice
from forgetting.benchmarks.tasks import TaskSpec
from support.benchmark_rows import sciq
from support.models import byte_tokenizer, random_llama, write_rows

METRICS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
CHOICES = ["no", "naturally", "\N{SNOWMAN}\N{SNOWMAN}\N{SNOWMAN}", "an hour ago"]


def _harness_task() -> Any:
    """Return a task of the harness with every metric of choices."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    rows = [{"question": "?", "choices": CHOICES, "label": label} for label in range(len(CHOICES))]
    return ConfigurableTask(
        config={
            "task": "made",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{label}}",
            "metric_list": [{"metric": name} for name in METRICS],
        }
    )


def test_predicted_choice_agrees_with_the_harness_score() -> None:
    """The harness scores random log-likelihoods, on which the metrics choose differently."""
    task = _harness_task()
    random, taken = np.random.default_rng(0), []
    for _ in range(200):
        likelihoods = -random.uniform(1.0, 30.0, 2 * len(CHOICES))
        answers = [(float(value), False) for value in likelihoods]
        ours = {name: argmax_choice(likelihoods, CHOICES, name) for name in METRICS}
        taken.append(tuple(ours.values()))
        for doc in task.eval_docs:
            theirs = task.process_results(doc, answers)
            for name in METRICS:
                assert theirs[name] == (ours[name] == doc["label"]), name
    for one in range(len(METRICS)):
        for other in range(one):
            assert any(chosen[one] != chosen[other] for chosen in taken)


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_responses_hold_the_choice_of_the_main_metric(metric: str, tmp_path: Path) -> None:
    rows = [
        row | {"correct_answer": "x" * (1 + 3 * n), "distractor1": "a long and winding road"}
        for n, row in enumerate(sciq(8))
    ]
    folder = write_rows(tmp_path, {"sciq": dict.fromkeys(("test", "validation"), rows)})
    spec = TaskSpec("sciq", metric=metric)
    result = run_benchmarks(
        random_llama(context=512), byte_tokenizer(), [spec], folder, batch_size=4
    )
    values = result.items[result.items["metric"] == f"{metric},none"].set_index("item")["value"]
    responses = result.responses.set_index("item")
    right = responses["choice"] == responses["target"].astype(int)
    assert values.astype(bool).eq(right.astype(bool)).all()
    raw = responses["response"].map(lambda text: int(np.argmax(json.loads(text))))
    assert (raw == responses["choice"]).all() == (metric == "acc")
