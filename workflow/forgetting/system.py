"""Hardware, packages and memory of the process that runs a job.

A job records them itself, since its tables may be made on another machine.
"""

from __future__ import annotations

import gc
import os
import platform
import resource
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "accelerate",
    "altair",
    "datasets",
    "lm-eval",
    "numpy",
    "pandas",
    "peft",
    "rouge-score",
    "snakemake",
    "tokenizers",
    "torch",
    "transformers",
)


def describe_computation(device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """Return the device, precision and machine, on which the last digits of numbers depend."""
    return {
        "device": device_name(device),
        "precision": str(precision).removeprefix("torch."),
        "machine": describe_machine(),
    }


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the number of threads on the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"


def describe_machine() -> dict[str, Any]:
    """Return versions of Python and packages, the commit of the workflow, processor and threads."""
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "code_revision": code_revision(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


@cache
def code_revision() -> str:
    """Return the commit of this workflow, with `-dirty` if tracked files differ from it.

    It is `unknown` without git or outside a git repository.
    """
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _processor() -> str:
    """Return the name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of the GPU if one is used, otherwise of this process, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def release_memory(device: torch.device) -> None:
    """Release the memory of tensors that are no longer referenced."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
