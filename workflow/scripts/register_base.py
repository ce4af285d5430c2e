"""Check a base model that was trained elsewhere and record what it is."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetting.config.job_params import RegisterBaseParams
from forgetting.data.tokenize import chat_template_text, turn_ending
from forgetting.errors import reports_input_errors
from forgetting.inputs import model_identity
from forgetting.io import write_json
from forgetting.models.adapters import record_layers
from forgetting.models.architecture import read_model_layers
from forgetting.models.config_file import check_ids, placeholders
from forgetting.models.loading import check_config, check_stops, load_tokenizer, silence_libraries


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the layers of the model, then the record that names its folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True, help="parameters (JSON)")
    parser.add_argument("--layers", type=Path, required=True, help="layers of the base (JSON)")
    parser.add_argument("--output", type=Path, required=True, help="record of the base (JSON)")
    options = parser.parse_args(argv)
    silence_libraries()
    params = RegisterBaseParams.read(options.params)
    folder = params.folder
    read_model_layers(folder)  # checks the files
    check_config(folder)
    model = record_layers(folder, options.layers)
    tokenizer = load_tokenizer(folder)
    check_stops(folder, tokenizer)
    rows = len(model.get_input_embeddings().weight)
    check_ids(folder, tokenizer.get_vocab(), rows, placeholders(folder))
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
        "parameters": model.num_parameters(),
        "downloaded": params.downloaded,
    }
    write_json(options.output, record)
    print(f"{params.origin}: {record['parameters']:,} parameters")


if __name__ == "__main__":
    main()
