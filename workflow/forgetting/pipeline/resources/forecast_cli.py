"""Forecast the cost of a study: jobs, GPU-hours, time, memory and disk.

    python -m forgetting.pipeline.resources.forecast_cli --gpus 32 --device H100 study=tofu-phi-1.5

The jobs are those that Snakemake plans. Seconds and bytes follow docs/design/resource-model.md, and
finished runs of the study on such a device correct them. It downloads nothing and needs no GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from forgetting.data.table_sizes import table_size
from forgetting.errors import reports_input_errors
from forgetting.io import write_json
from forgetting.pipeline.resources.forecast import (
    Forecast,
    MeasuredRun,
    forecast_study,
    forecast_values,
    gpu_seconds,
    with_machines,
)
from forgetting.pipeline.resources.hardware import read_site
from forgetting.pipeline.resources.job_costs import ON_DEVICES, SUBMITTED, TRAINING, JobCosts
from forgetting.pipeline.resources.requests import capacity_warnings
from forgetting.pipeline.status import (
    SNAKEFILE,
    PlannedJob,
    format_table,
    planned_jobs,
    remaining_jobs,
)
from forgetting.study.load import load_study


def format_forecast(found: Forecast, name: str) -> str:
    """Return the forecast as text."""
    if not found.jobs:
        return f"{name}: nothing is left to do"
    machines, costs = found.costs.site.machines, found.costs
    steps = [
        _kind(found.jobs[number]) for number in found.critical_path if found.of[number].seconds
    ]
    disk, each = found.disk, "GPUs" if costs.workload.device.is_gpu else "jobs at once"
    longest = sum(found.of[number].seconds for number in found.critical_path) / 3600
    lines = [
        f"{name}: {len(found.jobs)} jobs, {found.gpu_hours:.1f} GPU-hours; "
        f"{format_duration(3600 * found.wall_hours)} on {machines.device}, {machines.count} x "
        f"{machines.gpus} {each}",
        f"longest path, {format_duration(3600 * longest)} however many there are: "
        f"{' > '.join(steps)}",
        "",
        *format_table(_table_rows(found)),
        "",
        "GPU-hours by stage: "
        + ", ".join(f"{stage} {share:.0%}" for stage, share in found.shares.items()),
        f"download {format_bytes(disk['download'])}; disk {format_bytes(disk['finished'])} "
        f"when all is done, at most {format_bytes(disk['most'])}",
        *_notes(found),
    ]
    return "\n".join(lines)


def _kind(job: PlannedJob) -> str:
    """Return the rule and wildcards of a job without its seed: `finetune full`."""
    named = [job.wildcards.get(key) for key in ("method", "duration", "task", "table", "model")]
    return " ".join(filter(None, [job.rule, *named]))


def _table_rows(found: Forecast) -> list[list[str]]:
    """Return a row for each rule, and for each method of training rules, with its largest job."""
    groups: dict[str, list[int]] = {}
    for number in sorted(found.jobs, key=lambda number: found.end_times[number]):
        job = found.jobs[number]
        method = job.wildcards.get("method", "") if job.rule in TRAINING else ""
        groups.setdefault(f"{job.rule} {method}".strip(), []).append(number)
    groups.pop("all", None)
    lines = [["rule", "jobs", "GPUs", "time each", "GPU-hours", "on GPU", "memory", "disk"]]
    for name, numbers in groups.items():
        job, costs = found.jobs[numbers[0]], [found.of[number] for number in numbers]
        most = max(costs, key=lambda cost: cost.seconds)
        if job.rule not in SUBMITTED:
            lines.append(
                [name, str(len(numbers)), "local", format_duration(most.seconds), *["-"] * 4]
            )
            continue
        hours = sum(gpu_seconds(job, cost) for cost in costs) / 3600
        on_device = job.rule in ON_DEVICES
        lines.append(
            [
                name,
                str(len(numbers)),
                str(most.processes.processes if on_device else 0),
                format_duration(most.seconds),
                f"{hours:.2f}" if on_device else "-",
                format_bytes(most.device_bytes) if on_device else "-",
                format_bytes(most.host_bytes),
                format_bytes(most.disk_bytes),
            ]
        )
    return lines


def _notes(found: Forecast) -> list[str]:
    """Return what the numbers are based on, and their limits."""
    costs, size = found.costs, found.costs.workload.model_size
    lines = []
    if found.corrected.runs:
        by = found.corrected
        lines.append(
            f"corrected by {by.runs} runs that are done on such a device: training took "
            f"{by.training:.2f} of the time forecast, evaluations and checkpoints {by.rest:.2f}"
        )
    if not size.is_exact:
        lines.append("the size of the base is not known here: a guess of 7 billion weights")
    guessed = [
        table for table in dict.fromkeys(t for _, t in costs.study.tables())
        if not table_size(costs.study, table).is_exact
    ]  # fmt: skip
    if guessed:
        lines.append(f"rows and lengths are guessed of {', '.join(guessed)}")
    lines += capacity_warnings(costs)
    for name in costs.methods:
        cost = costs.of("finetune", {"method": name})
        if cost.seconds > 60 * costs.site.longest:
            lines.append(
                f"{name}: {format_duration(cost.seconds)} are more than a job may run here; it "
                "goes on in retries, from its newest checkpoint"
            )
    if costs.study.selection.stop_after_evaluations is not None:
        lines.append(
            "runs may end earlier (selection.stop_after_evaluations); here all go to their end"
        )
    return lines


def _measured_lines(compared: Sequence[MeasuredRun]) -> list[str]:
    """Return a table of forecast and measured values of every finished run."""
    lines = [["run", "device", "training", "forecast", "rest", "forecast", "memory", "forecast"]]
    for each in compared:
        seconds = (*each.training, *each.rest)
        memory = [f"{value:.1f} GB" for value in each.memory]
        lines.append([each.run, each.device, *map(format_duration, seconds), *memory])
    return format_table(lines)


def format_duration(seconds: float) -> str:
    """Return a duration in seconds, minutes, hours or days."""
    for length, unit in ((86400 * 2, "d"), (3600 * 2, "h"), (60 * 2, "min")):
        if seconds >= length:
            return f"{seconds / (length / 2):.1f} {unit}"
    return f"{seconds:.0f} s"


def format_bytes(count: float) -> str:
    """Return a number of bytes in MB, GB or TB."""
    for unit, large in (("TB", 1e12), ("GB", 1e9)):
        if count >= large:
            return f"{count / large:.1f} {unit}"
    return f"{count / 1e6:.0f} MB"


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Print the forecast of a study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="*", help="as after --config: study=NAME scale=tiny ...")
    parser.add_argument(
        "--gpus", type=int, help="number of GPUs, or of jobs on a CPU; by default the site's"
    )
    parser.add_argument(
        "--device", help="H100, H200, A100, L40S or CPU, this machine; by default the site's"
    )
    parser.add_argument("--left", action="store_true", help="only what is not done yet")
    parser.add_argument("--output", type=Path, help="write the numbers too (JSON)")
    options = parser.parse_args(argv)
    config = dict(pair.partition("=")[::2] for pair in options.config)
    name, study = load_study(config, SNAKEFILE.parent / "config" / "studies")
    site = read_site(SNAKEFILE.parent / "profiles" / "slurm" / "partitions.yaml")
    costs = JobCosts(study, with_machines(site, options.device, options.gpus))
    jobs = remaining_jobs(planned_jobs(config, everything=not options.left))
    found = forecast_study(costs, jobs, Path("results", name))
    print(format_forecast(found, name))
    if found.compared:
        print("", *_measured_lines(found.compared), sep="\n")
    if options.output:
        write_json(options.output, forecast_values(found))


if __name__ == "__main__":
    main()
