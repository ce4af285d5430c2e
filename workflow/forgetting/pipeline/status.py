"""Progress of a study: jobs of every rule that are finished, running, pending or to come.

    python -m forgetting.pipeline.status study=tofu-phi-1.5

A job is finished if Snakemake would not run it again in the current folder. SLURM is queried once
for running and pending jobs. Nothing is changed, and a snakemake that runs is not disturbed.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from graphlib import TopologicalSorter
from pathlib import Path

from forgetting.errors import reports_input_errors
from forgetting.pipeline.planned_jobs import PlannedJob, unfinished_jobs
from forgetting.pipeline.resources.forecast_cli import ROOT, format_table
from forgetting.pipeline.resources.job_costs import SUBMITTED
from forgetting.pipeline.slurm import QueuedJob, queued_jobs
from forgetting.study.load import load_study

STATUS_COLUMNS = ["rule", "jobs", "finished", "running", "pending", "to come"]


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


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Print the progress of a study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="*", help="as after --config: study=NAME scale=tiny ...")
    options = parser.parse_args(argv)
    config = dict(pair.partition("=")[::2] for pair in options.config)
    name, _ = load_study(config, ROOT / "config" / "studies")
    queue = queued_jobs(Path.cwd(), Path("results", name))
    jobs = unfinished_jobs(config)
    order = TopologicalSorter({number: job.after for number, job in jobs.items()}).static_order()
    ordered = [jobs[number] for number in order]
    print(*format_table(study_status(ordered, queue or [])), sep="\n")
    if queue is None:
        print("squeue does not answer: what runs and what is pending is counted as to come")
    elif not any(job.rule in SUBMITTED for job in queue):
        print("SLURM's queue holds no job of this folder")


if __name__ == "__main__":
    main()
