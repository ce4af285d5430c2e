"""Faults in the middle of a training on SLURM, and checks that results are unchanged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import psutil

from support.slurm import FIRST, RESULTS, ROOT, STATE, Folder, run_group, until

TABLES = ["trajectory", "items", "selection", "comparisons", "benchmarks", "benchmark_items"]


def target(method: str = "lora-r4") -> str:
    """Return the file for which Snakemake trains one method only."""
    return str(RESULTS / "runs" / method / "seed0" / "runs.json")


def empty(at: Path, study: Path) -> Folder:
    """Return a new working folder of a user with a checkout."""
    at.mkdir(exist_ok=True)
    (at / "slurm").symlink_to(ROOT / "profiles" / "slurm")
    (at / "config").symlink_to(ROOT / "config")
    return Folder(at, study)


def without(method: str, made: Path, at: Path, study: Path) -> Folder:
    """Copy the folder of a finished study, and remove the results of one method."""
    folder = empty(Path(shutil.copytree(made, at, symlinks=True)), study)
    folder.forget(method)
    return folder


def trainings(folder: Folder) -> list[psutil.Process]:
    """Return the processes that train on this machine, if all nodes are this machine."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "cwd"])
        if process.info["cwd"] == str(folder.at) and "finetune.py" in str(process.info["cmdline"])
    ]


def in_training(folder: Folder, method: str = "lora-r4") -> tuple[str, int]:
    """Wait for a checkpoint, suspend the training, and return its job number and checkpoint step.

    For SLURM a suspended training is still running, however long a test takes. SLURM must not
    suspend it: the state of a job after `scancel --signal=STOP` hides how the job ends.
    """
    until(lambda: folder.newest_step(method) >= 6)
    for process in trainings(folder):
        process.suspend()
    (number,) = folder.jobs("finetune")
    assert not folder.finished_runs(method), "the first run has ended already"
    return number, folder.newest_step(method)


def assert_same(folder: Folder, made: Path, since: int, method: str = "lora-r4") -> None:
    """Assert that the run group has the numbers of another and resumed after step `since`."""
    items, records = run_group(folder.at, method)
    expected, recorded = run_group(made, method)
    pd.testing.assert_frame_equal(items, expected, check_exact=True)
    assert records == recorded
    steps = folder.logged_steps(FIRST[method], method)
    assert steps[0] > since, "steps before a checkpoint were repeated"
    last = Path(records[-1]["run"]).name
    assert steps[-1] == folder.logged_steps(last, method)[-1] == 90
    assert not folder.queued()


def assert_same_weights(folder: Folder, made: Path, method: str) -> None:
    """Assert that the remaining checkpoints are bit-identical."""
    kept = sorted((made / STATE / method).rglob("*.safetensors"))
    assert kept
    for path in kept:
        assert (folder.at / path.relative_to(made)).read_bytes() == path.read_bytes(), path


def assert_same_tables(at: Path, made: Path) -> None:
    """Assert that the tables of two studies are bit-identical."""
    for name in TABLES:
        ours, theirs = (
            pd.read_parquet(folder / RESULTS / "tables" / f"{name}.parquet")
            for folder in (at, made)
        )
        assert len(ours)
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True, obj=name)
