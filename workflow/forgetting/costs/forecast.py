"""What a study will cost, before anything is submitted: jobs, GPU-hours, time, memory, disk.

    python -m forgetting.costs.forecast --gpus 32 --device H100 study=tofu-phi-1.5

The jobs are those that Snakemake plans; seconds and bytes are counted (docs/cluster.md) and, where
runs of the study are done on such a device, corrected by what these took. Nothing is downloaded,
and no GPU is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from forgetting.costs.calibrate import Compared
from forgetting.costs.cost import ON_DEVICES, SUBMITTED, TRAINING, Costs
from forgetting.costs.jobs import SNAKEFILE, Planned, planned_jobs
from forgetting.costs.outlook import Forecast, as_values, forecast, gpu_seconds, with_machines
from forgetting.costs.site import read_site
from forgetting.costs.sizing import misfits
from forgetting.costs.volumes import texts
from forgetting.records import tells_input_errors, write_json
from forgetting.settings.load import load_study

ROOT = SNAKEFILE.parent


def told(found: Forecast, name: str) -> str:
    """The forecast as text."""
    if not found.jobs:
        return f"{name}: nothing is left to do"
    machines, costs = found.costs.site.machines, found.costs
    steps = [kind(found.jobs[number]) for number in found.path if found.of[number].seconds]
    disk, each = found.disk, "GPUs" if costs.case.device.is_gpu else "jobs at once"
    longest = sum(found.of[number].seconds for number in found.path) / 3600
    lines = [
        f"{name}: {len(found.jobs)} jobs, {found.gpu_hours:.1f} GPU-hours; "
        f"{span(3600 * found.wall_hours)} on {machines.device}, {machines.count} x "
        f"{machines.gpus} {each}",
        f"longest path, {span(3600 * longest)} however many there are: {' > '.join(steps)}",
        "",
        *table(rows(found)),
        "",
        "GPU-hours by stage: "
        + ", ".join(f"{stage} {share:.0%}" for stage, share in found.shares.items()),
        f"download {size(disk['download'])}; disk {size(disk['finished'])} when all is done, "
        f"at most {size(disk['most'])}",
        *notes(found),
    ]
    return "\n".join(lines)


def kind(job: Planned) -> str:
    """A job without its seed: `finetune full`."""
    named = [job.wildcards.get(key) for key in ("method", "budget", "task", "table", "model")]
    return " ".join(filter(None, [job.rule, *named]))


def rows(found: Forecast) -> list[list[str]]:
    """A line for each rule, and for each method of those that train: the largest of its jobs."""
    groups: dict[str, list[int]] = {}
    for number in sorted(found.jobs, key=lambda number: found.ends[number]):
        job = found.jobs[number]
        method = job.wildcards.get("method", "") if job.rule in TRAINING else ""
        groups.setdefault(f"{job.rule} {method}".strip(), []).append(number)
    groups.pop("all", None)
    lines = [["rule", "jobs", "GPUs", "time each", "GPU-hours", "on GPU", "memory", "disk"]]
    for name, numbers in groups.items():
        job, costs = found.jobs[numbers[0]], [found.of[number] for number in numbers]
        most = max(costs, key=lambda cost: cost.seconds)
        if job.rule not in SUBMITTED:
            lines.append([name, str(len(numbers)), "local", span(most.seconds), *["-"] * 4])
            continue
        hours = sum(gpu_seconds(job, cost) for cost in costs) / 3600
        on_device = job.rule in ON_DEVICES
        lines.append(
            [
                name,
                str(len(numbers)),
                str(most.team.processes if on_device else 0),
                span(most.seconds),
                f"{hours:.2f}" if on_device else "-",
                size(most.device_bytes) if on_device else "-",
                size(most.host_bytes),
                size(most.disk_bytes),
            ]
        )
    return lines


def table(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns of text, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def notes(found: Forecast) -> list[str]:
    """What the numbers rest on, and what they cannot tell."""
    costs, case = found.costs, found.costs.case
    lines = []
    if found.corrected.runs:
        by = found.corrected
        lines.append(
            f"corrected by {by.runs} runs that are done on such a device: training took "
            f"{by.training:.2f} of the time forecast, evaluations and checkpoints {by.rest:.2f}"
        )
    if not case.shape.known:
        lines.append("the size of the base is not known here: a guess of 7 billion weights")
    guessed = [
        table for table in dict.fromkeys(t for _, t in costs.study.tables())
        if not texts(costs.study, table).known
    ]  # fmt: skip
    if guessed:
        lines.append(f"rows and lengths are guessed of {', '.join(guessed)}")
    lines += misfits(costs)
    for name in costs.cohorts:
        cost = costs.of("finetune", {"method": name})
        if cost.seconds > 60 * costs.site.longest:
            lines.append(
                f"{name}: {span(cost.seconds)} are more than a job may run here; it goes on in "
                "retries, from its newest checkpoint"
            )
    if costs.study.selection.stop_after is not None:
        lines.append("runs may end earlier (selection.stop_after); here all go to their end")
    return lines


def measured(compared: Sequence[Compared]) -> list[str]:
    """Forecast against measured, for every run that is done."""
    lines = [["run", "device", "training", "forecast", "rest", "forecast", "memory", "forecast"]]
    for each in compared:
        seconds = (*each.training, *each.rest)
        memory = [f"{value:.1f} GB" for value in each.memory]
        lines.append([each.run, each.device, *map(span, seconds), *memory])
    return table(lines)


def span(seconds: float) -> str:
    """Seconds, minutes, hours or days, whichever is read most easily."""
    for length, unit in ((86400 * 2, "d"), (3600 * 2, "h"), (60 * 2, "min")):
        if seconds >= length:
            return f"{seconds / (length / 2):.1f} {unit}"
    return f"{seconds:.0f} s"


def size(count: float) -> str:
    """Bytes in units of thousands."""
    for unit, large in (("TB", 1e12), ("GB", 1e9)):
        if count >= large:
            return f"{count / large:.1f} {unit}"
    return f"{count / 1e6:.0f} MB"


@tells_input_errors
def main(argv: list[str] | None = None) -> None:
    """Print the forecast of a study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="*", help="as after --config: study=NAME scale=tiny ...")
    parser.add_argument(
        "--gpus", type=int, help="so many GPUs, or jobs on a CPU; by default the site's"
    )
    parser.add_argument(
        "--device", help="H100, H200, A100, L40S or CPU, this machine; by default the site's"
    )
    parser.add_argument("--left", action="store_true", help="only what is not done yet")
    parser.add_argument("--output", type=Path, help="write the numbers too (JSON)")
    options = parser.parse_args(argv)
    config = dict(pair.partition("=")[::2] for pair in options.config)
    name, study = load_study(config, ROOT / "config" / "studies")
    site = read_site(ROOT / "profiles" / "slurm" / "partitions.yaml")
    costs = Costs(study, with_machines(site, options.device, options.gpus))
    found = forecast(costs, planned_jobs(config, not options.left), Path("results", name))
    print(told(found, name))
    if found.compared:
        print("", *measured(found.compared), sep="\n")
    if options.output:
        write_json(options.output, as_values(found))


if __name__ == "__main__":
    main()
