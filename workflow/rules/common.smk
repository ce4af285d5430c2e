"""The study that the configuration chooses, and what every rule takes from it."""

import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

sys.path.insert(0, str(Path(workflow.basedir) / "workflow"))

from forgetting.errors import InputError
from forgetting.pipeline import (
    JobMessages,
    Pipeline,
    first_output_folder,
    scored_models_folder,
    set_environment,
)

set_environment(
    Path(workflow.basedir),
    copies=bool(getattr(workflow.storage_settings, "default_storage_provider", None)),
)
JOB_MESSAGES = JobMessages()
logger.addFilter(JOB_MESSAGES)
try:
    PIPELINE = Pipeline.load(config, Path(workflow.basedir))
except InputError as error:
    raise WorkflowError(str(error)) from None
for warning in PIPELINE.warnings if workflow.is_main_process else ():
    logger.warning(warning)
os.environ.update(PIPELINE.environment())

STUDY, PATHS = PIPELINE.study, PIPELINE.paths
PARAMS, RESOURCES = PIPELINE.params, PIPELINE.resources


wildcard_constraints:
    duration=r"duration[^/]+",
    dataset=r"[^/]+",
    method=r"[^/]+",
    model=r"base|[^/]+/seed-?\d+(-duration[^/]+)?",
    owner=r"[^/]+",
    repository=r"[^/]+",
    revision=r"[0-9a-f]{40}",
    seed=r"-?\d+",
    task=r"[^/]+",
