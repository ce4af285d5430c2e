"""A training that is met in the middle by what befalls jobs, and that nothing came of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import psutil

from support.slurm import FIRST, RESULTS, ROOT, STATE, Folder, run_group, until

TABLES = ["trajectory", "items", "selection", "comparisons", "benchmarks", "benchmark_items"]


def target(method: str = "lora-r4") -> str:
    """The file for which snakemake trains a method and nothing else."""
    return str(RESULTS / "runs" / method / "seed0" / "runs.json")


def empty(at: Path, study: Path) -> Folder:
    """A working folder of somebody who has a checkout."""
    at.mkdir(exist_ok=True)
    (at / "slurm").symlink_to(ROOT / "profiles" / "slurm")
    (at / "config").symlink_to(ROOT / "config")
    return Folder(at, study)


def without(method: str, made: Path, at: Path, study: Path) -> Folder:
    """A copy of a folder in which the study is done, but for one method."""
    folder = empty(Path(shutil.copytree(made, at, symlinks=True)), study)
    folder.forget(method)
    return folder


def trainings(folder: Folder) -> list[psutil.Process]:
    """Processes that train, where the nodes are pretended: on this machine."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "cwd"])
        if process.info["cwd"] == str(folder.at) and "finetune.py" in str(process.info["cmdline"])
    ]


def in_training(folder: Folder, method: str = "lora-r4") -> tuple[str, int]:
    """Wait until a run is under way, and hold it; the number of its job, and its checkpoint.

    Held, it is still running for SLURM, also when all that follows takes long. SLURM must not know
    of it: the state of a job that `scancel --signal=STOP` has stopped hides how it ends.
    """
    until(lambda: folder.newest_step(method) >= 6)
    for process in trainings(folder):
        process.suspend()
    (number,) = folder.jobs("finetune")
    assert not folder.finished_runs(method), "the first run has ended already"
    return number, folder.newest_step(method)


def assert_same(folder: Folder, made: Path, since: int, method: str = "lora-r4") -> None:
    """The run group is complete, with the numbers of the other, and went on from a checkpoint."""
    items, records = run_group(folder.at, method)
    expected, recorded = run_group(made, method)
    pd.testing.assert_frame_equal(items, expected, check_exact=True)
    assert records == recorded
    steps = folder.steps_told(FIRST[method], method)
    assert steps[0] > since, "what was in a checkpoint was trained again"
    last = Path(records[-1]["run"]).name
    assert steps[-1] == folder.steps_told(last, method)[-1] == 90
    assert not folder.queued()


def assert_same_weights(folder: Folder, made: Path, method: str) -> None:
    """The checkpoints that are kept are equal to the bit."""
    kept = sorted((made / STATE / method).rglob("*.safetensors"))
    assert kept
    for path in kept:
        assert (folder.at / path.relative_to(made)).read_bytes() == path.read_bytes(), path


def assert_same_tables(at: Path, made: Path) -> None:
    """Every table of the study is that of the other, to the bit."""
    for name in TABLES:
        ours, theirs = (
            pd.read_parquet(folder / RESULTS / "tables" / f"{name}.parquet")
            for folder in (at, made)
        )
        assert len(ours)
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True, obj=name)
