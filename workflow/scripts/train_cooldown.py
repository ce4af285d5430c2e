"""Train the cooldown branches of one duration, for every run of a run group.

Processes, finished runs and checkpoints are those of `finetune.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetting.errors import reports_input_errors
from forgetting.io import read_json, write_json, write_table
from forgetting.models.loading import silence_libraries
from forgetting.pipeline.params import TrainCooldownParams
from forgetting.training.branches import train_cooldowns
from forgetting.training.distributed import ProcessGroup
from forgetting.training.training_job import (
    ProgressLogger,
    add_training_options,
    read_training_job,
    run_group_items,
    write_checkpoint_index,
)


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the items of all evaluations, the trunk's among them, and the records of all runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_training_options(parser)
    parser.add_argument("--trunks", type=Path, required=True, help="records of the trunks")
    options = parser.parse_args(argv)
    silence_libraries()
    process_group = ProcessGroup.init()
    with process_group.report_once():
        params = TrainCooldownParams.read(options.params)
        job = read_training_job(
            params.run_group,
            params.versions,
            params.training_benchmarks,
            params.benchmark_rows,
            options,
            process_group,
        )
        records = train_cooldowns(
            job.config,
            params.duration,
            read_json(options.trunks),
            job.context,
            job.inputs,
            options.state,
            ProgressLogger(process_group),
        )
        if process_group.is_main:
            write_table(options.items, run_group_items(records)[0])
            write_json(options.runs, records)
            write_checkpoint_index(options.checkpoints, records)
    process_group.destroy()


if __name__ == "__main__":
    main()
