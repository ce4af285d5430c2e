"""Select the hyperparameters and the checkpoints of one method."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetting.config.job_params import SelectCheckpointParams
from forgetting.errors import reports_input_errors
from forgetting.io import atomic_folder, write_json
from forgetting.training.selected_checkpoints import TrainedRuns, select_checkpoints


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the selection (JSON) and a folder with the checkpoint of each seed that has one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True, help="parameters (JSON)")
    parser.add_argument("--base-items", type=Path, required=True, help="scores of the base")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="records of the runs")
    parser.add_argument(
        "--stored", type=Path, nargs="+", required=True, help="where the runs' checkpoints are"
    )
    parser.add_argument("--selection", type=Path, required=True, help="output: the choice (JSON)")
    parser.add_argument(
        "--checkpoints", type=Path, required=True, help="folder of the selected checkpoints"
    )
    parser.add_argument(
        "--index", type=Path, required=True, help="output: the choice again, in that folder"
    )
    options = parser.parse_args(argv)
    params = SelectCheckpointParams.read(options.params)
    runs = TrainedRuns.read(params, options.base_items, options.runs, options.stored)
    with atomic_folder(options.checkpoints) as folder:
        rows = select_checkpoints(runs, folder)
    write_json(options.index, rows)
    write_json(options.selection, rows)
    for row in rows:
        name = f"{row['method']}, seed {row['seed']}"
        print(f"{name}: {row['run']}, {row['status']}: {row['reason']}")


if __name__ == "__main__":
    main()
