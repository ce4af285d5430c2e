"""Train the branches of one budget: every run of a cohort, from its trunk to the end of its
cooldown.

Started alone or several times, like the program of the trunks. Like them, branches are kept in a
folder that is no output of the rule, and go on where they were killed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetting.models.loading import quieten_libraries
from forgetting.records import read_json, tells_input_errors, write_json, write_table
from forgetting.training.branches import train_branches
from forgetting.training.cohort import cohort_items, write_checkpoints
from forgetting.training.job import Teller, add_options, read_job
from forgetting.training.team import Team


@tells_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the items of all evaluations, the trunk's among them, and the records of all runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--budget", type=float, required=True, help="epochs of the branch")
    parser.add_argument("--trunks", type=Path, required=True, help="records of the trunks")
    options = parser.parse_args(argv)
    quieten_libraries()
    team = Team.join()
    with team.one_voice():
        job = read_job(options, team)
        records = train_branches(
            job.specs[0],
            options.budget,
            read_json(options.trunks),
            job.materials,
            job.inputs,
            options.state,
            Teller(team),
        )
        if team.first:
            write_table(options.items, cohort_items(records)[0])
            write_json(options.runs, records)
            write_checkpoints(options.checkpoints, records)
    team.leave()


if __name__ == "__main__":
    main()
