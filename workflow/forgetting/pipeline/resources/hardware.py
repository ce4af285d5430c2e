"""Devices, and the site: the machines that jobs run on and the limits of their partitions.

The file of a site is the one in which the SLURM plugin finds the partitions, with one more section,
`machines`. For Kubernetes it is profiles/kubernetes/nodes.yaml.

FLOPs per second are of dense products in bfloat16, and bytes per second are in 10^9. Peaks are from
data sheets:

- H100: NVIDIA H100 SXM: 989 TFLOP/s, 3.35 TB/s, 80 GB, NVLink 900 GB/s.
- H200: NVIDIA H200 SXM: the arithmetic of an H100, 4.8 TB/s, 141 GB.
- A100: NVIDIA A100 SXM: 312 TFLOP/s, 2.0 TB/s, 80 GB, NVLink 600 GB/s.
- L40S: NVIDIA L40S: 362 TFLOP/s, 0.864 TB/s, 48 GB, PCIe 4 64 GB/s.
- CPU: a core of a server processor, measured on the study `mini`; see `core_device`.

Public programs reach 40 to 46 % of the peak when they fine-tune 7 billion weights on an H100
(llm-foundry's table, torchtitan), 64 % on an A100, and about as much in forward passes. Here every
GPU reaches 40 % in training and 45 % in scoring.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from forgetting.config.types import ConfigModel, PositiveFloat, PositiveInt
from forgetting.errors import InputError


@dataclass(frozen=True)
class Device:
    """A GPU, or the cores of a processor that one process has.

    Attributes:
        flops: peak of multiplications and additions per second.
        bandwidth: bytes per second between memory and arithmetic units.
        memory: bytes; a process can use `usable` of them.
        link: bytes per second to the other devices of the machine, in one direction.
        training: share of `flops` that forward and backward passes reach.
        scoring: share of `flops` that forward passes reach.
        forward: seconds to launch the operations of one block's forward pass. The arithmetic of
            large passes hides them. Small passes take no longer than that.
        backward: the same of a forward and backward pass.
        half: whether matrices are multiplied in bfloat16 under float32 weights.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    link: float
    training: float = 0.40
    scoring: float = 0.45
    # PyTorch without compilation launches some 60 operations per block in 15 microseconds each. The
    # backward pass, which C++ launches, takes as long again.
    forward: float = 0.9e-3
    backward: float = 1.7e-3
    half: bool = True

    @property
    def is_gpu(self) -> bool:
        """Return whether the device is a GPU, with its own memory."""
        return self.name != "CPU"

    @property
    def kind(self) -> str:
        """Return torch's type of the device: cuda or cpu."""
        return "cuda" if self.is_gpu else "cpu"

    @property
    def usable(self) -> float:
        """Return the bytes for tensors. Driver, libraries and fragmentation take the rest."""
        return 0.9 * self.memory

    def training_seconds(self, flops: float) -> float:
        """Return the seconds of the arithmetic of forward and backward passes."""
        return flops / (self.flops * self.training)

    def scoring_seconds(self, flops: float) -> float:
        """Return the seconds of the arithmetic of forward passes."""
        return flops / (self.flops * self.scoring)


def core_device(count: int) -> Device:
    """Return `count` cores of a processor, with 2 GB of memory each.

    One core trains adapters of rank 8 on 1.3 million weights at 3,000 tokens per second in float32
    (bench/results/training.md). That is 26 GFLOP/s, two fifths of the peak of AVX2 at 2 GHz.
    """
    core = Device(
        name="CPU",
        flops=64e9,
        bandwidth=10e9,
        memory=2e9,
        link=5e9,
        forward=0.4e-3,
        backward=1.2e-3,
        half=False,
    )
    return replace(core, flops=count * core.flops, memory=count * core.memory)


GPUS = {
    device.name: device
    for device in (
        Device("H100", flops=989e12, bandwidth=3.35e12, memory=80e9, link=450e9),
        Device("H200", flops=989e12, bandwidth=4.8e12, memory=141e9, link=450e9),
        Device("A100", flops=312e12, bandwidth=2.0e12, memory=80e9, link=300e9),
        Device("L40S", flops=362e12, bandwidth=0.864e12, memory=48e9, link=32e9),
    )
}

NETWORK = 50e9
"""Bytes per second between a GPU and those of other machines: InfiniBand of 400 Gbit/s for each."""

STORAGE = 1e9
"""Bytes per second that a job reads from and writes to the shared file system."""

DOWNLOAD = 50e6
"""Bytes per second from the hub."""


def find_device(name: str, count: int) -> Device:
    """Return the device of a name, where `CPU` has `count` cores; raise `InputError` if unknown."""
    if name == "CPU":
        return core_device(count)
    if name not in GPUS:
        raise InputError(f"device: {name} is not known; give one of {', '.join([*GPUS, 'CPU'])}")
    return GPUS[name]


SITE_VARIABLE = "SNAKEMAKE_SLURM_PARTITIONS"
"""Environment variable that names another file of the site, also for the SLURM plugin."""

LIMITS = {
    *("max_runtime", "max_mem_mb", "max_mem_mb_per_cpu", "max_cpus_per_task", "max_threads"),
    *("max_nodes", "max_tasks", "max_tasks_per_node", "max_gpu", "max_cpus_per_gpu"),
    *("max_mpi_tasks", "supports_mpi", "available_gpu_models", "available_constraints"),
    *("slurm_cluster", "cluster", "clusters"),
}
"""Limits of a partition that the SLURM plugin knows; it fails with a traceback on others."""


class Machines(ConfigModel):
    """The machines that jobs run on, which are all equal."""

    device: str = Field("H100", description=f"{', '.join(GPUS)}, or CPU where there is no GPU.")
    count: PositiveInt = Field(4, description="Number of machines.")
    gpus: PositiveInt = Field(
        8, description="GPUs of each machine; processes of a job if there are none."
    )
    cpus: PositiveInt = Field(96, description="Processor cores of each machine.")
    memory_gb: PositiveFloat = Field(2000.0, description="Memory of each machine, in 10^9 bytes.")


class Site(ConfigModel):
    """What resource requests depend on: a cluster or a machine."""

    cluster: Literal["slurm", "kubernetes"] = Field("slurm", description="Scheduler of the jobs.")
    machines: Machines = Machines()
    longest: int = Field(2880, description="Time limit of a job with GPUs, in minutes.")
    longest_light: int = Field(2880, description="Time limit of other jobs, in minutes.")
    largest: int = Field(2_000_000, description="Memory limit of a job on a machine, in MB.")
    most_gpus: int | None = Field(None, description="Limit of the GPUs of a job.")

    @property
    def device(self) -> Device:
        """Return the device of one process of a job."""
        return find_device(self.machines.device, self.cores)

    @property
    def cores(self) -> int:
        """Return the processor cores of a process: its share, at most eight."""
        return max(1, min(8, self.machines.cpus // self.machines.gpus))

    @property
    def devices(self) -> int:
        """Return the GPUs of all machines."""
        return self.machines.count * self.machines.gpus

    @property
    def devices_of_a_job(self) -> int:
        """Return the largest number of GPUs of a job."""
        return self.most_gpus or self.devices


def read_site(path: Path) -> Site:
    """Return the site that a file describes, with the largest limits of its partitions.

    The limits of jobs with GPUs are those of partitions with `max_gpu`, if there are any.

    Raises:
        InputError: names the file and the key.
    """
    if SITE_VARIABLE not in os.environ and not path.exists():
        return Site()  # a copy of the workflow without profiles
    path = Path(os.environ.get(SITE_VARIABLE, path))
    try:
        return _parse_site(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except OSError as error:
        raise InputError(f"{path}: the site's file cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        section = () if first["loc"][:1] == ("cluster",) else ("machines",)
        keys = ".".join(map(str, (*section, *first["loc"])))
        raise InputError(f"{path}: {keys}: {first['msg']}") from None
    except InputError as error:
        raise InputError(f"{path}: machines.{error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"{path}: not a file of a site ({error}); it has `partitions` and `machines`, see "
            "docs/cluster.md"
        ) from None


def _parse_site(content: Mapping[str, Any]) -> Site:
    sections = ("cluster", "machines", "partitions")
    if unknown := [name for name in content if name not in sections]:
        raise ValueError(f"`{unknown[0]}` is not known")
    machines = Machines.model_validate(content.get("machines") or {})
    find_device(machines.device, 1)
    named = content.get("partitions") or {}
    for name, limits in named.items():
        if unknown := [key for key in limits if key not in LIMITS]:
            raise ValueError(
                f"partitions.{name}: `{unknown[0]}` is not known; a limit is one of "
                f"{', '.join(sorted(LIMITS))}"
            )
    partitions = list(named.values())
    with_gpus = [p for p in partitions if p.get("max_gpu")] or partitions
    limits = {
        "longest": _largest_limit(with_gpus, "max_runtime", _minutes),
        "longest_light": _largest_limit(partitions, "max_runtime", _minutes),
        "largest": _largest_limit(with_gpus, "max_mem_mb", _count) or None,
        "most_gpus": _largest_limit(with_gpus, "max_gpu", _count),
    }
    given = {key: value for key, value in limits.items() if value is not None}
    cluster = content.get("cluster", "slurm")
    site = Site.model_validate({**given, "cluster": cluster, "machines": machines})
    largest = min(site.largest, int(1000 * machines.memory_gb))
    return site.model_copy(update={"largest": largest})


def _largest_limit(
    partitions: Sequence[Mapping[str, Any]], key: str, read: Callable[[Any], int]
) -> int | None:
    """Return the largest limit of the partitions, or None if none has it."""
    return max((read(p[key]) for p in partitions if key in p), default=None)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"max_gpu or max_mem_mb: {value}; give a whole number")
    return value


def _minutes(value: Any) -> int:
    """Return minutes from a number, or from text such as `48h` or `2d`."""
    found = re.fullmatch(r"([1-9]\d*)\s*(m|h|d|)", str(value).strip())
    if found is None:
        raise ValueError(f"max_runtime: {value}; give minutes, or a number with h or d")
    return int(found[1]) * {"": 1, "m": 1, "h": 60, "d": 1440}[found[2]]
