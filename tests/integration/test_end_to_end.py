"""Whole studies at toy size: finished, repeated, killed and extended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml

from forgetting.digests import is_record

ROOT = Path(__file__).resolve().parents[2]
STUDY = """\
title: Three methods at toy size
datasets:
  world: {generate: micro-world, seed: 0}
base:
  pretrain:
    documents: [world/documents]
    limit: 40
    hidden_size: 64
    intermediate_size: 128
    num_layers: 1
    num_heads: 2
    vocab_size: 512
    block_size: 320
    batch_tokens: 960
    epochs: 1
train: world/new_authors
train_limit: 12
probes:
  new_authors: {table: world/new_authors, knowledge: new, limit: 6}
  real_authors: {table: world/real_authors, knowledge: old, limit: 6}
general_text: {table: world/held_out, block: 64, limit: 4}
evaluation: {max_new_tokens: 8, every_epochs: 1}
training:
  epochs: 2
  batch_size: 4
  micro_batch_size: 4
  schedule: constant
  warmup_epochs: 0.5
methods:
  - {method: lora, rank: 2, alpha: 2r, learning_rate: [4.0e-3, 5.0e-3]}
  - {method: lora, rank: 8, alpha: 2r, learning_rate: [3.0e-3, 4.0e-3]}
  - {method: full, learning_rate: [2.0e-4, 2.8e-4]}
selection: {probe: new_authors, threshold: 0.9, if_not_reached: last}
benchmarks:
  dataset: world
  tasks:
    humaneval: {max_new_tokens: 8, limit: 4}
    winogrande: {limit: 4, num_fewshot: 0}
    arc_challenge: {limit: 4, num_fewshot: 0}
  refusals: {table: world/refusals, max_new_tokens: 6, limit: 4}
"""
NAME = "three"
RESULTS = Path("results") / NAME
TABLES = [
    "runs",
    "trajectory",
    "items",
    "selection",
    "comparisons",
    "matched_differences",
    "matched_values",
    "benchmarks",
    "benchmark_items",
]
MEASURED_TIMES = ["seconds", "tokens_per_second", "peak_memory_gib"]

pytestmark = pytest.mark.slow


def _command(*options: str, study: str = f"{NAME}.yaml", scale: str = "full") -> list[str]:
    return [
        *(sys.executable, "-m", "snakemake", *options),
        *("--snakefile", str(ROOT / "Snakefile")),
        *("--configfile", str(ROOT / "config" / "config.yaml")),
        *("--config", f"study={study}", f"scale={scale}"),
    ]


def _environment() -> dict[str, str]:
    """Return the environment without variables of Snakemake, with this Python first in PATH."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SNAKEMAKE")}
    kept.pop("PYTHONPATH", None)
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"}


def _run(folder: Path, *options: str, **config: str) -> str:
    """Run Snakemake in a folder, which must succeed, and return its output."""
    done = subprocess.run(
        _command(*options, **config),
        cwd=folder,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def _tables(folder: Path, results: Path = RESULTS) -> dict[str, pd.DataFrame]:
    """Return all tables without the columns of measured times."""
    tables = {
        name: pd.read_parquet(folder / results / "tables" / f"{name}.parquet") for name in TABLES
    }
    tables["runs"] = tables["runs"].drop(columns=MEASURED_TIMES)
    return tables


def _write(folder: Path, name: str = NAME, **changes: Any) -> str:
    """Write the study with changed sections, and return the name of its file."""
    document = yaml.safe_load(STUDY)
    for section, change in changes.items():
        merge = isinstance(change, dict)
        document[section] = document[section] | change if merge else change
    text = yaml.safe_dump(document, sort_keys=False)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return f"{name}.yaml"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the study has finished."""
    folder = tmp_path_factory.mktemp("study")
    _write(folder)
    _run(folder)
    return folder


@pytest.fixture
def another(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished study, which a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "study", symlinks=True))


def test_study_ends_in_tables_and_page(finished: Path) -> None:
    """One command makes everything, and a second one has nothing to do."""
    page = (finished / "reports" / "tradeoff.html").read_text(encoding="utf-8")
    assert len(page) > 100_000
    assert "<html" in page[:200]
    assert list((finished / "reports" / f"{NAME}-figures").glob("*.svg"))

    tables = _tables(finished)
    assert len(tables["runs"]) == 7  # the base, and 3 methods of 2 learning rates
    assert set(tables["runs"]["status"]) == {"ok"}
    assert set(tables["trajectory"]["run"]) == set(tables["runs"]["run"])
    assert set(tables["selection"]["method"]) == set(tables["runs"]["method"]) - {"base"}
    scored = set(tables["benchmarks"]["task"])
    assert scored >= {"winogrande", "arc_challenge", "refusals"}  # HumanEval needs a sandbox
    study = json.loads((finished / RESULTS / "tables" / "study.json").read_text(encoding="utf-8"))
    assert study["study"]["title"]

    assert "Nothing to be done" in _run(finished, "--dry-run")


def test_no_partial_file_remains(finished: Path) -> None:
    """Temporary files and the optimizer's state of finished runs are removed."""
    files = [path for path in (finished / "results").rglob("*") if path.is_file()]
    hidden = {p.name for p in files if p.name.startswith(".") and not is_record(p)}
    assert hidden <= {".snakemake_timestamp"}
    assert not [path for path in files if path.name == "optimizer.safetensors"]


def test_page_of_another_study_is_rendered_again(another: Path) -> None:
    """The page is a target by default or by name."""
    study = _write(another, "more", benchmarks={"during_training": {"arc_challenge": 4}})
    for target in ([], ["reports/tradeoff.html"]):
        output = _run(another, *target, "--dry-run", study=study)
        assert "Nothing to be done" not in output
        assert "Render the report" in output


def _forget(folder: Path, *methods: str) -> None:
    """Remove all results of some methods, the tables and the page."""
    for method in methods:
        for part in ("runs", "state", "selected", "benchmarks"):
            shutil.rmtree(folder / RESULTS / part / method)
        (folder / RESULTS / "selection" / f"{method}.json").unlink()
    shutil.rmtree(folder / RESULTS / "tables")
    (folder / "reports" / f"{NAME}.html").unlink()


def _kill_program(folder: Path, program: str, when: Callable[[], bool], **config: str) -> int:
    """Run the study, kill one of its programs once `when` holds, and return Snakemake's status."""
    with subprocess.Popen(
        _command(**config),
        cwd=folder,
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as snakemake:
        deadline = time.monotonic() + 300
        while snakemake.poll() is None and not when():
            assert time.monotonic() < deadline, "the condition never held"
            time.sleep(0.002)
        for process in psutil.Process(snakemake.pid).children(recursive=True):
            if any(part.endswith(program) for part in process.cmdline()[:3]):
                process.kill()
        return snakemake.wait(timeout=300)


def test_killed_job_resumes_with_the_same_numbers(finished: Path, another: Path) -> None:
    """The job is killed in the middle of a run, and the same command resumes it."""
    _forget(another, "lora-r2")
    state = another / RESULTS / "state" / "lora-r2"
    status = _kill_program(
        another, "finetune.py", lambda: any(state.glob("*/*/*/step-0000003/progress.json"))
    )
    assert status == 1
    assert not (another / RESULTS / "runs" / "lora-r2" / "seed0" / "runs.json").exists()
    assert not list(state.glob("*/*/*/run.json")), "the first run had ended before it was killed"

    _run(another)
    log = another / "logs" / NAME / "finetune" / "lora-r2-seed0.log"
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if "lr0.004-" in line]
    assert not [line for line in lines if "step 3/6" in line], "the run started again at step 0"
    assert [line for line in lines if "step 6/6" in line]
    expected = _tables(finished)
    for name, table in _tables(another).items():
        pd.testing.assert_frame_equal(table, expected[name], check_exact=True, obj=name)


def test_another_learning_rate_trains_one_run(another: Path) -> None:
    """All other runs are unchanged."""
    methods = yaml.safe_load(STUDY)["methods"]
    methods[-1]["learning_rate"].append(4.0e-3)
    _write(another, methods=methods)
    state = another / RESULTS / "state"
    before = {path: path.stat().st_mtime_ns for path in state.rglob("run.json")}

    target = RESULTS / "runs" / "full" / "seed0" / "runs.json"
    output = _run(another, str(target))
    assert "finetune" in output
    assert "pretrain_base" not in output
    after = {path: path.stat().st_mtime_ns for path in state.rglob("run.json")}
    assert before.items() <= after.items()
    added = after.keys() - before.keys()
    assert [path.parents[1].name for path in added] == ["lr0.004-wd0"]
    assert len(json.loads((another / target).read_text(encoding="utf-8"))) == 3


def test_study_with_durations_has_results_of_each(tmp_path: Path) -> None:
    """Every duration has trajectory, benchmarks and a place on the page.

    A finished study keeps no state of the trunk. A branch whose results are removed is then trained
    from step 0, here with a kill in between, and has the same numbers.
    """
    folder, results = tmp_path, Path("results/durations")
    study = _write(
        folder,
        "durations",
        methods=yaml.safe_load(STUDY)["methods"][1:],
        training={"schedule": "wsd", "durations": [1, 2]},
        benchmarks={
            "tasks": {"arc_challenge": {"limit": 4}},
            "refusals": None,
            "models": "durations",
        },
    )
    _run(folder, study=study)
    assert (folder / "reports" / "tradeoff.html").is_file()
    assert "Nothing to be done" in _run(folder, "--dry-run", study=study)
    expected = _tables(folder, results)
    runs = expected["runs"].dropna(subset=["duration"])
    assert len(runs) == 8  # two methods of two learning rates
    assert dict(zip(runs["duration"], runs["steps"], strict=True)) == {1.0: 3, 2.0: 6}
    ends = expected["trajectory"].merge(runs[["run", "steps"]], on="run")
    ends = ends[ends["step"] == ends["steps"]]
    assert set(ends["run"]) == set(runs["run"])
    assert set(expected["selection"]["step"]) == {6}
    scored = expected["benchmarks"]
    assert scored.groupby("method")["step"].unique().map(sorted).to_dict() == {
        "base": [0],
        "lora-r8": [3, 6],
        "full": [3, 6],
    }
    state = folder / results / "state"
    assert not list(state.rglob("optimizer.safetensors"))
    assert not [path for path in state.glob("*/*/*/*/branch_points/*") if path.is_dir()]

    shutil.rmtree(state / "duration2" / "full")
    shutil.rmtree(folder / results / "branches" / "full" / "seed0" / "duration2")
    shutil.rmtree(folder / results / "tables")
    (folder / "reports" / f"{results.name}.html").unlink()
    newest = "full/seed0/*/*/step-0000003/progress.json"
    _kill_program(
        folder, "train_cooldown.py", lambda: any((state / "duration2").glob(newest)), study=study
    )
    assert not list((state / "duration2").glob("full/seed0/*/*/run.json"))
    _run(folder, study=study)
    for name, table in _tables(folder, results).items():
        pd.testing.assert_frame_equal(table, expected[name], check_exact=True, obj=name)


@pytest.mark.long
@pytest.mark.parametrize("study", ["mini", "tofu-scratch", "own-data"])
def test_studies_of_the_repository_end_in_a_page(study: str, tmp_path: Path) -> None:
    """The default study, one without benchmarks and one with a user's files run offline."""
    (tmp_path / "config").symlink_to(ROOT / "config")
    _run(tmp_path, study=study, scale="tiny")
    assert (tmp_path / "reports" / "tradeoff.html").is_file()
    assert "Nothing to be done" in _run(tmp_path, "--dry-run", study=study, scale="tiny")
