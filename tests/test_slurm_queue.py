"""Many jobs at once on a SLURM, and what their user is shown of them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from clusters import NAME, RESULTS, ROOT, Folder, asked, job, write_sweep
from faults import empty

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
COHORTS = 36
AT_ONCE = 32
"""Jobs that the profile has submitted at most, and GPUs of the cluster."""


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


def test_a_sweep_fills_the_cluster_and_its_jobs_are_counted(
    cluster: Path | None, tmp_path: Path
) -> None:
    """As many trainings as the profile allows, each once, with the numbers of one machine."""
    study = write_sweep(tmp_path / f"{NAME}.yaml")
    folder, shown, most = empty(tmp_path / "work", study), [], Counter[str]()
    with folder.running() as snakemake:
        while snakemake.poll() is None:
            states = _states(folder)
            most = max(most, states, key=lambda found: found["RUNNING"])
            if not shown and (not cluster or states["RUNNING"] == AT_ONCE):
                shown = [_shown(folder)]
            time.sleep(0.5)
        assert snakemake.returncode == 0, folder.told
    print(most, shown)
    if cluster:
        assert most["RUNNING"] == AT_ONCE
    ((jobs, *counts),) = (rows["finetune"] for rows in shown)
    assert jobs == COHORTS == sum(counts)
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
