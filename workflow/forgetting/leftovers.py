"""Jobs of SLURM that outlived the snakemake which had submitted them.

Ctrl-C cancels what was submitted, but a snakemake that is killed leaves its jobs running. The next
one would submit the same jobs again, and two would write the same files; so it ends the old ones
first. What they have done is not lost: trainings go on from their newest checkpoint.
"""

from __future__ import annotations

import time
from pathlib import Path

from forgetting.queue import ask, queued
from forgetting.records import InputError

PATIENCE = 120.0
"""Seconds in which a cancelled job is gone: SLURM kills after KillWait, by default 30."""


def end_leftovers(folder: Path, logs: Path, patience: float = PATIENCE) -> list[str]:
    """Cancel the jobs that another snakemake has left in this folder; what is to be told of it.

    Called by a snakemake that holds the folder's lock. Where others hold it too, for other targets,
    the jobs may be theirs, and are left alone.

    Args:
        folder: where snakemake runs, and its jobs.
        logs: where SLURM writes their logs; without it there never was such a job.
        patience: seconds to wait until they have ended.

    Raises:
        InputError: they have not, or nobody knows: what is submitted now might write their files.
    """
    if not logs.is_dir():
        return []
    found = queued(folder)
    if found is None:
        return ["squeue does not answer: jobs of a killed snakemake may still run here"]
    if not found:
        return []
    told = ", ".join(f"{job.number} ({job.purpose})" for job in found)
    if locks(folder) != 1:
        return [f"left alone, as another snakemake may wait for them: SLURM jobs {told}"]
    numbers = [job.number for job in found]
    ask("scancel", *numbers)
    deadline = time.monotonic() + patience
    while left := _left(folder, numbers):
        if time.monotonic() > deadline:
            raise InputError(
                "jobs of a killed snakemake were cancelled, but are not known to have ended: SLURM "
                f"jobs {', '.join(left)}; start again when squeue no longer shows them"
            )
        time.sleep(1.0)
    return [f"cancelled, since the snakemake that waited for them was killed: SLURM jobs {told}"]


def _left(folder: Path, numbers: list[str]) -> list[str]:
    """Those of the jobs that are still in the queue; all, if the controller does not answer."""
    found = queued(folder)
    known = {job.number for job in found or []}
    return [number for number in numbers if found is None or number in known]


def locks(folder: Path) -> int:
    """How many snakemakes hold files of a folder, the one that asks among them."""
    return len([*(folder / ".snakemake" / "locks").glob("*.output.lock")])
