"""Train a small base model from scratch on the study's documents."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

from forgetting.config.job_params import PretrainBaseParams
from forgetting.data.tables import read_prepared
from forgetting.errors import reports_input_errors
from forgetting.inputs import model_identity
from forgetting.io import write_json
from forgetting.models.adapters import record_layers
from forgetting.models.loading import PRETRAINED, get_device, resolve_precision, silence_libraries
from forgetting.system import describe_computation
from forgetting.training.distributed import SINGLE_PROCESS
from forgetting.training.pretrain import pretrain
from forgetting.training.training_job import ProgressLogger


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the model's folder and its layers, then the record that names it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True, help="parameters (JSON)")
    parser.add_argument("--documents", type=Path, required=True, help="JSON lines with `text`")
    parser.add_argument("--folder", type=Path, required=True, help="of the model")
    parser.add_argument("--state", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--layers", type=Path, required=True, help="layers of the base (JSON)")
    parser.add_argument("--output", type=Path, required=True, help="record of the base (JSON)")
    options = parser.parse_args(argv)
    silence_libraries()
    params = PretrainBaseParams.read(options.params)
    folder = options.folder
    documents = [row["text"] for row in read_prepared(options.documents)]
    device = get_device()
    precision = resolve_precision(params.precision, device)
    log = partial(ProgressLogger(SINGLE_PROCESS), "pretraining")
    done = pretrain(documents, params.model, folder, options.state, params.seed, log, precision)
    record_layers(folder, options.layers)
    files, identity = model_identity(folder)
    record = {
        "path": str(folder),
        "origin": PRETRAINED,
        "identity": identity,
        "files": files,
        **asdict(done),
        **describe_computation(device, precision),
    }
    write_json(options.output, record)
    print(f"{done.parameters:,} parameters, {done.tokens:,} tokens, {done.seconds:.0f} s")


if __name__ == "__main__":
    main()
