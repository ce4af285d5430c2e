"""Check the study's tables and write what the later stages read, with its provenance."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetting.config.job_params import PrepareDataParams
from forgetting.errors import reports_input_errors
from forgetting.study.prepare import prepare_data


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write train.jsonl, probes/NAME.jsonl, documents.jsonl and data.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True, help="parameters (JSON)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the prepared data")
    options = parser.parse_args(argv)
    prepared = prepare_data(PrepareDataParams.read(options.params), options.output)
    for note in [*prepared.notes, *prepared.warnings]:
        print(f"warning: {note}")
    print(", ".join(f"{name}: {count:,} rows" for name, count in prepared.counts.items()))


if __name__ == "__main__":
    main()
