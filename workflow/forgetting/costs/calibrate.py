"""How runs that are done compare with what was forecast of them, on the device they ran on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from forgetting.costs.case import Team
from forgetting.costs.cost import Costs
from forgetting.costs.durations import cohort_seconds
from forgetting.costs.hardware import GPUS
from forgetting.costs.site import Site
from forgetting.records import read_json, removal
from forgetting.settings.study import Study


@dataclass(frozen=True)
class Compared:
    """A finished run: seconds that were measured, and that would have been forecast of it.

    Attributes:
        training: of its steps, measured and forecast.
        rest: of loading the base, evaluations and checkpoints, measured and forecast.
        memory: largest use of the device, or of the process, in 10^9 bytes; likewise.
    """

    run: str
    device: str
    tokens_per_second: float
    training: tuple[float, float]
    rest: tuple[float, float]
    memory: tuple[float, float]


def finished_runs(results: Path) -> list[dict[str, Any]]:
    """The records of a study's runs, as soon as each is done; not those of budgets' branches."""
    paths = sorted(results.glob("state/*/seed*/*/*/run.json"))
    return [read_json(path, removal(path.parent)) for path in paths]


def compare(costs: Costs, records: Iterable[Mapping[str, Any]]) -> list[Compared]:
    """All runs that ended well, whatever device they ran on."""
    found = []
    for record in records:
        method, seed = str(record["run"]).split("/")[:2]
        planned = int(seed.removeprefix("seed")) in costs.study.seeds
        if (
            planned
            and method in costs.tunings
            and record["status"] == "ok"
            and record["steps"]
            and _is_as_planned(costs, method, record)
        ):
            found.append(_compare(costs, method, record))
    return found


def _is_as_planned(costs: Costs, name: str, record: Mapping[str, Any]) -> bool:
    """Did as many runs share the passes as would by what the study says now?"""
    passes = costs.case.passes(costs.cohorts[name], Team(record.get("processes", 1)))
    return int(record["trained_together"]) in {len(part) for part in passes}


def _compare(costs: Costs, name: str, record: Mapping[str, Any]) -> Compared:
    """What was measured is of one run; of fused ones, its share.

    Args:
        name: of its method, or of the cohort in which several are trained together.
    """
    cohort, team = costs.cohorts[name], Team(record.get("processes", 1))
    steps, evaluations = int(record["steps"]), len(record["points"])
    stages = cohort_seconds(costs.case, cohort, team, steps, evaluations)
    runs = sum(len(tuning.settings) for tuning in cohort)
    training = float(record["training_seconds"])
    rest = float(record["wall_seconds"]) - training
    peak = costs.of("finetune", {"method": name})
    told = peak.device_bytes if costs.case.device.is_gpu else peak.host_bytes
    return Compared(
        run=str(record["run"]),
        device=str(record["device"]),
        tokens_per_second=float(record["tokens_per_second"]),
        training=(training, stages["training"] / runs),
        rest=(rest, sum(stages[name] for name in ("load", "probes", "checkpoints")) / runs),
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


def site_of(recorded: str) -> Site | None:
    """A machine with the device of a record; None where it is not in the table of devices."""
    if threads := re.match(r"CPU, (\d+) of", recorded):
        machines = {"device": "CPU", "count": 1, "gpus": 1, "cpus": int(threads[1])}
        return Site.model_validate({"machines": machines})
    name = next((name for name in GPUS if is_device(recorded, name)), None)
    return Site.model_validate({"machines": {"device": name}}) if name else None


def by_method(study: Study, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Forecast and measured of each method and device: seconds of all its runs, largest memory."""
    rows = []
    for device in dict.fromkeys(str(record["device"]) for record in records):
        site = site_of(device)
        if site is None:
            continue
        costs = Costs(study, site)
        own = compare(costs, [record for record in records if record["device"] == device])
        for name, tuning in costs.tunings.items():
            runs = [each for each in own if each.run.split("/", 1)[0] == name]
            if runs:
                rows.append(_summed(tuning.label, device, runs))
    return rows


def _summed(label: str, device: str, runs: Sequence[Compared]) -> dict[str, Any]:
    row: dict[str, Any] = {"label": label, "device": device, "runs": len(runs)}
    for place, end in enumerate(("measured", "forecast")):
        row[f"training_{end}"] = sum(each.training[place] for each in runs)
        row[f"rest_{end}"] = sum(each.rest[place] for each in runs)
        row[f"memory_{end}"] = max(each.memory[place] for each in runs)
    return row
