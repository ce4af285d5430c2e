"""A sweep that fills a SLURM cluster, and its status."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest

from support.faults import empty
from support.slurm import NAME, RESULTS, ROOT, Folder, job, run_program, write_sweep

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
RUN_GROUPS = 34
AT_ONCE = 32
"""The most jobs that the profile submits at a time; the cluster has as many GPUs."""

TRAINING = "finetune:"
"""The start of the argument with which Snakemake names a job within that job."""


def _states(folder: Folder) -> Counter[str]:
    """Count the jobs of a folder by their state in SLURM."""
    lines = run_program("squeue", "--noheader", "--format=%T|%Z").splitlines()
    return Counter(line.split("|")[0] for line in lines if line.endswith(f"|{folder.at}"))


def _counted(folder: Folder) -> subprocess.Popen[str]:
    """Start the command of `make status` in a folder."""
    command = [sys.executable, "-m", "forgetting.pipeline.status", f"study={folder.study}"]
    environment = folder.environment() | {"PYTHONPATH": str(ROOT / "workflow")}
    return subprocess.Popen(
        command, cwd=folder.at, env=environment, stdout=subprocess.PIPE, text=True
    )


def _shown(counted: subprocess.Popen[str]) -> dict[str, list[int]]:
    """Return the counts of each rule: jobs, finished, running, pending, to come."""
    output, _ = counted.communicate(timeout=300)
    assert counted.returncode == 0
    _, *rows = ([cell for cell in line.split("  ") if cell] for line in output.splitlines())
    return {row[0]: [*map(int, row[1:])] for row in rows if len(row) == 6}


def _hold(folder: Folder, awake: set[str]) -> None:
    """Continue the trainings of these jobs, and suspend all others as soon as they start.

    If all nodes are this machine, 32 trainings at a time do not fit into its memory.
    """
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = process.info["cmdline"] or ()
        if process.info["cwd"] != str(folder.at) or not any(w.startswith(TRAINING) for w in words):
            continue
        with suppress(psutil.NoSuchProcess):
            number = process.environ().get("SLURM_JOB_ID", "")
            if number:  # the Snakemake that submits them has none
                process.resume() if number in awake else process.suspend()


def test_status_counts_jobs_of_a_sweep(cluster: Path | None, tmp_path: Path) -> None:
    """Every training runs once, as many at a time as the profile allows."""
    study = write_sweep(tmp_path / f"{NAME}.yaml")
    folder, counted, awake, most = empty(tmp_path / "work", study), None, set[str](), Counter[str]()
    with folder.running() as snakemake:
        while snakemake.poll() is None:
            states = _states(folder)
            most = max(most, states, key=lambda found: found["RUNNING"])
            if not counted and states["RUNNING"] >= (AT_ONCE if cluster else 1):
                counted = _counted(folder)
            if cluster:
                if counted and counted.poll() is not None:
                    queue = folder.queued()
                    awake = {*sorted(queue, key=lambda number: (number not in awake, number))[:4]}
                _hold(folder, awake)
            time.sleep(0.2)
        assert snakemake.returncode == 0, folder.output
    assert counted
    shown = _shown(counted)
    if cluster:
        assert most["RUNNING"] == AT_ONCE
        assert shown["finetune"] == [RUN_GROUPS, 0, AT_ONCE, 0, RUN_GROUPS - AT_ONCE]
    assert shown["finetune"][0] == RUN_GROUPS == sum(shown["finetune"][1:])
    assert _shown(_counted(folder))["in all"][2:] == [0, 0, 0]
    numbers = folder.jobs("finetune")
    assert len(numbers) == len({*numbers.values()}) == RUN_GROUPS, "a job was submitted twice"
    assert {job(number).state for number in numbers} == {"COMPLETED"}

    local = Folder(tmp_path, study)
    local.run(str(RESULTS / "tables" / "study.json"), profile=None)
    for name in ("trajectory", "items", "selection", "comparisons"):
        ours, theirs = (
            pd.read_parquet(each.at / RESULTS / "tables" / f"{name}.parquet")
            for each in (folder, local)
        )
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True, obj=name)
