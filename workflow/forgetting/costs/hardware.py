"""What devices can do: arithmetic, memory, and what a model of small matrices waits for.

FLOPs per second are of dense products in bfloat16, bytes of 10^9. Peaks are the vendor's:

- H100: NVIDIA H100 SXM data sheet: 989 TFLOP/s, 3.35 TB/s, 80 GB, NVLink 900 GB/s.
- H200: NVIDIA H200 SXM data sheet: the arithmetic of an H100, 4.8 TB/s, 141 GB.
- A100: NVIDIA A100 SXM data sheet: 312 TFLOP/s, 2.0 TB/s, 80 GB, NVLink 600 GB/s.
- L40S: NVIDIA L40S data sheet: 362 TFLOP/s, 0.864 TB/s, 48 GB, PCIe 4 64 GB/s.
- CPU: a core of a server processor, measured on the study `mini`; see `cores`.

Shares of the peak are those that public programs reach: 40 to 46 % in fine-tuning 7 billion weights
on an H100 (llm-foundry's table, torchtitan), 64 % on an A100, about as much in reading without
gradients. Here 40 % is taken for training and 45 % for scoring, on every GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from forgetting.records import InputError


@dataclass(frozen=True)
class Device:
    """A GPU, or the cores of a processor that one process has.

    Attributes:
        flops: multiplications and additions per second at most.
        bandwidth: bytes per second between memory and arithmetic.
        memory: bytes, of which `usable` is left to a process.
        link: bytes per second to the other devices of the machine, in one direction.
        training: share of `flops` that forward and backward passes reach.
        scoring: share of `flops` that forward passes reach.
        forward: seconds to start the operations of one block's forward pass. They are hidden behind
            the arithmetic of large passes, and are all the time that small ones take.
        backward: the same of a forward and backward pass.
        half: are matrices multiplied in bfloat16, beside weights of float32?
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
        """Has it a memory of its own?"""
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


def cores(count: int) -> Device:
    """So many cores of a processor, with 2 GB of memory each.

    Adapters of rank 8 on 1.3 million weights were trained at 3,000 tokens a second by one core in
    float32 (bench/RECORD.md), which is 26 GFLOP/s: two fifths of what AVX2 multiplies at 2 GHz.
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
        return cores(count)
    if name not in GPUS:
        raise InputError(f"device: {name} is not known; give one of {', '.join([*GPUS, 'CPU'])}")
    return GPUS[name]
