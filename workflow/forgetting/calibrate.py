"""How runs that are done compare with what was forecast of them, on the device they ran on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from forgetting.case import Team
from forgetting.costs import Costs
from forgetting.durations import run_seconds
from forgetting.records import read_json


@dataclass(frozen=True)
class Compared:
    """A finished run: seconds that were measured, and that would have been forecast of it.

    Attributes:
        training: of its steps, measured and forecast.
        rest: of its evaluations and checkpoints, measured and forecast.
        memory: largest use of the device, or of the process, in 10^9 bytes; likewise.
    """

    run: str
    device: str
    tokens_per_second: float
    training: tuple[float, float]
    rest: tuple[float, float]
    memory: tuple[float, float]


def compare(costs: Costs, results: Path) -> list[Compared]:
    """All finished runs of the study's cohorts, whatever device they ran on."""
    found = []
    for path in sorted(results.glob("state/*/seed*/*/*/run.json")):
        record = read_json(path)
        method = str(record["run"]).split("/", 1)[0]
        if method in costs.tunings and record["steps"] and record["status"] == "ok":
            found.append(_compare(costs, method, record))
    return found


def _compare(costs: Costs, method: str, record: dict[str, Any]) -> Compared:
    """What was measured is of one run; of fused ones, its share."""
    tuning = costs.tunings[method]
    team = Team(record.get("processes", 1))
    steps, evaluations = int(record["steps"]), len(record["points"])
    stages = run_seconds(costs.case, tuning, team, steps, evaluations)
    runs = len(tuning.settings)
    training = float(record["training_seconds"])
    rest = float(record["wall_seconds"]) - training
    peak = costs.of("finetune", {"method": method})
    told = peak.device_bytes if costs.case.device.is_gpu else peak.host_bytes
    return Compared(
        run=str(record["run"]),
        device=str(record["device"]),
        tokens_per_second=float(record["tokens_per_second"]),
        training=(training, stages["training"] / runs),
        rest=(rest, (stages["probes"] + stages["checkpoints"]) / runs),
        memory=(float(record["peak_memory_gib"]) * 2**30 / 1e9, told / 1e9),
    )


@dataclass(frozen=True)
class Factors:
    """What forecast seconds are multiplied with.

    Attributes:
        runs: that they were measured on.
    """

    training: float = 1.0
    rest: float = 1.0
    runs: int = 0


def factors(compared: Sequence[Compared], device: str) -> Factors:
    """Medians over the runs on devices of this name; 1 where there are none."""
    own = [each for each in compared if is_device(each.device, device)]
    if not own:
        return Factors()
    return Factors(
        training=median(each.training[0] / each.training[1] for each in own),
        rest=median(each.rest[0] / each.rest[1] for each in own),
        runs=len(own),
    )


def is_device(recorded: str, name: str) -> bool:
    """Is what a record calls `NVIDIA H100 80GB HBM3` or `CPU, 2 of 2 threads` of this name?"""
    return name in recorded.replace(",", " ").split()
