"""Fetch one table of a hub dataset at a pinned revision."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from forgetting.hub import fetch_file
from forgetting.records import tells_input_errors, write_atomically, write_jsonl


@tells_input_errors
def main(argv: list[str] | None = None) -> None:
    """TABLE.jsonl, or else TABLE.json or the one parquet file of CONFIG/SPLIT, as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True, help="OWNER/NAME on the hub")
    parser.add_argument("--revision", required=True, help="commit of the dataset")
    parser.add_argument("--table", required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(argv)
    table = options.table
    names = [f"{table}.jsonl", f"{table}.json", f"{table}-00000-of-00001.parquet"]
    path = fetch_file(options.dataset, options.revision, names)
    if path.suffix == ".parquet":
        rows = pd.read_parquet(path).to_dict("records")
        write_jsonl(options.output, ({str(key): row[key] for key in row} for row in rows))
    else:
        write_atomically(options.output, path.read_bytes())
    print(f"{options.dataset}/{table} at {options.revision}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
