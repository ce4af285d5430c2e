"""Score the base model on every probe: the zero point of forgetting."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetting.benchmarks.during_training import TrainingBenchmarks
from forgetting.config.job_params import EvaluateBaseParams
from forgetting.errors import reports_input_errors
from forgetting.evaluation.evaluate_models import LoadedBase, base_notes, evaluate_base
from forgetting.io import write_table
from forgetting.models.loading import silence_libraries


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the base's scores, its predictions on the general text, and its benchmark items."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True, help="parameters (JSON)")
    parser.add_argument("--base", type=Path, required=True, help="record of the base")
    parser.add_argument("--probes", type=Path, nargs="+", required=True, help="NAME.jsonl")
    parser.add_argument("--text", type=Path, nargs="?", help="table of the general text")
    parser.add_argument(
        "--targets", type=Path, nargs="?", help="output: the base's predictions on the text"
    )
    parser.add_argument(
        "--benchmarks", type=Path, nargs="?", help="output: items of benchmarks (parquet)"
    )
    parser.add_argument("--output", type=Path, required=True, help="items (parquet)")
    options = parser.parse_args(argv)
    silence_libraries()
    params = EvaluateBaseParams.read(options.params)
    base = LoadedBase.load(options.base, params.precision)
    items = evaluate_base(base, params, options.probes, options.text, options.targets)
    if benchmarks := TrainingBenchmarks.of(
        params.training_benchmarks, params.benchmark_rows, base.tokenizer
    ):
        with base.autocast():
            write_table(options.benchmarks, benchmarks(base.model))
    write_table(options.output, items)
    print(*base_notes(items, params), sep="\n")


if __name__ == "__main__":
    main()
