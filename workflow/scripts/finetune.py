"""Train one run group: all learning rates and weight decays of a method and seed.

`python -m forgetting.training.launch` starts several processes, which train each run together.
Finished runs and checkpoints are kept in a folder that is not an output of the rule, so that a
retry resumes where the job was killed.
"""

from __future__ import annotations

import argparse

from forgetting.errors import reports_input_errors
from forgetting.io import write_json, write_table
from forgetting.models.loading import silence_libraries
from forgetting.pipeline.params import FinetuneParams
from forgetting.training.branches import train_trunks
from forgetting.training.distributed import ProcessGroup
from forgetting.training.run_group import train_run_group
from forgetting.training.training_job import (
    ProgressLogger,
    add_training_options,
    read_training_job,
    run_group_items,
    write_checkpoint_index,
)


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the items of all evaluations and the records of all runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_training_options(parser)
    options = parser.parse_args(argv)
    silence_libraries()
    process_group = ProcessGroup.init()
    with process_group.report_once():
        params = FinetuneParams.read(options.params)
        job = read_training_job(
            params.run_group,
            params.versions,
            params.training_benchmarks,
            params.benchmark_rows,
            options,
            process_group,
        )
        train = train_trunks if job.config.training.durations else train_run_group
        records = train(
            job.config, job.context, job.inputs, options.state, ProgressLogger(process_group)
        )
        if process_group.is_main:
            items, benchmarks = run_group_items(records)
            write_table(options.items, items)
            if options.benchmarks:
                write_table(options.benchmarks, benchmarks)
            write_json(options.runs, records)
            write_checkpoint_index(options.checkpoints, records)
    process_group.destroy()


if __name__ == "__main__":
    main()
