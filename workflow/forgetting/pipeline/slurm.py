"""SLURM's queue, and jobs that outlived the snakemake that had submitted them.

Ctrl-C cancels what was submitted, but a snakemake that is killed leaves its jobs running. The next
one would submit the same jobs again, and two would write the same files; so it ends the old ones
first. Their work is not lost: trainings resume from their newest checkpoint.
"""

from __future__ import annotations

import getpass
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from forgetting.errors import InputError
from forgetting.locks import locked_by_others

CANCEL_TIMEOUT_SECONDS = 120.0
"""Seconds in which a cancelled job is gone: SLURM kills after KillWait, by default 30."""


def cancel_orphaned_jobs(
    folder: Path, logs: Path, results: Path, patience: float = CANCEL_TIMEOUT_SECONDS
) -> list[str]:
    """Cancel the jobs that a killed snakemake has left for this study, and return messages on them.

    The caller holds the folder of the study's results. Jobs that were submitted for other studies
    are left alone, and so are jobs of an unknown study while another study runs in this folder.

    Args:
        folder: where snakemake runs, and its jobs.
        logs: where SLURM writes their logs; without it there never was such a job.
        results: folder of the study's results.
        patience: seconds to wait until they have ended.

    Raises:
        InputError: they have not, or nobody knows: what is submitted now might write their files.
    """
    if not logs.is_dir():
        return []
    found = queued_jobs(folder, results)
    if found is None:
        return ["squeue does not answer: jobs of a killed snakemake may still run here"]
    ours = submitted_jobs(results)
    notes = []
    if locked_by_others(results):
        unknown = [job for job in found if job.number not in ours]
        found = [job for job in found if job.number in ours]
        if unknown:
            names = _job_names(unknown)
            notes = [f"left alone, as another snakemake may wait for them: SLURM jobs {names}"]
    if not found:
        return notes
    _cancel(folder, results, [job.number for job in found], patience)
    names = _job_names(found)
    cancelled = (
        f"cancelled, since the snakemake that waited for them was killed: SLURM jobs {names}"
    )
    return [*notes, cancelled]


def _cancel(folder: Path, results: Path, numbers: list[str], patience: float) -> None:
    """Cancel jobs and wait until they have left the queue."""
    query_queue("scancel", *numbers)
    deadline = time.monotonic() + patience
    while left := _remaining_jobs(folder, results, numbers):
        if time.monotonic() > deadline:
            raise InputError(
                "jobs of a killed snakemake were cancelled, but are not known to have ended: SLURM "
                f"jobs {', '.join(left)}; start again when squeue no longer shows them"
            )
        time.sleep(1.0)


def _job_names(jobs: list[QueuedJob]) -> str:
    return ", ".join(f"{job.number} ({job.comment})" for job in jobs)


def _remaining_jobs(folder: Path, results: Path, numbers: list[str]) -> list[str]:
    """Return the jobs that are still in the queue; all, if the controller does not answer."""
    found = queued_jobs(folder, results)
    known = {job.number for job in found or []}
    return [number for number in numbers if found is None or number in known]


SUBMITTED_FILE = "slurm-jobs.txt"
"""In a folder of results: numbers of the jobs that were submitted for it; bin/sbatch writes it."""

RUN_ID_FILE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
"""How the name of a job of SLURM's plugin ends; all jobs of one snakemake have the same name."""

PENDING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "PREEMPTED"}
"""States of a job that waits for machines, perhaps not for the first time."""


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue: its number, and the rule and wildcards that it is for."""

    number: str
    comment: str
    state: str

    @property
    def rule(self) -> str:
        """Return the rule that submitted the job."""
        return self.comment.removeprefix("rule_").split("_wildcards_", 1)[0]

    @property
    def is_pending(self) -> bool:
        """Whether it has no machine yet."""
        return self.state in PENDING


def submitted_jobs(results: Path) -> set[str]:
    """Return the numbers of all jobs that were submitted for a study, also of those that ended."""
    try:
        return set((results / SUBMITTED_FILE).read_text(encoding="utf-8").split())
    except OSError:
        return set()


def queued_jobs(folder: Path, results: Path) -> list[QueuedJob] | None:
    """Return this user's jobs of SLURM's plugin in a folder, but those of other studies.

    Args:
        folder: where snakemake runs.
        results: folder of the study's results.

    Returns:
        None if the controller does not answer.
    """
    siblings = [other for other in results.parent.glob("*") if other.name != results.name]
    theirs = {number for other in siblings for number in submitted_jobs(other)} - submitted_jobs(
        results
    )
    answer = query_queue(
        "squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%A|%T|%j|%k|%Z"
    )
    if answer is None:
        return None
    return [
        QueuedJob(number, purpose, state)
        for number, state, name, purpose, at in (
            line.split("|", 4) for line in answer.splitlines() if line.count("|") >= 4
        )
        if RUN_ID_FILE.search(name)
        and Path(at).resolve() == folder.resolve()
        and number not in theirs
    ]


def query_queue(*command: str) -> str | None:
    """Return what a program of SLURM prints; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
