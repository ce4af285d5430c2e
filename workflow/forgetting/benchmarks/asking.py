"""What a program is told of the benchmarks that it asks at every evaluation.

The base is asked by the program that scores it, tuned models by their trainings: the same items in
the same order and the same batches, in the same precision, since in bfloat16 the batch that an
item is read in has a say in its last digits. A model that has learned nothing so has no churn.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every program that asks them."""
    parser.add_argument("--along", help="JSON: the benchmarks of every evaluation")
    parser.add_argument("--along-code", help="digest of the code that asks them")
    parser.add_argument("--along-rows", nargs="*", default=[], help="TASK=FOLDER of SPLIT.jsonl")
    parser.add_argument(
        "--benchmarks", type=Path, nargs="?", help="output: items of benchmarks (parquet)"
    )


def read_along(options: argparse.Namespace, tokenizer: Any) -> Any | None:
    """What asks a model (`forgetting.benchmarks.along.Along`), if anything is to be asked.

    By its name, since the digest of what trains must not change with the side of the harness where
    a study asks nothing of it; where it does, it has a digest of its own.
    """
    if not options.along:
        return None
    module = importlib.import_module("forgetting.benchmarks.along")
    rows = (pair.split("=", 1) for pair in options.along_rows)
    return module.Along(
        module.AlongSpec.model_validate_json(options.along),
        {task: Path(folder) for task, folder in rows},
        tokenizer,
    )
