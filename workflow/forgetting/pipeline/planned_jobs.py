"""Jobs that Snakemake plans for a study, and the jobs that each waits for. Nothing is run."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from forgetting.errors import InputError

SNAKEFILE = Path(__file__).resolve().parents[3] / "Snakefile"


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
        everything: plan the whole study; otherwise, what is not done yet in the working folder.

    Raises:
        InputError: Snakemake finds no plan; it says why.
    """
    if everything:
        return _jobs(config, everything=True)
    left = {number: job for number, job in unfinished_jobs(config).items() if job.left}
    return {number: replace(job, after=job.after & left.keys()) for number, job in left.items()}


def unfinished_jobs(config: Mapping[str, str]) -> dict[int, PlannedJob]:
    """Return all jobs by number, including those that are done in the working folder."""
    return _jobs(config, everything=False)


def _jobs(config: Mapping[str, str], everything: bool) -> dict[int, PlannedJob]:
    from snakemake.api import SnakemakeApi
    from snakemake.settings.types import (
        ConfigSettings,
        DAGSettings,
        OutputSettings,
        Quietness,
        ResourceSettings,
    )

    printed = io.StringIO()
    # Dry runs print every job, however quiet they are asked to be.
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
