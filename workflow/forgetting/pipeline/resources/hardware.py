"""The site: what its machines have, and how long its jobs may run. One file, read in one place.

The file is the one in which the SLURM plugin finds the partitions, with one more section,
`machines`. For Kubernetes it is profiles/kubernetes/nodes.yaml.

What devices can do: arithmetic, memory, and what a model of small matrices waits for.

FLOPs per second are of dense products in bfloat16, bytes of 10^9. Peaks are the vendor's:

- H100: NVIDIA H100 SXM data sheet: 989 TFLOP/s, 3.35 TB/s, 80 GB, NVLink 900 GB/s.
- H200: NVIDIA H200 SXM data sheet: the arithmetic of an H100, 4.8 TB/s, 141 GB.
- A100: NVIDIA A100 SXM data sheet: 312 TFLOP/s, 2.0 TB/s, 80 GB, NVLink 600 GB/s.
- L40S: NVIDIA L40S data sheet: 362 TFLOP/s, 0.864 TB/s, 48 GB, PCIe 4 64 GB/s.
- CPU: a core of a server processor, measured on the study `mini`; see `core_device`.

Shares of the peak are those that public programs reach: 40 to 46 % in fine-tuning 7 billion weights
on an H100 (llm-foundry's table, torchtitan), 64 % on an A100, about as much in reading without
gradients. Here 40 % is taken for training and 45 % for scoring, on every GPU.
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
        flops: multiplications and additions per second at most.
        bandwidth: bytes per second between memory and arithmetic.
        memory: bytes; a process can use `usable` of them.
        link: bytes per second to the other devices of the machine, in one direction.
        training: share of `flops` that forward and backward passes reach.
        scoring: share of `flops` that forward passes reach.
        forward: seconds to start the operations of one block's forward pass. They are hidden behind
            the arithmetic of large passes, and are all the time that small ones take.
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
    # PyTorch without compilation: some 60 operations a block, of 15 microseconds each on the
    # processor that starts them; with the backward pass, which is started from C++, twice as long.
    forward: float = 0.9e-3
    backward: float = 1.7e-3
    half: bool = True

    @property
    def is_gpu(self) -> bool:
        """Return whether the device is a GPU, with its own memory."""
        return self.name != "CPU"

    @property
    def kind(self) -> str:
        """What torch calls its like: cuda or cpu."""
        return "cuda" if self.is_gpu else "cpu"

    @property
    def usable(self) -> float:
        """Bytes that tensors may take: the driver, the libraries and fragments take the rest."""
        return 0.9 * self.memory

    def training_seconds(self, flops: float) -> float:
        """Time of the arithmetic of forward and backward passes."""
        return flops / (self.flops * self.training)

    def scoring_seconds(self, flops: float) -> float:
        """Time of the arithmetic of forward passes."""
        return flops / (self.flops * self.scoring)


def core_device(count: int) -> Device:
    """So many cores of a processor, with 2 GB of memory each.

    Adapters of rank 8 on 1.3 million weights were trained at 3,000 tokens a second by one core in
    float32 (bench/results/training.md), which is 26 GFLOP/s: two fifths of what AVX2 multiplies at
    2 GHz.
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
    """The device that a site's file or a command line names; `count` cores of a processor."""
    if name == "CPU":
        return core_device(count)
    if name not in GPUS:
        raise InputError(f"device: {name} is not known; give one of {', '.join([*GPUS, 'CPU'])}")
    return GPUS[name]


SITE_VARIABLE = "SNAKEMAKE_SLURM_PARTITIONS"
"""Names another file, to SLURM's plugin and here."""

LIMITS = {
    *("max_runtime", "max_mem_mb", "max_mem_mb_per_cpu", "max_cpus_per_task", "max_threads"),
    *("max_nodes", "max_tasks", "max_tasks_per_node", "max_gpu", "max_cpus_per_gpu"),
    *("max_mpi_tasks", "supports_mpi", "available_gpu_models", "available_constraints"),
    *("slurm_cluster", "cluster", "clusters"),
}
"""What SLURM's plugin knows of a partition; anything else would end it in a traceback."""


class Machines(ConfigModel):
    """The machines that jobs run on, all alike."""

    device: str = Field("H100", description=f"{', '.join(GPUS)}, or CPU where there is no GPU.")
    count: PositiveInt = Field(4, description="Machines.")
    gpus: PositiveInt = Field(
        8, description="GPUs of each; processes of a job on each, without GPUs."
    )
    cpus: PositiveInt = Field(96, description="Processor cores of each.")
    memory_gb: PositiveFloat = Field(2000.0, description="Memory of each, in 10^9 bytes.")


class Site(ConfigModel):
    """A cluster or machine, as far as resource requests depend on it."""

    cluster: Literal["slurm", "kubernetes"] = Field("slurm", description="What starts the jobs.")
    machines: Machines = Machines()
    longest: int = Field(2880, description="Minutes that a job with GPUs may run at most.")
    longest_light: int = Field(2880, description="The same of a job without.")
    largest: int = Field(2_000_000, description="Memory of a machine for one job, in MB.")
    most_gpus: int | None = Field(None, description="GPUs that a job may have at most.")

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
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if unknown := [
            name for name in content if name not in ("cluster", "machines", "partitions")
        ]:
            raise ValueError(f"`{unknown[0]}` is not known")
        machines = Machines.model_validate(content.get("machines") or {})
        partitions = list((content.get("partitions") or {}).values())
        for name, limits in (content.get("partitions") or {}).items():
            if unknown := [key for key in limits if key not in LIMITS]:
                raise ValueError(
                    f"partitions.{name}: `{unknown[0]}` is not known; a limit is one of "
                    f"{', '.join(sorted(LIMITS))}"
                )
        with_gpus = [p for p in partitions if p.get("max_gpu")] or partitions
        found = {
            "longest": _largest_machine(with_gpus, "max_runtime", _minutes),
            "longest_light": _largest_machine(partitions, "max_runtime", _minutes),
            "largest": _largest_machine(with_gpus, "max_mem_mb", _count) or None,
            "most_gpus": _largest_machine(with_gpus, "max_gpu", _count),
        }
        given = {key: value for key, value in found.items() if value is not None}
        named = {"cluster": content.get("cluster", "slurm"), "machines": machines}
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


def _largest_machine(
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
