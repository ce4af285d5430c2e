"""Run the programs that a model wrote, in a sandbox, and record how each ended."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetting.benchmarks.programs import ProgramOutcomes, read_programs, write_outcomes
from forgetting.benchmarks.sandbox import search_sandbox, unsafe_runner
from forgetting.errors import InputError, reports_input_errors
from forgetting.io import read_json


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Without a working sandbox nothing is run and the reason is recorded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=Path, required=True, help="what `benchmark` wrote")
    parser.add_argument("--sandbox", choices=["bubblewrap", "none"], required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="outcomes (JSON)")
    options = parser.parse_args(argv)
    programs = read_programs(read_json(options.programs))
    for program in programs:
        if not program.tests.strip():
            raise InputError(
                f"{options.programs}: item {program.item} of {program.task} has no tests, so that "
                "any program would pass; take the row out of the task's table"
            )
    sandbox, why = (
        (unsafe_runner(), "the study says `sandbox: none`")
        if options.sandbox == "none"
        else search_sandbox()
    )
    pairs = [(program.program, program.tests) for program in programs]
    outcomes = sandbox.run_programs(pairs, workers=options.workers) if sandbox else []
    executed = ProgramOutcomes(sandbox.name if sandbox else None, why, outcomes)
    write_outcomes(options.output, programs, executed)
    passed = sum(outcome.passed for outcome in outcomes)
    print(f"{passed} of {len(programs)} programs passed ({why})")


if __name__ == "__main__":
    main()
