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

from clusters import NAME, RESULTS, ROOT, Folder, asked, job, write_sweep
from faults import empty, trainings

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
COHORTS = 36
AT_ONCE = 32
"""Jobs that the profile has submitted at most, and GPUs of the cluster."""

ROOM = 13e9
"""Bytes of memory that so many jobs take, of which four compute."""


def _states(folder: Folder) -> Counter[str]:
    """How many of this folder's jobs are in which state, by SLURM's word."""
    lines = asked("squeue", "--noheader", "--format=%T|%Z").splitlines()
    return Counter(line.split("|")[0] for line in lines if line.endswith(f"|{folder.at}"))


def _shown(folder: Folder) -> dict[str, list[int]]:
    """What `make queue` shows of each rule: jobs, finished, running, pending, to come."""
    command = [sys.executable, "-m", "forgetting.costs.standing", f"study={folder.study}"]
    environment = folder.environment() | {"PYTHONPATH": str(ROOT / "workflow")}
    done = subprocess.run(
        command, cwd=folder.at, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    _, *lines = (line.split("  ") for line in done.stdout.splitlines())
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {row[0]: [*map(int, row[1:])] for row in rows if len(row) == 6}


def _hold(folder: Folder, awake: int) -> None:
    """Let so many of the folder's trainings go on, and no more.

    Where the nodes are pretended, 32 that compute at once would not fit into memory.
    """
    shells = [process for process in trainings(folder) if process.name() == "bash"]
    for place, shell in enumerate(shells):
        for process in (shell, *shell.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.resume() if place < awake else process.suspend()


def test_a_sweep_fills_the_cluster_and_its_jobs_are_counted(
    cluster: Path | None, tmp_path: Path
) -> None:
    """As many trainings as the profile allows, each once, with the numbers of one machine."""
    if cluster and psutil.virtual_memory().available < ROOM:
        pytest.skip(f"32 jobs on one machine take {ROOM / 1e9:.0f} GB of memory")
    study = write_sweep(tmp_path / f"{NAME}.yaml")
    folder = empty(tmp_path / "work", study)
    shown: dict[str, list[int]] = {}
    most = Counter[str]()
    with folder.running() as snakemake:
        while snakemake.poll() is None:
            states = _states(folder)
            most = max(most, states, key=lambda found: found["RUNNING"])
            if not shown and states["RUNNING"] >= (AT_ONCE if cluster else 1):
                shown = _shown(folder)
            if cluster:
                with suppress(psutil.NoSuchProcess):
                    _hold(folder, awake=4 if shown else 0)
            time.sleep(0.3)
        assert snakemake.returncode == 0, folder.told
    if cluster:
        assert most["RUNNING"] == AT_ONCE
        assert shown["finetune"] == [COHORTS, 0, AT_ONCE, 0, COHORTS - AT_ONCE]
    assert shown["finetune"][0] == COHORTS == sum(shown["finetune"][1:])
    assert _shown(folder)["in all"][2:] == [0, 0, 0]
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
