"""Fetch one table of a hub dataset at a pinned revision."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetting.data.hub import fetch_table
from forgetting.errors import reports_input_errors


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """TABLE.jsonl, TABLE.json or the parquet files of TABLE, as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True, help="OWNER/NAME on the hub")
    parser.add_argument("--revision", required=True, help="commit of the dataset")
    parser.add_argument("--table", required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(argv)
    fetch_table(options.dataset, options.revision, options.table, options.output)
    size = options.output.stat().st_size
    print(f"{options.dataset}/{options.table} at {options.revision}: {size:,} bytes")


if __name__ == "__main__":
    main()
