"""Jobs of SLURM that outlived the snakemake which had submitted them.

Ctrl-C cancels what was submitted, but a snakemake that is killed leaves its jobs running. The next
one would submit the same jobs again, and two would write the same files; so it ends the old ones
first. What they have done is not lost: trainings go on from their newest checkpoint.
"""

from __future__ import annotations

import time
from pathlib import Path

from forgetting.occupancy import others_occupied
from forgetting.queue import Queued, ask, queued, submitted
from forgetting.records import InputError

PATIENCE = 120.0
"""Seconds in which a cancelled job is gone: SLURM kills after KillWait, by default 30."""


def end_leftovers(folder: Path, logs: Path, results: Path, patience: float = PATIENCE) -> list[str]:
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
    found = queued(folder, results)
    if found is None:
        return ["squeue does not answer: jobs of a killed snakemake may still run here"]
    ours = submitted(results)
    notes = []
    if others_occupied(results):
        unknown = [job for job in found if job.number not in ours]
        found = [job for job in found if job.number in ours]
        if unknown:
            told = _named(unknown)
            notes = [f"left alone, as another snakemake may wait for them: SLURM jobs {told}"]
    if not found:
        return notes
    numbers = [job.number for job in found]
    ask("scancel", *numbers)
    deadline = time.monotonic() + patience
    while left := _left(folder, results, numbers):
        if time.monotonic() > deadline:
            raise InputError(
                "jobs of a killed snakemake were cancelled, but are not known to have ended: SLURM "
                f"jobs {', '.join(left)}; start again when squeue no longer shows them"
            )
        time.sleep(1.0)
    told = _named(found)
    cancelled = f"cancelled, since the snakemake that waited for them was killed: SLURM jobs {told}"
    return [*notes, cancelled]


def _named(jobs: list[Queued]) -> str:
    return ", ".join(f"{job.number} ({job.purpose})" for job in jobs)


def _left(folder: Path, results: Path, numbers: list[str]) -> list[str]:
    """Those of the jobs that are still in the queue; all, if the controller does not answer."""
    found = queued(folder, results)
    known = {job.number for job in found or []}
    return [number for number in numbers if found is None or number in known]
