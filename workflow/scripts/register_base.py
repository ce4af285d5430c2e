"""Check a base model that was trained elsewhere and record what it is."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetting.config.job_params import RegisterBaseParams
from forgetting.data.tokenize import chat_template_text, turn_ending
from forgetting.errors import reports_input_errors
from forgetting.inputs import model_identity
from forgetting.io import write_json
from forgetting.models.architecture import read_model_layers
from forgetting.models.config_file import check_ids, placeholders
from forgetting.models.loading import (
    check_config,
    check_stops,
    load_tokenizer,
    model_parameters,
    silence_libraries,
)


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the record that names the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True, help="parameters (JSON)")
    parser.add_argument("--output", type=Path, required=True, help="record of the base (JSON)")
    options = parser.parse_args(argv)
    silence_libraries()
    params = RegisterBaseParams.read(options.params)
    folder = params.folder
    architecture = read_model_layers(folder)
    check_config(folder)
    tokenizer = load_tokenizer(folder)
    check_stops(folder, tokenizer)
    if architecture.rows is not None:
        unused = placeholders(folder)
        check_ids(folder, tokenizer.get_vocab(), architecture.rows, unused)
    if params.prompt:
        # Errors of the chat template are found before anything is trained.
        chat_template_text(tokenizer, params.prompt)
        turn_ending(tokenizer, params.prompt)
    files, identity = model_identity(folder)
    record = {
        "path": str(folder),
        "origin": params.origin,
        "identity": identity,
        "files": files,
        "parameters": model_parameters(folder),
        "downloaded": params.downloaded,
    }
    write_json(options.output, record)
    print(f"{params.origin}: {record['parameters']:,} parameters")


if __name__ == "__main__":
    main()
