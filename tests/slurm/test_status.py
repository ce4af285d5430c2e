"""The progress of a study as `make status` shows it. A script replaces squeue."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from forgetting.pipeline.slurm import SUBMITTED_FILE, QueuedJob, queued_jobs
from forgetting.pipeline.status import STATUS_COLUMNS, PlannedJob, study_status
from support.slurm import write_sweep

ROOT = Path(__file__).resolve().parents[2]
RUN = "77f8388a-2830-4ec5-8d0f-610fb311e0e6"


def _planned(rule: str, left: bool) -> PlannedJob:
    return PlannedJob(rule, {}, frozenset(), left)


def test_every_job_is_counted_once() -> None:
    """Each job of a rule is finished, running, pending or not yet submitted."""
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
    """Return the file that squeue prints; without the file squeue fails."""
    program = tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec cat "{tmp_path}/queue"\n', encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "queue"


def test_status_shows_studies_before_and_after_submission(squeue: Path, tmp_path: Path) -> None:
    """The command writes no results."""
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

    lines = shown()
    assert lines[-1].startswith("squeue does not answer")
    (run_groups,) = (line.split() for line in lines if line.startswith("finetune"))
    assert run_groups == ["finetune", "34", "0", "0", "0", "34"]
    purposes = ("pretrain_base", "finetune_wildcards_lora-r1_0")
    queued = [f"{n}|PENDING|{RUN}|rule_{name}|{at}" for n, name in enumerate(purposes)]
    squeue.write_text("".join(f"{line}\n" for line in queued), encoding="utf-8")
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
