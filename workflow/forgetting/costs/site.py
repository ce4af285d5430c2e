"""The site: what its machines have, and how long its jobs may run. One file, read in one place.

The file is the one in which SLURM's plugin finds the partitions; `machines` stands beside them. Of
Kubernetes it is profiles/kubernetes/nodes.yaml.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from forgetting.costs.hardware import GPUS, Device, find_device
from forgetting.records import InputError
from forgetting.sections.fields import Count, Positive, Strict

VARIABLE = "SNAKEMAKE_SLURM_PARTITIONS"
"""Names another file, to SLURM's plugin and here."""

LIMITS = {
    *("max_runtime", "max_mem_mb", "max_mem_mb_per_cpu", "max_cpus_per_task", "max_threads"),
    *("max_nodes", "max_tasks", "max_tasks_per_node", "max_gpu", "max_cpus_per_gpu"),
    *("max_mpi_tasks", "supports_mpi", "available_gpu_models", "available_constraints"),
    *("slurm_cluster", "cluster", "clusters"),
}
"""What SLURM's plugin knows of a partition; anything else would end it in a traceback."""


class Machines(Strict):
    """The machines that jobs run on, all alike."""

    device: str = Field("H100", description=f"{', '.join(GPUS)}, or CPU where there is no GPU.")
    count: Count = Field(4, description="Machines.")
    gpus: Count = Field(8, description="GPUs of each; processes of a job on each, without GPUs.")
    cpus: Count = Field(96, description="Processor cores of each.")
    memory_gb: Positive = Field(2000.0, description="Memory of each, in 10^9 bytes.")


class Site(Strict):
    """What the sizes of jobs depend on beside the study."""

    cluster: Literal["slurm", "kubernetes"] = Field("slurm", description="What starts the jobs.")
    machines: Machines = Machines()
    longest: int = Field(2880, description="Minutes that a job with GPUs may run at most.")
    longest_light: int = Field(2880, description="The same of a job without.")
    largest: int = Field(2_000_000, description="Memory of a machine for one job, in MB.")
    most_gpus: int | None = Field(None, description="GPUs that a job may have at most.")

    @property
    def device(self) -> Device:
        """What one process of a job has for itself."""
        return find_device(self.machines.device, self.cores)

    @property
    def cores(self) -> int:
        """Processor cores of a process: its share, but no more than the eight that help."""
        return max(1, min(8, self.machines.cpus // self.machines.gpus))

    @property
    def devices(self) -> int:
        """GPUs of all machines."""
        return self.machines.count * self.machines.gpus

    @property
    def devices_of_a_job(self) -> int:
        """GPUs that a job may have at most."""
        return self.most_gpus or self.devices


def read_site(path: Path) -> Site:
    """The site that a file describes; the limits are the widest of its partitions.

    Jobs with GPUs go by the partitions that have some (`max_gpu`), if any says that it has.

    Raises:
        InputError: names the file and the key.
    """
    if VARIABLE not in os.environ and not path.exists():
        return Site()  # a copy of the workflow without profiles
    path = Path(os.environ.get(VARIABLE, path))
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if unknown := [name for name in told if name not in ("cluster", "machines", "partitions")]:
            raise ValueError(f"`{unknown[0]}` is not known")
        machines = Machines.model_validate(told.get("machines") or {})
        partitions = list((told.get("partitions") or {}).values())
        for name, limits in (told.get("partitions") or {}).items():
            if unknown := [key for key in limits if key not in LIMITS]:
                raise ValueError(
                    f"partitions.{name}: `{unknown[0]}` is not known; a limit is one of "
                    f"{', '.join(sorted(LIMITS))}"
                )
        with_gpus = [p for p in partitions if p.get("max_gpu")] or partitions
        found = {
            "longest": _widest(with_gpus, "max_runtime", _minutes),
            "longest_light": _widest(partitions, "max_runtime", _minutes),
            "largest": _widest(with_gpus, "max_mem_mb", _count) or None,
            "most_gpus": _widest(with_gpus, "max_gpu", _count),
        }
        given = {key: value for key, value in found.items() if value is not None}
        named = {"cluster": told.get("cluster", "slurm"), "machines": machines}
        site = Site.model_validate(given | named)
        largest = min(site.largest, int(1000 * machines.memory_gb))
        site = site.model_copy(update={"largest": largest})
        find_device(machines.device, 1)
    except OSError as error:
        raise InputError(f"{path}: the site's file cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        within = () if first["loc"][:1] == ("cluster",) else ("machines",)
        keys = ".".join(map(str, (*within, *first["loc"])))
        raise InputError(f"{path}: {keys}: {first['msg']}") from None
    except InputError as error:
        raise InputError(f"{path}: machines.{error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"{path}: not a file of a site ({error}); it has `partitions` and `machines`, see "
            "docs/cluster.md"
        ) from None
    return site


def _widest(
    partitions: Sequence[Mapping[str, Any]], key: str, read: Callable[[Any], int]
) -> int | None:
    """The largest limit of partitions, if one of them has it."""
    return max((read(p[key]) for p in partitions if key in p), default=None)


def _count(told: Any) -> int:
    if isinstance(told, bool) or not isinstance(told, int) or told < 0:
        raise ValueError(f"max_gpu or max_mem_mb: {told}; give a whole number")
    return told


def _minutes(told: Any) -> int:
    """Minutes of a partition's longest run: a number of them, or as `48h` or `2d`."""
    found = re.fullmatch(r"([1-9]\d*)\s*(m|h|d|)", str(told).strip())
    if found is None:
        raise ValueError(f"max_runtime: {told}; give minutes, or a number with h or d")
    return int(found[1]) * {"": 1, "m": 1, "h": 60, "d": 1440}[found[2]]
