"""How runs that are done compare with what was forecast of them, on the device they ran on.

The planned jobs of a study with their costs, and a schedule of them on a site's machines.

When jobs end that wait for each other and for GPUs: a schedule as SLURM would make it.
"""

from __future__ import annotations

import heapq
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from forgetting.config.expand import method_of
from forgetting.config.study import StudyConfig
from forgetting.data.table_sizes import train_bytes
from forgetting.errors import InputError
from forgetting.io import read_json, removal_command
from forgetting.pipeline.resources.hardware import GPUS, Site
from forgetting.pipeline.resources.job_costs import (
    ON_DEVICES,
    SUBMITTED,
    TRAINING,
    JobCost,
    JobCosts,
)
from forgetting.pipeline.resources.memory import finished_bytes
from forgetting.pipeline.resources.runtime import run_group_seconds
from forgetting.pipeline.resources.workload import ProcessCount
from forgetting.pipeline.status import PlannedJob


@dataclass(frozen=True)
class MeasuredRun:
    """A finished run: seconds that were measured, and that would have been forecast of it.

    Attributes:
        training: of its steps, measured and forecast.
        rest: of loading the base, evaluations and checkpoints, measured and forecast.
        memory: largest use of the device, or of the process, in 10^9 bytes; likewise.
    """

    run: str
    device: str
    tokens_per_second: float
    training: tuple[float, float]
    rest: tuple[float, float]
    memory: tuple[float, float]


def finished_runs(results: Path) -> list[dict[str, Any]]:
    """The records of a study's runs, as soon as each is done; not those of durations' branches."""
    paths = sorted(results.glob("state/*/seed*/*/*/run.json"))
    return [read_json(path, removal_command(path.parent)) for path in paths]


def compare_with_forecast(
    costs: JobCosts, records: Iterable[Mapping[str, Any]]
) -> list[MeasuredRun]:
    """All runs that ended well, whatever device they ran on."""
    found = []
    for record in records:
        method, seed = str(record["run"]).split("/")[:2]
        planned = int(seed.removeprefix("seed")) in costs.study.seeds
        if (
            planned
            and method in costs.tunings
            and record["status"] == "ok"
            and record["steps"]
            and _is_as_planned(costs, method, record)
        ):
            found.append(_compare_run(costs, method, record))
    return found


def _is_as_planned(costs: JobCosts, name: str, record: Mapping[str, Any]) -> bool:
    """Return whether as many runs shared passes as the study now plans."""
    passes = costs.case.microbatches(
        costs.run_groups[name], ProcessCount(record.get("processes", 1))
    )
    return int(record["trained_together"]) in {len(part) for part in passes}


def _compare_run(costs: JobCosts, name: str, record: Mapping[str, Any]) -> MeasuredRun:
    """What was measured is of one run; of fused ones, its share.

    Args:
        name: of its method, or of the run group in which several are trained together.
    """
    run_group, team = costs.run_groups[name], ProcessCount(record.get("processes", 1))
    steps, evaluations = int(record["steps"]), len(record["evaluations"])
    stages = run_group_seconds(costs.case, run_group, team, steps, evaluations)
    runs = sum(len(tuning.hyperparameters) for tuning in run_group)
    training = float(record["training_seconds"])
    rest = float(record["wall_seconds"]) - training
    peak = costs.of("finetune", {"method": name})
    forecast_bytes = peak.device_bytes if costs.case.device.is_gpu else peak.host_bytes
    return MeasuredRun(
        run=str(record["run"]),
        device=str(record["device"]),
        tokens_per_second=float(record["tokens_per_second"]),
        training=(training, stages["training"] / runs),
        rest=(rest, sum(stages[name] for name in ("load", "probes", "checkpoints")) / runs),
        memory=(float(record["peak_memory_gib"]) * 2**30 / 1e9, forecast_bytes / 1e9),
    )


@dataclass(frozen=True)
class CorrectionFactors:
    """What forecast seconds are multiplied with.

    Attributes:
        runs: that they were measured on.
    """

    training: float = 1.0
    rest: float = 1.0
    runs: int = 0


def correction_factors(compared: Sequence[MeasuredRun], device: str) -> CorrectionFactors:
    """Medians over the runs on devices of this name; 1 where there are none."""
    own = [each for each in compared if is_device(each.device, device)]
    if not own:
        return CorrectionFactors()
    return CorrectionFactors(
        training=median(each.training[0] / each.training[1] for each in own),
        rest=median(each.rest[0] / each.rest[1] for each in own),
        runs=len(own),
    )


def is_device(recorded: str, name: str) -> bool:
    """Return whether a recorded device, such as `NVIDIA H100 80GB HBM3`, has this name."""
    return name in recorded.replace(",", " ").split()


def site_of_runs(recorded: str) -> Site | None:
    """A machine with the device of a record; None where it is not in the table of devices."""
    if threads := re.match(r"CPU, (\d+) of", recorded):
        machines = {"device": "CPU", "count": 1, "gpus": 1, "cpus": int(threads[1])}
        return Site.model_validate({"machines": machines})
    name = next((name for name in GPUS if is_device(recorded, name)), None)
    return Site.model_validate({"machines": {"device": name}}) if name else None


def forecast_against_measured(
    study: StudyConfig, records: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Forecast and measured of each method and device: seconds of all its runs, largest memory."""
    rows = []
    for device in dict.fromkeys(str(record["device"]) for record in records):
        site = site_of_runs(device)
        if site is None:
            continue
        costs = JobCosts(study, site)
        own = compare_with_forecast(
            costs, [record for record in records if record["device"] == device]
        )
        for name, tuning in costs.tunings.items():
            runs = [each for each in own if method_of(each.run) == name]
            if runs:
                rows.append(_summed(tuning.label, device, runs))
    return rows


def _summed(label: str, device: str, runs: Sequence[MeasuredRun]) -> dict[str, Any]:
    row: dict[str, Any] = {"label": label, "device": device, "runs": len(runs)}
    for place, end in enumerate(("measured", "forecast")):
        row[f"training_{end}"] = sum(each.training[place] for each in runs)
        row[f"rest_{end}"] = sum(each.rest[place] for each in runs)
        row[f"memory_{end}"] = max(each.memory[place] for each in runs)
    return row


QUEUE_SECONDS = 30.0
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

    costs: JobCosts
    jobs: Mapping[int, PlannedJob]
    of: Mapping[int, JobCost]
    end_times: Mapping[int, float]
    critical_path: Sequence[int]
    corrected: CorrectionFactors
    compared: Sequence[MeasuredRun]

    @property
    def gpu_hours(self) -> float:
        """Of all jobs that have GPUs."""
        return sum(gpu_seconds(self.jobs[n], cost) for n, cost in self.of.items()) / 3600

    @property
    def wall_hours(self) -> float:
        """From the first job to the end of the last."""
        return max(self.end_times.values(), default=0.0) / 3600

    @property
    def shares(self) -> dict[str, float]:
        """GPU-hours of each stage among all."""
        hours: dict[str, float] = {}
        for number, cost in self.of.items():
            if self.jobs[number].rule in ON_DEVICES:
                for stage, seconds in cost.stages.items():
                    hours[stage] = hours.get(stage, 0.0) + seconds * cost.processes.processes
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
                for tuning in costs.run_groups[job.wildcards["method"]]:
                    finished += len(tuning.hyperparameters) * finished_bytes(case, tuning)
                most += self.of[number].disk_bytes
        return {
            "download": fetched,
            "finished": fetched + prepared + finished,
            "most": fetched + prepared + most,
        }


def gpu_seconds(job: PlannedJob, cost: JobCost) -> float:
    """GPU-seconds of a job."""
    return cost.seconds * cost.processes.processes if job.rule in ON_DEVICES else 0.0


def forecast_study(costs: JobCosts, jobs: Mapping[int, PlannedJob], results: Path) -> Forecast:
    """The cost of planned jobs, and a schedule of them on the machines of the site."""
    compared = compare_with_forecast(costs, finished_runs(results))
    corrected = correction_factors(compared, costs.case.device.name)
    of = {
        n: apply_correction(costs.of(job.rule, job.wildcards), corrected) for n, job in jobs.items()
    }
    works = {
        number: SimulatedJob(
            seconds=of[number].seconds + (QUEUE_SECONDS if job.rule in SUBMITTED else 0.0),
            gpus=of[number].processes.per_node if job.rule in ON_DEVICES else 0,
            nodes=of[number].processes.nodes,
            after=job.after,
        )
        for number, job in jobs.items()
    }
    machines = costs.site.machines
    ends = simulate_schedule(works, machines.count, machines.gpus, JOBS)
    path = longest_path(works) if works else []
    return Forecast(costs, jobs, of, ends, path, corrected, compared)


def apply_correction(cost: JobCost, by: CorrectionFactors) -> JobCost:
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


def forecast_values(found: Forecast) -> dict[str, Any]:
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


@dataclass(frozen=True)
class SimulatedJob:
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


def simulate_schedule(
    jobs: Mapping[int, SimulatedJob], machines: int, gpus: int, most: int
) -> dict[int, float]:
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
            places = _free_slots(job, free)
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


def _free_slots(job: SimulatedJob, free: Sequence[int]) -> list[int] | None:
    """The fullest machines on which the job fits; None where there are too few."""
    if not job.gpus:
        return []
    fitting = sorted((left, place) for place, left in enumerate(free) if left >= job.gpus)
    if len(fitting) < job.nodes:
        return None
    return [place for _, place in fitting[: job.nodes]]


def longest_path(jobs: Mapping[int, SimulatedJob]) -> list[int]:
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
