"""The jobs that Snakemake plans for a study, and what each waits for; nothing is run."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from forgetting.records import InputError

SNAKEFILE = Path(__file__).resolve().parents[3] / "Snakefile"


@dataclass(frozen=True)
class Planned:
    """A job of the plan.

    Attributes:
        after: numbers of the jobs that make what it reads.
    """

    rule: str
    wildcards: Mapping[str, str]
    after: frozenset[int]


def planned_jobs(config: Mapping[str, str], everything: bool = True) -> dict[int, Planned]:
    """All jobs by number, in Snakemake's order.

    Args:
        config: what `--config` says.
        everything: plan the whole study, else what is not done yet in the working folder.

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

    told = io.StringIO()
    # Dry runs print every job, however quiet they are asked to be.
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            with SnakemakeApi(OutputSettings(dryrun=True, quiet={Quietness.ALL})) as api:
                workflow = api.workflow(
                    snakefile=SNAKEFILE,
                    config_settings=ConfigSettings(config=dict(config)),
                    resource_settings=ResourceSettings(cores=1),
                )
                dag = workflow.dag(DAGSettings(forceall=everything))
                dag.execute_workflow(executor="dryrun")
                graph = workflow._workflow.dag
                jobs = list(graph.jobs if everything else graph.needrun_jobs())
                numbers = {job: number for number, job in enumerate(jobs)}
                return {
                    number: Planned(
                        rule=job.rule.name,
                        wildcards=dict(job.wildcards.items()),
                        after=frozenset(
                            numbers[before]
                            for before in graph.dependencies[job]
                            if before in numbers
                        ),
                    )
                    for job, number in numbers.items()
                }
        except Exception as error:
            raise InputError(f"Snakemake finds no plan: {error}") from error
