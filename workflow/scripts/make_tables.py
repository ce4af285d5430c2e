"""Gather the results of all jobs of a study in the tables that the report reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetting.config.job_params import MakeTablesParams
from forgetting.errors import reports_input_errors
from forgetting.io import write_atomically, write_json, write_table
from forgetting.pipeline.resources.forecast import forecast_against_measured
from forgetting.results.job_results import provenance, read_job_results, tables_of


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write all tables (parquet), the records of the runs, and the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True, help="parameters (JSON)")
    parser.add_argument("--results", type=Path, required=True, help="folder of the results")
    parser.add_argument("--output", type=Path, required=True, help="folder of the tables")
    options = parser.parse_args(argv)
    params = MakeTablesParams.read(options.params)
    study = params.study
    found = read_job_results(study, options.results)
    tables, notes = tables_of(study, found)
    write_atomically(options.results / "study.json", study.model_dump_json(indent=2) + "\n")
    for name, table in tables.items():
        write_table(options.output / f"{name}.parquet", table)
    write_json(options.output / "runs.json", found.records)
    written = {
        "study": {"name": params.name, **study.model_dump(mode="json")},
        "provenance": provenance(options.results, found),
        "forecast": forecast_against_measured(study, found.trunks or found.records),
        "notes": notes,
    }
    write_json(options.output / "study.json", written)
    count = len(tables["items"])
    print(f"{len(tables['runs']) - 1} runs, {count:,} scored answers: {options.output}")


if __name__ == "__main__":
    main()
