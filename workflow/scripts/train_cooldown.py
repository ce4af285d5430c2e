"""Train the cooldown branches of one duration, for every run of a run group.

Processes, finished runs and checkpoints are those of `finetune.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forgetting.config.job_params import TrainCooldownParams
from forgetting.errors import reports_input_errors
from forgetting.io import read_json
from forgetting.training.branches import train_cooldowns
from forgetting.training.training_job import TrainingJob, run_training_job, training_parser


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the items of all evaluations, the trunk's among them, and the records of all runs."""
    parser = training_parser(__doc__)
    parser.add_argument("--trunks", type=Path, required=True, help="records of the trunks")
    options = parser.parse_args(argv)

    def train(params: TrainCooldownParams, job: TrainingJob) -> list[dict[str, Any]]:
        return train_cooldowns(job, params.duration, read_json(options.trunks))

    run_training_job(options, TrainCooldownParams, train)


if __name__ == "__main__":
    main()
