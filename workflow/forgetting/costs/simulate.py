"""When jobs end that wait for each other and for GPUs: a schedule as SLURM would make it."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """A job in a schedule.

    Attributes:
        seconds: that it takes.
        gpus: on each of its machines; 0 of a job that takes none.
        nodes: machines.
        after: numbers of the jobs whose results it needs.
    """

    seconds: float
    gpus: int = 0
    nodes: int = 1
    after: frozenset[int] = frozenset()


def schedule(jobs: Mapping[int, Work], machines: int, gpus: int, most: int) -> dict[int, float]:
    """Seconds from the first job's start at which each ends.

    A job is begun when what it needs is there and its GPUs are free, in the order in which jobs
    became ready; a later one that fits passes one that does not. Jobs without GPUs always fit.

    Args:
        machines: all alike.
        gpus: of each machine.
        most: jobs with GPUs that are submitted at once.
    """
    free, ends = [gpus] * machines, dict[int, float]()
    waiting = {number: set(job.after) for number, job in jobs.items()}
    followers: dict[int, list[int]] = {number: [] for number in jobs}
    for number, job in jobs.items():
        for before in job.after:
            followers[before].append(number)
    ready = [number for number, left in waiting.items() if not left]
    running: list[tuple[float, int, list[int]]] = []
    now, flying = 0.0, 0
    while ready or running:
        late = []
        for number in ready:
            job = jobs[number]
            places = _places(job, free)
            if places is None or (job.gpus and flying >= most):
                late.append(number)
                continue
            for place in places:
                free[place] -= job.gpus
            flying += job.gpus > 0
            heapq.heappush(running, (now + job.seconds, number, places))
        ready = late
        if not running:
            raise ValueError(f"{len(late)} jobs ask for more GPUs than the machines have")
        now, number, places = heapq.heappop(running)
        ends[number] = now
        flying -= jobs[number].gpus > 0
        for place in places:
            free[place] += jobs[number].gpus
        for follower in followers[number]:
            waiting[follower].discard(number)
            if not waiting[follower]:
                ready.append(follower)
    return ends


def _places(job: Work, free: Sequence[int]) -> list[int] | None:
    """The fullest machines on which the job fits; None where there are too few."""
    if not job.gpus:
        return []
    fitting = sorted((left, place) for place, left in enumerate(free) if left >= job.gpus)
    if len(fitting) < job.nodes:
        return None
    return [place for _, place in fitting[: job.nodes]]


def longest_path(jobs: Mapping[int, Work]) -> list[int]:
    """The jobs that wait for each other the longest, in their order: no more GPUs shorten them."""
    ends: dict[int, float] = {}

    def end(number: int) -> float:
        if number not in ends:
            job = jobs[number]
            ends[number] = job.seconds + max(map(end, sorted(job.after)), default=0.0)
        return ends[number]

    last = max(jobs, key=end)
    path = [last]
    while jobs[path[-1]].after:
        path.append(max(sorted(jobs[path[-1]].after), key=end))
    return path[::-1]
