"""Train one run group: all learning rates and weight decays of a method and seed.

`python -m forgetting.training.launch` starts several processes, which train each run together.
Finished runs and checkpoints are kept in a folder that is not an output of the rule, so that a
retry resumes where the job was killed.
"""

from __future__ import annotations

from typing import Any

from forgetting.config.job_params import FinetuneParams
from forgetting.errors import reports_input_errors
from forgetting.training.branches import train_trunks
from forgetting.training.run_group import train_run_group
from forgetting.training.training_job import TrainingJob, run_training_job, training_parser


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the items of all evaluations and the records of all runs."""
    run_training_job(training_parser(__doc__).parse_args(argv), FinetuneParams, _train)


def _train(params: FinetuneParams, job: TrainingJob) -> list[dict[str, Any]]:
    train = train_trunks if params.run_group.training.durations else train_run_group
    return train(job)


if __name__ == "__main__":
    main()
