"""Many jobs at once on a SLURM, and what their user is shown of them."""

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

from support.slurm import (NAME, RESULTS, ROOT, Folder, asked, job, write_sweep)
from support.faults import empty

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
COHORTS = 34
AT_ONCE = 32
"""Jobs that the profile has submitted at most, and GPUs of the cluster."""

TRAINING = "finetune:"
"""How the argument begins that tells snakemake, within a job, which one it is."""


def _states(folder: Folder) -> Counter[str]:
    """How many of this folder's jobs are in which state, by SLURM's word."""
    lines = asked("squeue", "--noheader", "--format=%T|%Z").splitlines()
    return Counter(line.split("|")[0] for line in lines if line.endswith(f"|{folder.at}"))


def _counted(folder: Folder) -> subprocess.Popen[str]:
    """What `make status` starts, in this folder."""
    command = [sys.executable, "-m", "forgetting.pipeline.status", f"study={folder.study}"]
    environment = folder.environment() | {"PYTHONPATH": str(ROOT / "workflow")}
    return subprocess.Popen(
        command, cwd=folder.at, env=environment, stdout=subprocess.PIPE, text=True
    )


def _shown(counted: subprocess.Popen[str]) -> dict[str, list[int]]:
    """What it showed of each rule: jobs, finished, running, pending, to come."""
    told, _ = counted.communicate(timeout=300)
    assert counted.returncode == 0
    _, *rows = ([cell for cell in line.split("  ") if cell] for line in told.splitlines())
    return {row[0]: [*map(int, row[1:])] for row in rows if len(row) == 6}


def _hold(folder: Folder, awake: set[str]) -> None:
    """Let the trainings of these jobs go on, and stop all others as soon as they start.

    Where the nodes are pretended, 32 that compute at once would not fit into memory.
    """
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = process.info["cmdline"] or ()
        if process.info["cwd"] != str(folder.at) or not any(w.startswith(TRAINING) for w in words):
            continue
        with suppress(psutil.NoSuchProcess):
            number = process.environ().get("SLURM_JOB_ID", "")
            if number:  # else the snakemake that submits them
                process.resume() if number in awake else process.suspend()


def test_a_sweep_fills_the_cluster_and_its_jobs_are_counted(
    cluster: Path | None, tmp_path: Path
) -> None:
    """As many trainings as the profile allows, each once, with the numbers of one machine."""
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
        assert snakemake.returncode == 0, folder.told
    assert counted
    shown = _shown(counted)
    if cluster:
        assert most["RUNNING"] == AT_ONCE
        assert shown["finetune"] == [COHORTS, 0, AT_ONCE, 0, COHORTS - AT_ONCE]
    assert shown["finetune"][0] == COHORTS == sum(shown["finetune"][1:])
    assert _shown(_counted(folder))["in all"][2:] == [0, 0, 0]
    numbers = folder.jobs("finetune")
    assert len(numbers) == len({*numbers.values()}) == COHORTS, "a job was submitted twice"
    assert {job(number).state for number in numbers} == {"COMPLETED"}

    local = Folder(tmp_path, study)
    local.run(str(RESULTS / "tables" / "study.json"), profile=None)
    for name in ("trajectory", "items", "selection", "comparisons"):
        ours, theirs = (
            pd.read_parquet(each.at / RESULTS / "tables" / f"{name}.parquet")
            for each in (folder, local)
        )
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True, obj=name)
