"""How far a study has come, as `make status` shows it; with a program in the place of squeue."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.slurm import write_sweep
from forgetting.pipeline.status import PlannedJob
from forgetting.pipeline.status import (STATUS_COLUMNS, study_status)
from forgetting.pipeline.slurm import (SUBMITTED_FILE, QueuedJob, queued_jobs)

ROOT = Path(__file__).resolve().parents[2]
RUN = "77f8388a-2830-4ec5-8d0f-610fb311e0e6"


def _planned(rule: str, left: bool) -> PlannedJob:
    return PlannedJob(rule, {}, frozenset(), left)


def test_every_job_is_counted_once() -> None:
    """Finished, running, pending and to come are all jobs, of each rule and in all."""
    jobs = [_planned("finetune", left=number > 2) for number in range(8)]
    jobs += [_planned("evaluate_base", left=False), _planned("all", left=True)]
    states = ["RUNNING", "COMPLETING", "PENDING", "CONFIGURING"]
    queue = [QueuedJob(str(n), "rule_finetune_wildcards_full_0", s) for n, s in enumerate(states)]
    assert study_status(jobs, queue) == [
        STATUS_COLUMNS,
        ["finetune", "8", "3", "2", "2", "1"],
        ["evaluate_base", "1", "1", "0", "0", "0"],
        ["in all", "9", "4", "2", "2", "1"],
    ]


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What squeue prints, in this file; it fails where there is none."""
    program = tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec cat "{tmp_path}/queue"\n', encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "queue"


def test_the_command_shows_a_study_that_has_not_begun_and_one_that_waits(
    squeue: Path, tmp_path: Path
) -> None:
    """In an empty folder; it writes nothing there that a study would."""
    study, at = write_sweep(tmp_path / "sweep.yaml"), tmp_path / "work"
    at.mkdir()
    (at / "config").symlink_to(ROOT / "config")

    def shown() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-m", "forgetting.pipeline.status", f"study={study}"],
            cwd=at,
            env=os.environ | {"PYTHONPATH": str(ROOT / "workflow")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    told = shown()
    assert told[-1].startswith("squeue does not answer")
    (run_groups,) = (line.split() for line in told if line.startswith("finetune"))
    assert run_groups == ["finetune", "34", "0", "0", "0", "34"]
    purposes = ("pretrain_base", "finetune_wildcards_lora-r1_0")
    lines = [f"{n}|PENDING|{RUN}|rule_{name}|{at}" for n, name in enumerate(purposes)]
    squeue.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    found = queued_jobs(at, at / "results" / study.stem)
    assert found and [job.rule for job in found] == ["pretrain_base", "finetune"]
    (run_groups,) = (line.split() for line in shown() if line.startswith("finetune"))
    assert run_groups == ["finetune", "34", "0", "0", "1", "33"]
    assert not (at / "results").exists()

    another = at / "results" / "another"
    another.mkdir(parents=True)
    (another / SUBMITTED_FILE).write_text("1\n", encoding="utf-8")  # the job of the run group
    (run_groups,) = (line.split() for line in shown() if line.startswith("finetune"))
    assert run_groups == ["finetune", "34", "0", "0", "0", "34"]
