"""The plan of a study as Snakemake makes it, and the options of sbatch for its jobs."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from snakemake.api import SnakemakeApi
from snakemake.cli import parse_args
from snakemake.jobs import Job
from snakemake.settings.types import (
    ConfigSettings,
    DAGSettings,
    OutputSettings,
    Quietness,
    ResourceSettings,
    StorageSettings,
)
from snakemake_executor_plugin_slurm.partitions import get_best_partition, read_partition_file
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted(path.stem for path in (ROOT / "config" / "studies").glob("*.yaml"))
GOLDEN = ROOT / "tests" / "golden" / "sbatch.txt"


@contextmanager
def restore_process() -> Iterator[None]:
    """Restore what the Snakefile changes: environment, import path, folder and logging."""
    environment, path, folder = dict(os.environ), list(sys.path), Path.cwd()
    yield
    os.chdir(folder)
    sys.path[:] = path
    os.environ.clear()
    os.environ.update(environment)
    logging.getLogger("snakemake").handlers.clear()


def planned(workdir: Path, study: str | Path, profile: str = "default", **config: Any) -> list[Job]:
    """Return all jobs of a study in an empty folder, without running any."""
    return list(_executed(workdir, study, profile, "dryrun", True, config).jobs)


def due(workdir: Path, study: str | Path, **config: Any) -> dict[str, int]:
    """Return how many jobs of each rule would run in a folder."""
    dag = _executed(workdir, study, "default", "dryrun", False, config)
    jobs = dag.needrun_jobs(exclude_finished=False)
    return dict(Counter(job.rule.name for job in jobs if job.rule.name != "all"))


def pretend_finished(workdir: Path, study: str | Path, **config: Any) -> None:
    """Create every output of a study, empty, with the records that Snakemake keeps of its jobs."""
    for job in planned(workdir, study, **config):
        for path in job.output:
            made = workdir / path
            (made if path.is_directory else made.parent).mkdir(parents=True, exist_ok=True)
            if not path.is_directory:
                made.touch()
    _executed(workdir, study, "default", "touch", True, config)


def _executed(
    workdir: Path,
    study: str | Path,
    profile: str,
    executor: str,
    force: bool,
    config: dict[str, Any],
) -> Any:
    """Return the graph of jobs after an executor that runs no program."""
    if not (workdir / "config").exists():
        (workdir / "config").symlink_to(ROOT / "config")
    arguments, resources, storage, kind = _profile_settings(profile)
    output = OutputSettings(dryrun=executor == "dryrun", quiet={Quietness.ALL})
    with SnakemakeApi(output) as api:
        workflow = api.workflow(
            snakefile=ROOT / "Snakefile",
            workdir=workdir,
            config_settings=ConfigSettings(config={"study": str(study), **config}),
            resource_settings=resources,
            storage_settings=storage,
        )
        triggers = arguments.rerun_triggers
        dag = workflow.dag(DAGSettings(forceall=force, rerun_triggers=triggers))
        dag.execute_workflow(executor=kind, pseudo_executor=executor)
        return workflow._workflow.dag  # the API has no public access to it


def parse_options(*options: str) -> Any:
    """Return the arguments that Snakemake parses from options and the profiles of the checkout."""
    folder, argv = Path.cwd(), sys.argv
    os.chdir(ROOT)
    sys.argv = ["snakemake", *options]  # profiles/default reads it
    try:
        return parse_args([*options])[1]
    finally:
        os.chdir(folder)
        sys.argv = argv


def _profile_settings(profile: str) -> tuple[Any, ResourceSettings, StorageSettings, str]:
    options = ["--dry-run"] if profile == "default" else ["--profile", profile, "--dry-run"]
    arguments = parse_options(*options)
    settings = ResourceSettings(
        cores=arguments.cores,
        nodes=arguments.jobs,
        resources=arguments.resources,
        default_resources=arguments.default_resources,
        overwrite_resources=arguments.set_resources,
        overwrite_threads=arguments.set_threads,
    )
    storage = StorageSettings(
        default_storage_provider=arguments.default_storage_provider,
        default_storage_prefix=arguments.default_storage_prefix,
    )
    return arguments, settings, storage, arguments.executor or "local"


def local_rules() -> list[str]:
    """Return the local rules. In a plan without execution Snakemake calls all rules local."""
    text = "".join(path.read_text() for path in sorted((ROOT / "workflow/rules").glob("*.smk")))
    rules = re.split(r"^ *rule (?=\w+:$)", text, flags=re.MULTILINE)[1:]
    return [rule.split(":", 1)[0] for rule in rules if "localrule: True" in rule]


def sbatch(job: Job) -> str:
    """Return the options of sbatch after the job's name, log and comment."""
    partitions = read_partition_file(ROOT / "profiles" / "slurm" / "partitions.yaml")
    partition = get_best_partition(partitions, job, logging.getLogger())
    parameters = {
        "run_uuid": "run",
        "slurm_logfile": "log",
        "comment_str": "comment",
        "account": "",
        "partition": f"-p {partition}" if partition else "",
        "workdir": None,
    }
    line = get_submit_command(job, parameters) + set_gres_string(job)
    return " ".join(line.split("--comment comment")[1].split())


def kinds(jobs: list[Job]) -> dict[str, str]:
    """Return the options of sbatch by kind of job: rule, method and duration."""
    local, found = ("all", *local_rules()), {}
    for job in jobs:
        if job.rule.name not in local:
            named = [job.wildcards.get(name) for name in ("method", "duration")]
            kind = " ".join(filter(None, [job.rule.name, *named]))
            assert found.setdefault(kind, sbatch(job)) == sbatch(job)
    return found


def golden_lines(study: str, jobs: list[Job]) -> list[str]:
    """Return the lines of a study for golden/sbatch.txt."""
    return sorted(f"{study}: {kind}: {line}" for kind, line in kinds(jobs).items())
