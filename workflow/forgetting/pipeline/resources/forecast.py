"""Forecast of a study: simulated schedule of its jobs, corrected by runs that have finished."""

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
    """A finished run, with measured values and their forecasts.

    Attributes:
        run: its name.
        device: the device that it ran on.
        tokens_per_second: measured speed.
        training: seconds of its steps, measured and forecast.
        rest: seconds of loading, evaluations and checkpoints, measured and forecast.
        memory: largest memory of the device, or of the process, in 10^9 bytes; likewise.
    """

    run: str
    device: str
    tokens_per_second: float
    training: tuple[float, float]
    rest: tuple[float, float]
    memory: tuple[float, float]


def finished_runs(results: Path) -> list[dict[str, Any]]:
    """Return the records of a study's finished runs, except those of cooldown branches."""
    paths = sorted(results.glob("state/*/seed*/*/*/run.json"))
    return [read_json(path, removal_command(path.parent)) for path in paths]


def compare_with_forecast(
    costs: JobCosts, records: Iterable[Mapping[str, Any]]
) -> list[MeasuredRun]:
    """Return all runs that are part of the study and did not diverge, on whatever device."""
    return [
        _compare_run(costs, record)
        for record in records
        if record["status"] == "ok" and record["steps"] and _is_planned(costs, record)
    ]


def _is_planned(costs: JobCosts, record: Mapping[str, Any]) -> bool:
    """Return whether the study plans a run, and as many runs that share its passes."""
    name, seed = str(record["run"]).split("/")[:2]
    method = costs.methods.get(name)
    if method is None or int(seed.removeprefix("seed")) not in costs.study.seeds:
        return False
    passes = costs.workload.runs_per_pass(method, ProcessCount(record.get("processes", 1)))
    return int(record["batched_runs"]) in passes


def _compare_run(costs: JobCosts, record: Mapping[str, Any]) -> MeasuredRun:
    """Return the measured and forecast values of a run; a batched run has its share of the pass."""
    method = costs.methods[method_of(record["run"])]
    group = ProcessCount(record.get("processes", 1))
    steps, evaluations = int(record["steps"]), len(record["evaluations"])
    stages = run_group_seconds(costs.workload, method, group, steps, evaluations)
    runs = len(method.hyperparameters)
    training = float(record["training_seconds"])
    cost = costs.of("finetune", {"method": method.name})
    memory = cost.device_bytes if costs.workload.device.is_gpu else cost.host_bytes
    return MeasuredRun(
        run=str(record["run"]),
        device=str(record["device"]),
        tokens_per_second=float(record["tokens_per_second"]),
        training=(training, stages["training"] / runs),
        rest=(
            float(record["wall_seconds"]) - training,
            sum(stages[name] for name in ("load", "probes", "checkpoints")) / runs,
        ),
        memory=(float(record["peak_memory_gib"]) * 2**30 / 1e9, memory / 1e9),
    )


@dataclass(frozen=True)
class CorrectionFactors:
    """Factors of forecast seconds, and the number of runs that they are measured on."""

    training: float = 1.0
    rest: float = 1.0
    runs: int = 0


def correction_factors(compared: Sequence[MeasuredRun], device: str) -> CorrectionFactors:
    """Return the medians over the runs on devices of this name; 1 without such runs."""
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
    """Return a machine with a recorded device; None if the table of devices does not have it."""
    if threads := re.match(r"CPU, (\d+) of", recorded):
        machines = {"device": "CPU", "count": 1, "gpus": 1, "cpus": int(threads[1])}
        return Site.model_validate({"machines": machines})
    name = next((name for name in GPUS if is_device(recorded, name)), None)
    return Site.model_validate({"machines": {"device": name}}) if name else None


def forecast_against_measured(
    study: StudyConfig, records: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return forecast and measured values of each method and device.

    They are the sums of the seconds of all its runs, and their largest memory.
    """
    rows = []
    for device in dict.fromkeys(str(record["device"]) for record in records):
        site = site_of_runs(device)
        if site is None:
            continue
        costs = JobCosts(study, site)
        own = compare_with_forecast(
            costs, [record for record in records if record["device"] == device]
        )
        for name, method in costs.methods.items():
            runs = [each for each in own if method_of(each.run) == name]
            if runs:
                rows.append(_summed(method.label, device, runs))
    return rows


def _summed(label: str, device: str, runs: Sequence[MeasuredRun]) -> dict[str, Any]:
    row: dict[str, Any] = {"label": label, "device": device, "runs": len(runs)}
    for place, end in enumerate(("measured", "forecast")):
        row[f"training_{end}"] = sum(each.training[place] for each in runs)
        row[f"rest_{end}"] = sum(each.rest[place] for each in runs)
        row[f"memory_{end}"] = max(each.memory[place] for each in runs)
    return row


QUEUE_SECONDS = 30.0
"""Seconds that SLURM and Snakemake need to start a job and to notice its end."""

MAX_SUBMITTED_JOBS = 32
"""Number of jobs that the profile submits at once."""


@dataclass(frozen=True)
class Forecast:
    """A planned study, with the cost of every job.

    Attributes:
        costs: costs of the study's jobs at the site.
        jobs: the planned jobs by number.
        of: cost of each job, corrected.
        end_times: seconds at which each job ends in the simulated schedule.
        critical_path: the longest chain of jobs that wait for each other.
        corrected: factors of the correction.
        compared: the finished runs.
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
        """Return the GPU-hours of all jobs."""
        return sum(gpu_seconds(self.jobs[n], cost) for n, cost in self.of.items()) / 3600

    @property
    def wall_hours(self) -> float:
        """Return the hours from the start of the first job to the end of the last."""
        return max(self.end_times.values(), default=0.0) / 3600

    @property
    def shares(self) -> dict[str, float]:
        """Return the share of each stage in the GPU-hours, largest first."""
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
        """Return the bytes of downloads, of the finished study, and of all jobs at once.

        The training data is there twice, also as it was prepared.
        """
        workload, costs = self.costs.workload, self.costs
        fetched, prepared = sum(costs.downloads.values()), train_bytes(costs.study)
        finished, most = 0.0, 0.0
        for number, job in self.jobs.items():
            if job.rule in TRAINING:
                method = costs.methods[job.wildcards["method"]]
                finished += len(method.hyperparameters) * finished_bytes(workload, method)
                most += self.of[number].disk_bytes
        return {
            "download": fetched,
            "finished": fetched + prepared + finished,
            "most": fetched + prepared + most,
        }


def gpu_seconds(job: PlannedJob, cost: JobCost) -> float:
    """Return the GPU-seconds of a job."""
    return cost.seconds * cost.processes.processes if job.rule in ON_DEVICES else 0.0


def forecast_study(costs: JobCosts, jobs: Mapping[int, PlannedJob], results: Path) -> Forecast:
    """Return the costs of planned jobs, and a schedule of them on the machines of the site."""
    compared = compare_with_forecast(costs, finished_runs(results))
    corrected = correction_factors(compared, costs.workload.device.name)
    of = {
        n: apply_correction(costs.of(job.rule, job.wildcards), corrected) for n, job in jobs.items()
    }
    simulated = {
        number: SimulatedJob(
            seconds=of[number].seconds + (QUEUE_SECONDS if job.rule in SUBMITTED else 0.0),
            gpus=of[number].processes.per_node if job.rule in ON_DEVICES else 0,
            nodes=of[number].processes.nodes,
            after=job.after,
        )
        for number, job in jobs.items()
    }
    machines = costs.site.machines
    ends = simulate_schedule(simulated, machines.count, machines.gpus, MAX_SUBMITTED_JOBS)
    path = longest_path(simulated) if simulated else []
    return Forecast(costs, jobs, of, ends, path, corrected, compared)


def apply_correction(cost: JobCost, by: CorrectionFactors) -> JobCost:
    """Return a cost with corrected seconds."""
    factor = {"training": by.training} | dict.fromkeys(("load", "probes", "checkpoints"), by.rest)
    return replace(
        cost, stages={name: value * factor.get(name, 1.0) for name, value in cost.stages.items()}
    )


def with_machines(site: Site, device: str | None, gpus: int | None) -> Site:
    """Return the site with another device or number of GPUs: whole machines, or part of one.

    With device CPU, it is this machine, shared by `gpus` jobs.
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
    # One job may use all of them.
    most = {"most_gpus": gpus} if gpus else {}
    return site.model_copy(update={"machines": site.machines.model_copy(update=changes), **most})


def forecast_values(found: Forecast) -> dict[str, Any]:
    """Return the numbers of a forecast, for programs."""
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
        seconds: its duration.
        gpus: GPUs on each of its machines; 0 without GPUs.
        nodes: number of its machines.
        after: numbers of the jobs whose results it needs.
    """

    seconds: float
    gpus: int = 0
    nodes: int = 1
    after: frozenset[int] = frozenset()


def simulate_schedule(
    jobs: Mapping[int, SimulatedJob], machines: int, gpus: int, most: int
) -> dict[int, float]:
    """Return the seconds from the first job's start at which each ends, as SLURM would run them.

    A job starts when its inputs exist and its GPUs are free, in the order in which jobs became
    ready. A later job that fits passes one that does not. Jobs without GPUs always fit.

    Args:
        jobs: the jobs by number.
        machines: number of equal machines.
        gpus: GPUs of each machine.
        most: number of jobs with GPUs that are submitted at once.
    """
    free, ends = [gpus] * machines, dict[int, float]()
    waiting = {number: set(job.after) for number, job in jobs.items()}
    followers: dict[int, list[int]] = {number: [] for number in jobs}
    for number, job in jobs.items():
        for before in job.after:
            followers[before].append(number)
    ready = [number for number, left in waiting.items() if not left]
    running: list[tuple[float, int, list[int]]] = []
    now, submitted = 0.0, 0
    while ready or running:
        late = []
        for number in ready:
            job = jobs[number]
            places = _free_slots(job, free)
            if places is None or (job.gpus and submitted >= most):
                late.append(number)
                continue
            for place in places:
                free[place] -= job.gpus
            submitted += job.gpus > 0
            heapq.heappush(running, (now + job.seconds, number, places))
        ready = late
        if not running:
            raise ValueError(f"{len(late)} jobs need more GPUs than the machines have")
        now, number, places = heapq.heappop(running)
        ends[number] = now
        submitted -= jobs[number].gpus > 0
        for place in places:
            free[place] += jobs[number].gpus
        for follower in followers[number]:
            waiting[follower].discard(number)
            if not waiting[follower]:
                ready.append(follower)
    return ends


def _free_slots(job: SimulatedJob, free: Sequence[int]) -> list[int] | None:
    """Return the fullest machines that have room for a job; None if there are too few."""
    if not job.gpus:
        return []
    fitting = sorted((left, place) for place, left in enumerate(free) if left >= job.gpus)
    if len(fitting) < job.nodes:
        return None
    return [place for _, place in fitting[: job.nodes]]


def longest_path(jobs: Mapping[int, SimulatedJob]) -> list[int]:
    """Return the longest chain of jobs that wait for each other, which more GPUs do not shorten."""
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
