"""Fetch one table of a hub dataset at a pinned revision."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetting.hub import fetch_file
from forgetting.records import tells_input_errors, write_atomically


@tells_input_errors
def main(argv: list[str] | None = None) -> None:
    """TABLE.jsonl, or else TABLE.json, of the dataset's repository."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True, help="OWNER/NAME on the hub")
    parser.add_argument("--revision", required=True, help="commit of the dataset")
    parser.add_argument("--table", required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(argv)
    names = [f"{options.table}.jsonl", f"{options.table}.json"]
    path = fetch_file(options.dataset, options.revision, names)
    write_atomically(options.output, path.read_bytes())
    print(f"{options.dataset}/{options.table} at {options.revision}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
