"""What a machine can do, and what a contender made of it."""

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
    """Model FLOPs of a useful token: 6 N where all is trained, 4 N + 6 N_lora with adapters.

    N are the weights of the linear layers, without the embedding: 2 N forward, 2 N for the
    gradients of activations, 2 N more where weights are trained. The LM head counts at target
    positions only, where alone it is needed. Attention's own products are left out, which
    understates all contenders alike.
    """
    model = bench.model()
    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    share = sum(example.targets for example in bench.examples) / bench.tokens
    flops = 0.0
    for parameter in model.parameters():
        if parameter.ndim < 2 or (parameter is embedding and parameter is not head):
            continue
        weights = parameter.numel() * (share if parameter is head else 1.0)
        flops += (6.0 if parameter.requires_grad else 4.0) * weights
    return flops


def matmul_rate(precision: torch.dtype, size: int = 2048, seconds: float = 2.0) -> float:
    """FLOP/s of square matrix products on this machine, the best of several."""
    device = get_device()
    size = 4 * size if device.type == "cuda" else size
    left, right = (torch.randn(size, size, device=device, dtype=precision) for _ in range(2))
    best, begun = 0.0, time.monotonic()
    while time.monotonic() - begun < seconds:
        started = clock()
        product = left @ right
        float(product[0, 0])  # waits for a GPU
        best = max(best, 2.0 * size**3 / (clock() - started))
    return best


def reset_peak() -> None:
    """Forget the largest memory so far, and what the last contender left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """Largest memory since the last reset: of the GPU, else of this process (Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def machine() -> str:
    """What the figures were taken on."""
    device = get_device()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    bfloat16 = "with" if has_fast_bfloat16(device) else "without"
    return (
        f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads, "
        f"{bfloat16} bfloat16 in hardware"
    )


def versions(**libraries: ModuleType) -> str:
    """What the figures were taken with."""
    return ", ".join(f"{name} {library.__version__}" for name, library in libraries.items())


def _processor() -> str:
    """Its family, as Linux tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.machine()} CPU"
