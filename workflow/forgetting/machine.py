"""What a job ran on: kept in its record, since the machine that collects is another."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


def describe_machine() -> dict[str, Any]:
    """Python, packages, processor and its cores."""
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


def _processor() -> str:
    """The processor's name, as the system tells it."""
    told = Path("/proc/cpuinfo")
    for line in told.read_text().splitlines() if told.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
