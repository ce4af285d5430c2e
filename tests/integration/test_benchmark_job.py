"""Test the benchmark job, from its arguments to the tables of the report."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from peft import LoraConfig, get_peft_model

from forgetting.benchmarks.sandbox import search_sandbox
from forgetting.io import read_json, write_json, write_jsonl
from forgetting.models.tuned import save_weights
from forgetting.results.build_tables import benchmark_tables, main_metric_items, responses_table
from forgetting.results.churn import churn_table
from scripts import benchmark, run_programs
from support.benchmark_rows import FUNCTIONS, sciq
from support.params import write_params
from support.run_groups import digests_in, record_base

pytestmark = pytest.mark.usefixtures("one_thread")

SCIQ = sciq(4)
TASKS: dict[str, Any] = {
    "humaneval": {"samples": 3, "temperature": 1.0, "k": [1, 2], "max_new_tokens": 6},
    "sciq": {"metric": "acc_norm", "limit": 3},
}


@pytest.fixture
def jobs(base_folder: Path, base: Any, tmp_path: Path) -> list[Path]:
    """Return the folder with results of the base and of an adapter after a benchmark job."""
    if search_sandbox()[0] is None:
        pytest.skip(f"no sandbox: {search_sandbox()[1]}")
    for task, rows in (("humaneval", FUNCTIONS), ("sciq", SCIQ)):
        write_jsonl(tmp_path / "rows" / task / "test.jsonl", rows)
    adapter = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    save_weights(adapter, tmp_path / "checkpoints" / "seed0")
    record_base(tmp_path / "base.json", base_folder, "abc")
    chosen = {"method": "lora-r2", "seed": 0, "run": "lora-r2/seed0/lr1-wd0", "step": 7}
    chosen["files"] = digests_in(tmp_path / "checkpoints" / "seed0")
    write_json(tmp_path / "selection.json", [chosen])
    spec = {"benchmarks": {"tasks": TASKS}, "precision": "float32", "refusal_prompts": None}
    spec |= {"rows": {task: str(tmp_path / "rows" / task) for task in TASKS}}
    spec |= {"versions": "benchmark 1"}
    tuned = [f"--selection={tmp_path / 'selection.json'}"]
    tuned.append(f"--checkpoints={tmp_path / 'checkpoints'}")
    folders = []
    for name, more in (("base", []), ("seed0", tuned)):
        folder = tmp_path / "results" / name
        folders.append(folder)
        params = write_params(tmp_path, **spec, models=["seed0"] if more else [])
        benchmark.main(
            [
                f"--params={params}",
                f"--base={tmp_path / 'base.json'}",
                *more,
                f"--state={tmp_path / 'state'}",
                f"--output={tmp_path / 'results'}",
            ]
        )
        run_programs.main(
            [
                f"--programs={folder / 'programs.json'}",
                "--sandbox=bubblewrap",
                f"--output={folder / 'outcomes.json'}",
            ]
        )
    return folders


def test_benchmark_job_records_checkpoint_and_rows(jobs: list[Path], tmp_path: Path) -> None:
    """The record names the checkpoint. An untrained adapter has the scores of the base."""
    record = read_json(jobs[1] / "record.json")
    model = record["model"]
    assert (model["run"], model["step"], model["kind"]) == ("lora-r2/seed0/lr1-wd0", 7, "adapter")
    assert model["checkpoint"] == str(tmp_path / "checkpoints" / "seed0")
    weights = tmp_path / "checkpoints" / "seed0" / "adapter_model.safetensors"
    assert model["files"][weights.name] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert record["base"]["identity"] == "abc"
    of_base = read_json(jobs[0] / "record.json")["model"]
    assert of_base == {"run": "base", "step": 0, "checkpoint": None}
    sciq, rows = record["tasks"]["sciq"], tmp_path / "rows" / "sciq" / "test.jsonl"
    assert sciq["definition"] == "sciq/sciq.yaml" and sciq["metric"] == "acc_norm,none"
    assert sciq["rows"] == {str(rows): hashlib.sha256(rows.read_bytes()).hexdigest()}

    labels = {"base": {"label": "base"}, "lora-r2/seed0/lr1-wd0": {"label": "rank 2"}}
    scores, items, notes = benchmark_tables(jobs, labels)
    assert not notes
    table = scores[scores["label"] == "rank 2"].set_index(["task", "metric"])
    assert set(table.loc["humaneval"].index) == {
        f"{name},create_test"
        for name in ("pass@1", "pass@2", "distinct_passing", "distinct_failing")
    }
    main = table.index[table["main"].astype(bool)]
    assert set(main) == {("humaneval", "pass@1,create_test"), ("sciq", "acc_norm,none")}
    assert table.loc[("sciq", "acc_norm,none"), "chance"] == 0.25
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    counted = items[items["metric"].str.startswith("distinct")].groupby(["run", "item"])["value"]
    assert counted.sum().between(1, 3).all()
    values = scores.pivot_table(index=["task", "metric"], columns="label", values="value")
    assert (values["base"] == values["rank 2"]).all()

    churn = churn_table(_probes(), responses_table(jobs), main_metric_items(scores, items))
    assert set(churn["probe"]) == {"old", "sciq"}  # several samples have no single answer
    assert (churn["agreement"] == 1.0).all()


def _probes() -> pd.DataFrame:
    """Return one answer of each model to a question."""
    row = {"step": 0, "epoch": 0.0, "probe": "old", "item": "a", "rougeL_recall": 1.0}
    row |= {"generated": "Ann.", "logprob_right": -1.0, "logprobs_wrong": [-2.0]}
    return pd.DataFrame([{"run": run, **row} for run in ("base", "lora-r2/seed0/lr1-wd0")])
