"""Measure the machine and how well a contender uses it."""

from __future__ import annotations

import gc
import os
import platform
import time
from pathlib import Path
from types import ModuleType

import torch

from baselines import Bench, clock
from forgetting.models.loading import get_device, has_fast_bfloat16


def flops_per_token(bench: Bench) -> float:
    """Return the model FLOPs per token: 6 N for full fine-tuning, 4 N + 6 N_lora with adapters.

    N are the weights of the linear layers, without the embedding: 2 N forward, 2 N for the
    gradients of activations, and 2 N for the gradients of trained weights. The LM head counts at
    target positions only, because only those need it. Attention's products are left out, which
    understates all contenders equally.
    """
    model = bench.model()
    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    target_fraction = sum(example.targets for example in bench.examples) / bench.tokens
    flops = 0.0
    for parameter in model.parameters():
        if parameter.ndim < 2 or (parameter is embedding and parameter is not head):
            continue
        weights = parameter.numel() * (target_fraction if parameter is head else 1.0)
        flops += (6.0 if parameter.requires_grad else 4.0) * weights
    return flops


def matmul_rate(precision: torch.dtype, size: int = 2048, seconds: float = 2.0) -> float:
    """Return the best FLOP/s of several square matrix products on this machine."""
    device = get_device()
    size = 4 * size if device.type == "cuda" else size
    left, right = (torch.randn(size, size, device=device, dtype=precision) for _ in range(2))
    best, start = 0.0, time.monotonic()
    while time.monotonic() - start < seconds:
        product_start = clock()
        product = left @ right
        float(product[0, 0])  # waits for a GPU
        best = max(best, 2.0 * size**3 / (clock() - product_start))
    return best


def reset_peak() -> None:
    """Reset the peak memory and free the memory of the last contender."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """Return the peak memory since the last reset: of the GPU, or of this process (Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def machine() -> str:
    """Return a description of the machine."""
    device = get_device()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    bfloat16 = "with" if has_fast_bfloat16(device) else "without"
    return (
        f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads, "
        f"{bfloat16} bfloat16 in hardware"
    )


def versions(**libraries: ModuleType) -> str:
    """Return the versions of libraries."""
    return ", ".join(f"{name} {library.__version__}" for name, library in libraries.items())


def _processor() -> str:
    """Return the model name of the processor on Linux, or its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.machine()} CPU"
