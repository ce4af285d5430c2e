"""Jobs that Snakemake plans for a study, and how many of them are finished.

    python -m forgetting.pipeline.status study=tofu-phi-1.5

prints the jobs of every rule that are finished, running, pending or to come. A job is finished if
Snakemake would not run it again in the current folder. SLURM is queried once for running and
pending jobs. Nothing is run or changed, and a snakemake that runs is not disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from pathlib import Path

from forgetting.errors import InputError, reports_input_errors
from forgetting.pipeline.resources.job_costs import SUBMITTED
from forgetting.pipeline.slurm import QueuedJob, queued_jobs
from forgetting.study.load import load_study

SNAKEFILE = Path(__file__).resolve().parents[3] / "Snakefile"
STATUS_COLUMNS = ["rule", "jobs", "finished", "running", "pending", "to come"]


@dataclass(frozen=True)
class PlannedJob:
    """A job of the plan.

    Attributes:
        after: numbers of the jobs that make what it reads.
        left: whether it is still to be run.
    """

    rule: str
    wildcards: Mapping[str, str]
    after: frozenset[int]
    left: bool = True


def planned_jobs(config: Mapping[str, str], everything: bool = True) -> dict[int, PlannedJob]:
    """Return all jobs by number, in Snakemake's order.

    Args:
        config: what `--config` says.
        everything: plan the whole study. Otherwise, the jobs that are done in the working folder
            are not `left`.

    Raises:
        InputError: Snakemake finds no plan; it says why.
    """
    from snakemake.api import SnakemakeApi
    from snakemake.settings.types import (
        ConfigSettings,
        DAGSettings,
        OutputSettings,
        Quietness,
        ResourceSettings,
    )

    printed = io.StringIO()
    # Dry runs print every job, even with --quiet.
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            with SnakemakeApi(OutputSettings(dryrun=True, quiet={Quietness.ALL})) as api:
                workflow = api.workflow(
                    snakefile=SNAKEFILE,
                    config_settings=ConfigSettings(config=dict(config)),
                    resource_settings=ResourceSettings(cores=1),
                )
                # A job that runs, or was killed, has left files that are not complete.
                dag = workflow.dag(DAGSettings(forceall=everything, force_incomplete=True))
                dag.execute_workflow(executor="dryrun")
                graph = workflow._workflow.dag
                numbers = {job: number for number, job in enumerate(graph.jobs)}
                return {
                    number: PlannedJob(
                        rule=job.rule.name,
                        wildcards=dict(job.wildcards.items()),
                        after=frozenset(numbers[before] for before in graph.dependencies[job]),
                        left=graph.needrun(job),
                    )
                    for job, number in numbers.items()
                }
        except Exception as error:
            raise InputError(f"Snakemake finds no plan: {error}") from error


def remaining_jobs(jobs: Mapping[int, PlannedJob]) -> dict[int, PlannedJob]:
    """Return the jobs that are still to be run, which wait only for each other."""
    left = {number: job for number, job in jobs.items() if job.left}
    return {number: replace(job, after=job.after & left.keys()) for number, job in left.items()}


def study_status(jobs: Iterable[PlannedJob], queue: Sequence[QueuedJob]) -> list[list[str]]:
    """Return a line for each rule, in the order of the jobs, and one for all.

    A job that has ended is to come until Snakemake has noticed its end.
    """
    jobs = [job for job in jobs if job.rule != "all"]
    every = Counter(job.rule for job in jobs)
    left = Counter(job.rule for job in jobs if job.left)
    pending = Counter(job.rule for job in queue if job.is_pending)
    running = Counter(job.rule for job in queue if not job.is_pending)
    lines = []
    for rule, count in every.items():
        counts = [count, count - left[rule], running[rule], pending[rule]]
        # One that was submitted again for the same files counts once.
        lines.append([*counts, max(0, left[rule] - running[rule] - pending[rule])])
    total = [sum(column) for column in zip(*lines, strict=True)]
    named = [*zip(every, lines, strict=True), ("in all", total)]
    return [STATUS_COLUMNS, *([name, *map(str, counts)] for name, counts in named)]


def format_table(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a text table, with all columns but the first aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Print the progress of a study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="*", help="as after --config: study=NAME scale=tiny ...")
    options = parser.parse_args(argv)
    config = dict(pair.partition("=")[::2] for pair in options.config)
    name, _ = load_study(config, SNAKEFILE.parent / "config" / "studies")
    queue = queued_jobs(Path.cwd(), Path("results", name))
    jobs = planned_jobs(config, everything=False)
    order = TopologicalSorter({number: job.after for number, job in jobs.items()}).static_order()
    ordered = [jobs[number] for number in order]
    print(*format_table(study_status(ordered, queue or [])), sep="\n")
    if queue is None:
        print("squeue does not answer: what runs and what is pending is counted as to come")
    elif not any(job.rule in SUBMITTED for job in queue):
        print("SLURM's queue holds no job of this folder")


if __name__ == "__main__":
    main()
