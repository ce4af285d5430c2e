"""What a job ran on: kept in its record, since the machine that collects is another.

How much memory a process has used, and what is done when there is no more.
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
    """Return what numbers depend on besides inputs: device, threads, precision and machine."""
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
    """Return Python, packages, the commit of this workflow, processor, its cores, and threads."""
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
    """Return the commit of this workflow, with `-dirty` where tracked files differ from it.

    It is `unknown` where git or its repository is not there.
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
    """The processor's name, as the system tells it."""
    told = Path("/proc/cpuinfo")
    for line in told.read_text().splitlines() if told.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far: of the GPU where one is used, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def release_memory(device: torch.device) -> None:
    """Give back what tensors of a failed attempt held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
