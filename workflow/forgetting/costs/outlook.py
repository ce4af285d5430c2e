"""The planned jobs of a study with their costs, and a schedule of them on a site's machines."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forgetting.costs.calibrate import Compared, Factors, compare, factors, finished_runs
from forgetting.costs.cost import ON_DEVICES, SUBMITTED, TRAINING, Cost, Costs
from forgetting.costs.footprint import finished_bytes
from forgetting.costs.jobs import Planned
from forgetting.costs.simulate import Work, longest_path, schedule
from forgetting.costs.site import Site
from forgetting.costs.volumes import train_bytes
from forgetting.records import InputError

QUEUE = 30.0
"""Seconds that SLURM and Snakemake take for a job: starting it, and noticing that it has ended."""

JOBS = 32
"""Jobs that the profile submits at once."""


@dataclass(frozen=True)
class Forecast:
    """A planned study, with the cost of every job.

    Attributes:
        ends: seconds at which each job ends in the simulated schedule.
        path: jobs that wait for each other the longest.
    """

    costs: Costs
    jobs: Mapping[int, Planned]
    of: Mapping[int, Cost]
    ends: Mapping[int, float]
    path: Sequence[int]
    corrected: Factors
    compared: Sequence[Compared]

    @property
    def gpu_hours(self) -> float:
        """Of all jobs that have GPUs."""
        return sum(gpu_seconds(self.jobs[n], cost) for n, cost in self.of.items()) / 3600

    @property
    def wall_hours(self) -> float:
        """From the first job to the end of the last."""
        return max(self.ends.values(), default=0.0) / 3600

    @property
    def shares(self) -> dict[str, float]:
        """GPU-hours of each stage among all."""
        hours: dict[str, float] = {}
        for number, cost in self.of.items():
            if self.jobs[number].rule in ON_DEVICES:
                for stage, seconds in cost.stages.items():
                    hours[stage] = hours.get(stage, 0.0) + seconds * cost.team.processes
        total = sum(hours.values())
        ordered = sorted(hours.items(), key=lambda pair: -pair[1])
        return {stage: value / total for stage, value in ordered}

    @property
    def disk(self) -> dict[str, float]:
        """Bytes from the hub, of finished runs, and the most at once, if all jobs run together.

        What is trained on lies there once more, as it was prepared.
        """
        case, costs = self.costs.case, self.costs
        fetched = sum(costs.downloads.values())
        prepared = train_bytes(costs.study)
        finished, most = 0.0, 0.0
        for number, job in self.jobs.items():
            if job.rule in TRAINING:
                for tuning in costs.cohorts[job.wildcards["method"]]:
                    finished += len(tuning.settings) * finished_bytes(case, tuning)
                most += self.of[number].disk_bytes
        return {
            "download": fetched,
            "finished": fetched + prepared + finished,
            "most": fetched + prepared + most,
        }


def gpu_seconds(job: Planned, cost: Cost) -> float:
    """GPU-seconds of a job."""
    return cost.seconds * cost.team.processes if job.rule in ON_DEVICES else 0.0


def forecast(costs: Costs, jobs: Mapping[int, Planned], results: Path) -> Forecast:
    """The cost of planned jobs, and a schedule of them on the machines of the site."""
    compared = compare(costs, finished_runs(results))
    corrected = factors(compared, costs.case.device.name)
    of = {n: correct(costs.of(job.rule, job.wildcards), corrected) for n, job in jobs.items()}
    works = {
        number: Work(
            seconds=of[number].seconds + (QUEUE if job.rule in SUBMITTED else 0.0),
            gpus=of[number].team.here if job.rule in ON_DEVICES else 0,
            nodes=of[number].team.nodes,
            after=job.after,
        )
        for number, job in jobs.items()
    }
    machines = costs.site.machines
    ends = schedule(works, machines.count, machines.gpus, JOBS)
    path = longest_path(works) if works else []
    return Forecast(costs, jobs, of, ends, path, corrected, compared)


def correct(cost: Cost, by: Factors) -> Cost:
    """A cost with its stages as long as they were measured to be."""
    factor = {"training": by.training} | dict.fromkeys(("load", "probes", "checkpoints"), by.rest)
    return replace(
        cost, stages={name: value * factor.get(name, 1.0) for name, value in cost.stages.items()}
    )


def with_machines(site: Site, device: str | None, gpus: int | None) -> Site:
    """The site with another device, or as many GPUs: whole machines, or a part of one.

    Of a CPU, that of this machine, shared by as many jobs.
    """
    if gpus is not None and gpus < 1:
        raise InputError(f"--gpus {gpus}: give at least 1")
    changes: dict[str, Any] = {"device": device} if device else {}
    if device == "CPU":
        changes |= {"count": 1, "gpus": gpus or 1, "cpus": os.cpu_count() or 1}
    elif gpus:
        each = min(gpus, site.machines.gpus)
        if gpus % each:
            raise InputError(
                f"--gpus {gpus}: machines have {each} here (profiles/slurm/partitions.yaml); give "
                "a multiple"
            )
        cpus = max(1, site.machines.cpus * each // site.machines.gpus)
        changes |= {"count": gpus // each, "gpus": each, "cpus": cpus}
    # So many as are asked for may also be those of one job.
    most = {"most_gpus": gpus} if gpus else {}
    return site.model_copy(update={"machines": site.machines.model_copy(update=changes), **most})


def as_values(found: Forecast) -> dict[str, Any]:
    """The forecast as numbers, for programs."""
    return {
        "jobs": dict(Counter(job.rule for job in found.jobs.values())),
        "device": found.costs.site.machines.device,
        "gpus": found.costs.site.devices,
        "gpu_hours": found.gpu_hours,
        "wall_hours": found.wall_hours,
        "shares": found.shares,
        "disk_bytes": found.disk,
        "corrected_by_runs": found.corrected.runs,
    }
