"""Fetch the rows of one benchmark from the hub at a pinned revision, as JSON lines."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetting.hub import HUB_ROWS, fetch_rows
from forgetting.records import tells_input_errors, write_jsonl


@tells_input_errors
def main(argv: list[str] | None = None) -> None:
    """One file per split that the task uses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, choices=sorted(HUB_ROWS))
    parser.add_argument("--output", type=Path, required=True, help="folder of SPLIT.jsonl")
    options = parser.parse_args(argv)
    for split in HUB_ROWS[options.task].splits:
        rows = fetch_rows(HUB_ROWS[options.task], split)
        write_jsonl(options.output / f"{split}.jsonl", rows)
        print(f"{options.task}, {split}: {len(rows):,} rows")


if __name__ == "__main__":
    main()
