"""What is asked of the cluster for every job: GPUs, machines, cores, memory, time and disk.

    mem_mb   1.25 x memory of a machine, half of it more with every attempt; at least 8,000 (4,000
             for programs of a model)
    runtime  3 x forecast x attempt, in minutes; at least 30
    disk_mb  1.25 x largest use of the disk; of Kubernetes, 1.25 x the inputs and outputs that a pod
             has copies of, since all else is on the shared volume; at least 1,000

Memory and time grow when a job is tried again, since it may have ended for want of either, up to
what the site allows; and so do the GPUs of one machine over which a run's weights are sharded, if
the study leaves their number open. A training goes on from its newest checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from forgetting.errors import InputError
from forgetting.pipeline.resources.hardware import Site
from forgetting.pipeline.resources.job_costs import ON_DEVICES, TRAINING, JobCost, JobCosts

MEMORY, MORE_MEMORY, LEAST_MEMORY = 1.25, 0.5, {True: 8000, False: 4000}
TIME, LEAST_TIME = 3.0, 30


def resource_requests(rule: str, cost: JobCost, site: Site, attempt: int = 1) -> dict[str, int]:
    """Resources of a job at its first attempt, or a later one."""
    growth = 1.0 + MORE_MEMORY * (attempt - 1)
    # Twice as many processes with every attempt, on one machine.
    here = cost.processes.per_node
    times = max(1, min(2 ** (attempt - 1), cost.more // here))
    memory = math.ceil(MEMORY * growth * times * cost.host_bytes / 1e6)
    least = math.ceil(growth * LEAST_MEMORY[rule in ON_DEVICES])
    minutes = math.ceil(TIME * cost.seconds / 60)
    longest = site.longest if rule in ON_DEVICES and site.device.is_gpu else site.longest_light
    disk = cost.copied_bytes if site.cluster == "kubernetes" else cost.disk_bytes
    found = {
        "mem_mb": min(max(memory, least), site.largest),
        "runtime": min(max(minutes, LEAST_TIME) * attempt, longest),
        "cpus_per_task": min(cost.cores * times, site.machines.cpus),
        "disk_mb": max(1000, math.ceil(MEMORY * disk / 1e6)),
    }
    if rule in ON_DEVICES:
        alone_on_cpu = site.machines.device == "CPU" and cost.processes.processes == 1
        found["gpu"] = 0 if alone_on_cpu else cost.processes.processes * times
    if rule in TRAINING:
        found["nodes"] = cost.processes.nodes
    return found


def snakemake_resources(rule: str, costs: JobCosts) -> dict[str, Callable[..., int]]:
    """The same as functions of wildcards and attempt, as Snakemake's `resources` want them."""

    def resource(name: str) -> Callable[..., int]:
        def of(wildcards: Any, attempt: int) -> int:
            return resource_requests(
                rule, costs.of(rule, _job_name(wildcards)), costs.site, attempt
            )[name]

        return of

    names = ["mem_mb", "runtime", "cpus_per_task", "disk_mb"]
    names += ["gpu"] if rule in ON_DEVICES else []
    names += ["nodes"] if rule in TRAINING else []
    return {name: resource(name) for name in names}


def threads(rule: str, costs: JobCosts) -> int | Callable[..., int]:
    """A job's `threads`: its cores where the cluster goes by them.

    SLURM goes by `cpus_per_task`, and a job on this machine takes its share of the cores.
    """
    if costs.site.cluster != "kubernetes":
        return 1

    def of(wildcards: Any, attempt: int) -> int:
        return resource_requests(rule, costs.of(rule, _job_name(wildcards)), costs.site, attempt)[
            "cpus_per_task"
        ]

    return of


def check_single_node(costs: JobCosts) -> None:
    """Of a cluster whose jobs have one machine each, refuse what would need more.

    Raises:
        InputError: names the method, and what it would take on one machine.
    """
    if costs.site.cluster != "kubernetes":
        return
    for name in costs.run_groups:
        team = costs.team(name)
        if team.nodes > 1:
            raise InputError(
                f"methods: {name} needs {team.processes} GPUs on {team.nodes} machines, for its "
                "memory or for its time, and a job on Kubernetes has one machine: use SLURM, or "
                f"give the method `processes: {costs.site.machines.gpus}` (and no `nodes`) to "
                "train it on one all the same, however long that takes"
            )


def capacity_warnings(costs: JobCosts) -> list[str]:
    """What to say of jobs that need more memory than the site's GPUs have."""
    device, lines = costs.case.device, []
    for name in costs.run_groups if device.is_gpu else ():
        used = costs.of("finetune", {"method": name}).device_bytes
        if used > device.usable:
            lines.append(
                f"{name}: needs {used / 1e9:.0f} GB on each GPU and {device.name} has "
                f"{device.usable / 1e9:.0f} GB for it: other GPUs, or a smaller rank or batch"
            )
    return lines


def _job_name(wildcards: Any) -> Mapping[str, str]:
    """A job's wildcards by name."""
    return dict(wildcards.items()) if wildcards else {}
