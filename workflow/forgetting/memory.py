"""How much memory a process has used, and what is done when there is no more."""

from __future__ import annotations

import gc
import resource

import torch


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
