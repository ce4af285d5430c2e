"""What the rules need: a study bound to its paths, parameters and resources."""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from snakemake_interface_logger_plugins.common import LogEvent

from forgetting.config.study import StudyConfig
from forgetting.digests import COPIES_VARIABLE, sha256_of_all
from forgetting.locks import (
    JOBS_LOCK,
    check_no_running_jobs,
    check_owner,
    lock_downloads,
    lock_results,
    study_origin,
)
from forgetting.pipeline.params import StudyParams
from forgetting.pipeline.paths import Paths
from forgetting.pipeline.resources.hardware import read_site
from forgetting.pipeline.resources.job_costs import JobCosts
from forgetting.pipeline.resources.requests import (
    Resources,
    capacity_warnings,
    check_single_node,
)
from forgetting.pipeline.slurm import SUBMITTED_FILE, cancel_orphaned_jobs
from forgetting.study.load import load_study, study_source
from forgetting.study.preflight import check_inputs
from forgetting.versions import source_digest


@dataclass(frozen=True)
class Pipeline:
    """A study and what its rules take from it.

    Attributes:
        study: with all defaults.
        origin: which study file the results belong to.
        paths: of every input and output.
        params: of every job.
        resources: of every job.
        warnings: jobs that need more memory than the site's GPUs have.
        assets: digest of the templates, style sheet and script of the page.
    """

    study: StudyConfig
    origin: str
    paths: Paths
    params: StudyParams
    resources: Resources
    warnings: list[str]
    assets: str

    @classmethod
    def load(cls, config: Mapping[str, Any], basedir: Path) -> Self:
        """Load the study that a configuration chooses, and check all that needs no job.

        Args:
            config: what config.yaml and `--config` say.
            basedir: folder of the Snakefile.

        Raises:
            InputError: names the key or file that is wrong.
        """
        studies = basedir / "config" / "studies"
        name, study = load_study(config, studies)
        source = study_source(config, studies)
        origin = study_origin(source.path, studies)
        check_owner(Path("results", name), origin)
        paths = Paths(study, name)
        check_inputs(study, source.locate, Path(paths.base_layers))
        costs = JobCosts(study, read_site(basedir / "profiles" / "slurm" / "partitions.yaml"))
        check_single_node(costs)
        library = basedir / "workflow"
        code = source_digest(library) if config.get("rerun_on_code_change") else None
        templates = library / "forgetting" / "report" / "templates"
        return cls(
            study=study,
            origin=origin,
            paths=paths,
            params=StudyParams(study, name, paths, code),
            resources=Resources(costs),
            warnings=capacity_warnings(costs),
            assets=sha256_of_all(sorted(templates.iterdir()))[1],
        )

    def environment(self) -> dict[str, str]:
        """Return the variables by which jobs find the study's locks."""
        results = Path(self.paths.results)
        return {
            "FORGETTING_JOBS_LOCK": str((results / JOBS_LOCK).absolute()),
            "FORGETTING_SUBMITTED": str((results / SUBMITTED_FILE).absolute()),
        }

    def start(self, jobs: Iterable[Any], outputs: Iterable[Any]) -> list[str]:
        """Lock the study, end jobs of a killed snakemake, and write the parameters of jobs.

        Args:
            jobs: of Snakemake, which are about to run.
            outputs: of all jobs of the plan.

        Returns:
            Messages about jobs that were ended.

        Raises:
            InputError: another snakemake or a job writes the same files.
        """
        results = Path(self.paths.results)
        lock_results(results, self.origin)
        messages = cancel_orphaned_jobs(Path.cwd(), Path("logs/slurm"), results)
        check_no_running_jobs(results)
        planned = map(str, outputs)
        lock_downloads(path for path in planned if path.startswith("resources/"))
        for job in jobs:
            self.params.write(job.rule.name, job.wildcards)
        return messages


def set_environment(basedir: Path, copies: bool) -> None:
    """Set the variables that every program of a rule needs.

    Args:
        basedir: folder of the Snakefile.
        copies: jobs get copies of their inputs, without the hidden files that record digests.
    """
    library = basedir / "workflow"
    # Programs are run by the Python that runs Snakemake, also where its environment is not active.
    folders = [str(Path(sys.executable).parent), os.getenv("PATH", os.defpath)]
    if shutil.which("sbatch"):
        # A wrapper of sbatch that waits for a controller which does not answer.
        folders.insert(0, str(basedir / "profiles" / "slurm" / "bin"))
        os.environ["FORGETTING_SNAKEMAKE"] = str(os.getpid())
        os.environ.pop("FORGETTING_SBATCH", None)
    os.environ.update(
        PYTHONPATH=str(library), SCRIPTS=str(library / "scripts"), PATH=os.pathsep.join(folders)
    )
    defaults = {
        # Only the download rules may use the network; elsewhere a missing file is an error at once.
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # A job that SLURM restarts would otherwise overwrite its log.
        "SBATCH_OPEN_MODE": "append",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if copies:
        os.environ[COPIES_VARIABLE] = "1"


MAX_LISTED_FILES = 2
"""Files that Snakemake names for each reason to run a job."""

_LISTED_FILES = re.compile(r"(?<=files: )[^;]+|(?<=by another job: )[^;]+")


class JobMessages(logging.Filter):
    """Shortens the reasons of jobs in Snakemake's messages, and remembers the jobs that failed.

    A job of this workflow may have hundreds of inputs and outputs, all of which Snakemake lists as
    reasons to run it. It prints the command of a failed job, and other messages, below the error.
    """

    def __init__(self) -> None:
        super().__init__()
        self._failed: dict[int, Sequence[str]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record of a message of Snakemake; none is dropped."""
        message = vars(record)
        event = message.get("event")
        if event == LogEvent.JOB_INFO:
            record.reason = _LISTED_FILES.sub(_first_files, message["reason"])
        elif event == LogEvent.JOB_ERROR:
            self._failed[message["jobid"]] = message["log"]
        elif event == LogEvent.JOB_FINISHED:  # a retry
            self._failed.pop(message["job_id"], None)
        return True

    def print_errors_at_exit(self) -> None:
        """Print the last line of the log of every failed job, below all messages of Snakemake."""
        for log in [Path(log) for logs in self._failed.values() for log in logs]:
            lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
            if last := next(filter(None, reversed(lines)), ""):
                atexit.register(print, f"{log}: {last}", file=sys.stderr)


def _first_files(listed: re.Match[str]) -> str:
    files = sorted(listed[0].split(", "))
    if len(files) <= MAX_LISTED_FILES + 1:
        return ", ".join(files)
    return f"{', '.join(files[:MAX_LISTED_FILES])} and {len(files) - MAX_LISTED_FILES} others"
