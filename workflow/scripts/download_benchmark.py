"""Fetch the rows of one benchmark from the hub at a pinned revision, as JSON lines."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetting.benchmarks.registry import benchmark, required_splits
from forgetting.data.hub import HUB_DATASETS, HubDataset, fetch_rows
from forgetting.errors import reports_input_errors
from forgetting.io import write_jsonl


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """One file per split that the task uses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, help="name of the task")
    parser.add_argument("--revision", required=True, help="commit of its dataset")
    parser.add_argument("--output", type=Path, required=True, help="folder of SPLIT.jsonl")
    options = parser.parse_args(argv)
    dataset, config = benchmark(options.task).dataset
    known = HUB_DATASETS.get(options.task)
    # Examples are counted as one, so that the split that they are drawn from is fetched too.
    splits = known.splits if known else tuple(required_splits(options.task, num_fewshot=1))
    origin = HubDataset(dataset, config, options.revision, splits)
    for split in origin.splits:
        rows = fetch_rows(origin, split)
        write_jsonl(options.output / f"{split}.jsonl", rows)
        print(f"{options.task}, {split}: {len(rows):,} rows")


if __name__ == "__main__":
    main()
