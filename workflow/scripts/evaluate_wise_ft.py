"""Measure the selected checkpoint of one run with its update scaled down, as WiSE-FT does."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from forgetting.benchmarks.scoring_job import models_to_score
from forgetting.data.tables import read_prepared
from forgetting.errors import reports_input_errors
from forgetting.evaluation.divergence import append_divergence, load_base_predictions
from forgetting.evaluation.probes import evaluate_probes
from forgetting.io import write_table
from forgetting.models.loading import (
    autocast,
    get_device,
    load_base,
    load_tokenizer,
    read_base,
    resolve_precision,
    silence_libraries,
)
from forgetting.models.tuned import load_tuned
from forgetting.models.wise_ft import interpolated_models
from forgetting.pipeline.params import EvaluateWiseFtParams


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
    (chosen,) = models_to_score(options.selection, options.checkpoints, [params.model])
    if chosen.checkpoint is None:
        write_table(options.output, pd.DataFrame())
        print(f"nothing to scale: {chosen.reason}")
        return
    device = get_device()
    base = read_base(options.base)
    folder, count = Path(base["path"]), base["parameters"]
    probes = {path.stem: read_prepared(path) for path in options.probes}
    tokenizer, model = load_tokenizer(folder), load_base(folder, device, count)
    tuned = load_tuned(folder, chosen.checkpoint, device, count)
    targets = load_base_predictions(options.targets) if options.targets else None
    tables = []
    for share, scaled in interpolated_models(model, tuned, params.shares):
        with autocast(device, resolve_precision(params.precision, device)):
            items = evaluate_probes(scaled, tokenizer, probes, params.prompt, params.evaluation)
            items = append_divergence(items, scaled, targets)
        about = {"run": chosen.run, "step": chosen.step, "share": share}
        tables.append(items.assign(**about)[[*about, *items.columns]])
        for name in probes:
            group = items[items["probe"] == name]
            recall = group["rougeL_recall"].mean()
            print(f"{chosen.run}, {share:g} of the update, {name}: ROUGE-L recall {recall:.3f}")
    write_table(options.output, pd.concat(tables, ignore_index=True))


if __name__ == "__main__":
    main()
