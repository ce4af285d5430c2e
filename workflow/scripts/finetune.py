"""Train one cohort: all learning rates and weight decays of a method and seed, or of several.

Started alone, or several times by `python -m forgetting.training.launch`, to train each run
together. Finished runs and checkpoints are kept in a folder that is no output of the rule, so that
a retry goes on where the job was killed.
"""

from __future__ import annotations

import argparse

from forgetting.models.loading import quieten_libraries
from forgetting.records import tells_input_errors, write_json, write_table
from forgetting.training.branches import train_trunks
from forgetting.training.cohort import cohort_items, train_cohort, write_checkpoints
from forgetting.training.job import Teller, add_options, read_job
from forgetting.training.team import Team


@tells_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the items of all evaluations and the records of all runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    options = parser.parse_args(argv)
    quieten_libraries()
    team = Team.join()
    with team.one_voice():
        job = read_job(options, team)
        train = train_trunks if job.specs[0].training.budgets else train_cohort
        records = train(job.specs, job.materials, job.inputs, options.state, Teller(team))
        if team.first:
            items, benchmarks = cohort_items(records)
            write_table(options.items, items)
            if options.benchmarks:
                write_table(options.benchmarks, benchmarks)
            write_json(options.runs, records)
            write_checkpoints(options.checkpoints, records)
    team.leave()


if __name__ == "__main__":
    main()
