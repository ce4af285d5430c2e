"""What SLURM's queue holds of a folder in which snakemake runs."""

from __future__ import annotations

import getpass
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

SUBMITTED = "slurm-jobs.txt"
"""In a folder of results: numbers of the jobs that were submitted for it; bin/sbatch writes it."""

RUN_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
"""How the name of a job of SLURM's plugin ends; all jobs of one snakemake have the same name."""

PENDING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "PREEMPTED"}
"""States of a job that waits for machines, perhaps not for the first time."""


@dataclass(frozen=True)
class Queued:
    """A job in the queue: its number, and the rule and wildcards that it is for."""

    number: str
    purpose: str
    state: str

    @property
    def rule(self) -> str:
        """The rule that it is for."""
        return self.purpose.removeprefix("rule_").split("_wildcards_", 1)[0]

    @property
    def waits(self) -> bool:
        """Has it no machine yet?"""
        return self.state in PENDING


def submitted(results: Path) -> set[str]:
    """Return the numbers of all jobs that were submitted for a study, also of those that ended."""
    try:
        return set((results / SUBMITTED).read_text(encoding="utf-8").split())
    except OSError:
        return set()


def queued(folder: Path, results: Path) -> list[Queued] | None:
    """Return this user's jobs of SLURM's plugin in a folder, but those of other studies.

    Args:
        folder: where snakemake runs.
        results: folder of the study's results.

    Returns:
        None if the controller does not answer.
    """
    siblings = [other for other in results.parent.glob("*") if other.name != results.name]
    theirs = {number for other in siblings for number in submitted(other)} - submitted(results)
    answer = ask("squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%A|%T|%j|%k|%Z")
    if answer is None:
        return None
    return [
        Queued(number, purpose, state)
        for number, state, name, purpose, at in (
            line.split("|", 4) for line in answer.splitlines() if line.count("|") >= 4
        )
        if RUN_ID.search(name) and Path(at).resolve() == folder.resolve() and number not in theirs
    ]


def ask(*command: str) -> str | None:
    """What a program of SLURM's prints; None if there is no such program or it ends badly."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
