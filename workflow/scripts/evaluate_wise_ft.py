"""Measure the selected checkpoint of one run with its update scaled down, as WiSE-FT does."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from forgetting.benchmarks.scorer import models_to_score
from forgetting.config.job_params import EvaluateWiseFtParams
from forgetting.errors import reports_input_errors
from forgetting.evaluation.evaluate_models import LoadedBase, evaluate_wise_ft
from forgetting.io import write_table
from forgetting.models.loading import silence_libraries


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the items at every share; none if the run has no selected checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True, help="parameters (JSON)")
    parser.add_argument("--base", type=Path, required=True, help="record of the base")
    parser.add_argument("--probes", type=Path, nargs="+", required=True, help="NAME.jsonl")
    parser.add_argument(
        "--targets", type=Path, nargs="?", help="the base's predictions on the general text"
    )
    parser.add_argument("--selection", type=Path, required=True, help="choice of the method")
    parser.add_argument("--checkpoints", type=Path, required=True, help="its checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="items (parquet)")
    options = parser.parse_args(argv)
    silence_libraries()
    params = EvaluateWiseFtParams.read(options.params)
    (selected,) = models_to_score(options.selection, options.checkpoints, [params.model])
    if selected.checkpoint is None:
        write_table(options.output, pd.DataFrame())
        print(f"nothing to scale: {selected.reason}")
        return
    base = LoadedBase.load(options.base, params.precision)
    tables = evaluate_wise_ft(base, selected.checkpoint, params, options.probes, options.targets)
    items = pd.concat(tables, ignore_index=True)
    items.insert(0, "run", selected.run)
    items.insert(1, "step", selected.step)
    write_table(options.output, items)


if __name__ == "__main__":
    main()
