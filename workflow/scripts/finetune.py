"""Train one run group: all learning rates and weight decays of a method and seed, or of several.

Started alone, or several times by `python -m forgetting.training.launch`, to train each run
together. Finished runs and checkpoints are kept in a folder that is no output of the rule, so that
a retry goes on where the job was killed.
"""

from __future__ import annotations

import argparse

from forgetting.errors import reports_input_errors
from forgetting.io import write_json, write_table
from forgetting.models.loading import silence_libraries
from forgetting.pipeline.params import FinetuneParams
from forgetting.training.branches import train_trunks
from forgetting.training.distributed import ProcessGroup
from forgetting.training.run_group import run_group_items, train_run_group, write_checkpoint_index
from forgetting.training.training_job import ProgressLogger, add_training_options, read_training_job


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
        train = train_trunks if job.configs[0].training.durations else train_run_group
        records = train(
            job.configs, job.context, job.inputs, options.state, ProgressLogger(process_group)
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
