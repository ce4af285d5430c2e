"""What Snakemake needs: paths, parameters, resources and forecasts of jobs, status and SLURM."""

from forgetting.pipeline.paths import first_output_folder, scored_models_folder
from forgetting.pipeline.pipeline import JobMessages, Pipeline, set_environment

__all__ = [
    "JobMessages",
    "Pipeline",
    "first_output_folder",
    "scored_models_folder",
    "set_environment",
]
