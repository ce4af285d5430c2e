"""Resource requests of every job: GPUs, machines, cores, memory, time and disk.

    mem_mb   1.25 * memory of a machine, and half of that more with every attempt; at least 8,000
             (4,000 for programs of a model)
    runtime  3 * forecast * attempt, in minutes; at least 30
    disk_mb  1.25 * largest disk use; on Kubernetes 1.25 * the inputs and outputs that are copied
             into a pod, since the rest is on the shared volume; at least 1,000

A job may have failed for lack of memory or time, so a retry requests more of both, up to the limits
of the site. If weights are sharded over GPUs of one machine, whose number the study does not fix, a
retry requests more GPUs. Training resumes from its newest checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from forgetting.errors import InputError
from forgetting.pipeline.resources.hardware import Site
from forgetting.pipeline.resources.job_costs import ON_DEVICES, TRAINING, JobCost, JobCosts

MEMORY, MORE_MEMORY, LEAST_MEMORY = 1.25, 0.5, {True: 8000, False: 4000}
TIME, LEAST_TIME = 3.0, 30


def resource_requests(rule: str, cost: JobCost, site: Site, attempt: int = 1) -> dict[str, int]:
    """Return the resources that an attempt of a job requests."""
    more_memory = 1.0 + MORE_MEMORY * (attempt - 1)
    # Twice as many processes with every attempt, on one machine.
    factor = max(1, min(2 ** (attempt - 1), cost.retry_processes // cost.processes.per_node))
    memory = math.ceil(MEMORY * more_memory * factor * cost.host_bytes / 1e6)
    least = math.ceil(more_memory * LEAST_MEMORY[rule in ON_DEVICES])
    minutes = math.ceil(TIME * cost.seconds / 60)
    longest = site.longest if rule in ON_DEVICES and site.device.is_gpu else site.longest_light
    disk = cost.copied_bytes if site.cluster == "kubernetes" else cost.disk_bytes
    requests = {
        "mem_mb": min(max(memory, least), site.largest),
        "runtime": min(max(minutes, LEAST_TIME) * attempt, longest),
        "cpus_per_task": min(cost.cores * factor, site.machines.cpus),
        "disk_mb": max(1000, math.ceil(MEMORY * disk / 1e6)),
    }
    if rule in ON_DEVICES:
        single_on_cpu = site.machines.device == "CPU" and cost.processes.processes == 1
        requests["gpu"] = 0 if single_on_cpu else cost.processes.processes * factor
    if rule in TRAINING:
        requests["nodes"] = cost.processes.nodes
    return requests


class Resources:
    """The resources of every rule's jobs, as functions of their wildcards and attempt."""

    def __init__(self, costs: JobCosts) -> None:
        self.costs = costs

    def of(self, rule: str) -> dict[str, Any]:
        """Return the `resources` of a rule.

        The plugin puts `srun` before a job, for one machine, unless the job has the resource `mpi`.
        """
        methods = self.costs.methods if rule in TRAINING else ()
        several_nodes = any(self.costs.process_count(name).nodes > 1 for name in methods)
        requests = {name: self._request(rule, name) for name in _requested(rule)}
        return {**({"mpi": False} if several_nodes else {}), **requests}

    def threads(self, rule: str) -> int | Callable[..., int]:
        """Return the `threads` of a rule: the cores of a job on Kubernetes, otherwise 1.

        SLURM uses `cpus_per_task`, and a job on this machine takes its share of the cores.
        """
        if self.costs.site.cluster != "kubernetes":
            return 1
        return self._request(rule, "cpus_per_task")

    def message(self, rule: str, text: str) -> str:
        """Return the message of a rule's jobs: a text, then their resource requests."""
        requests = [f"{name}={{resources.{name}}}" for name in _requested(rule)]
        return f"{text} ({', '.join(requests)})"

    @property
    def program_cores(self) -> int:
        """Cores of a job that runs programs of a model; one core starts some 19 a second."""
        return self.costs.program_cores

    def _request(self, rule: str, name: str) -> Callable[..., int]:
        def request(wildcards: Any, attempt: int) -> int:
            cost = self.costs.of(rule, dict(wildcards.items()) if wildcards else {})
            return resource_requests(rule, cost, self.costs.site, attempt)[name]

        return request


def _requested(rule: str) -> list[str]:
    """Return the names of the resources that jobs of a rule request."""
    names = ["mem_mb", "runtime", "cpus_per_task", "disk_mb"]
    names += ["gpu"] if rule in ON_DEVICES else []
    return names + (["nodes"] if rule in TRAINING else [])


def check_single_node(costs: JobCosts) -> None:
    """Refuse methods that need several machines on a cluster whose jobs have one.

    Raises:
        InputError: names the method, and the key that makes it run on one machine.
    """
    if costs.site.cluster != "kubernetes":
        return
    for name in costs.methods:
        group = costs.process_count(name)
        if group.nodes > 1:
            raise InputError(
                f"methods: {name} needs {group.processes} GPUs on {group.nodes} machines, for its "
                "memory or for its time, and a job on Kubernetes has one machine: use SLURM, or "
                f"give the method `processes: {costs.site.machines.gpus}` (and no `nodes`) to "
                "train it on one all the same, however long that takes"
            )


def capacity_warnings(costs: JobCosts) -> list[str]:
    """Return a warning for each method that needs more memory than the site's GPUs have."""
    device, warnings = costs.workload.device, []
    for name in costs.methods if device.is_gpu else ():
        used = costs.of("finetune", {"method": name}).device_bytes
        if used > device.usable:
            warnings.append(
                f"{name}: needs {used / 1e9:.0f} GB on each GPU and {device.name} has "
                f"{device.usable / 1e9:.0f} GB for it: other GPUs, or a smaller rank or batch"
            )
    return warnings
