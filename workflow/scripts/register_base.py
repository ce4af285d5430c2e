"""Check a base model that was trained elsewhere and record what it is."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetting.config.data import PromptConfig
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
    parser.add_argument("--model", type=Path, required=True, help="folder in Hugging Face form")
    parser.add_argument("--origin", required=True, help="how the study names the model")
    parser.add_argument("--downloaded", action="store_true", help="the workflow downloaded it")
    parser.add_argument("--output", type=Path, required=True, help="record of the base (JSON)")
    parser.add_argument("--prompt", help="JSON: the study's prompt, if it is a chat template's")
    options = parser.parse_args(argv)
    silence_libraries()
    architecture = read_model_layers(options.model)
    check_config(options.model)
    tokenizer = load_tokenizer(options.model)
    check_stops(options.model, tokenizer)
    if architecture.rows is not None:
        unused = placeholders(options.model)
        check_ids(options.model, tokenizer.get_vocab(), architecture.rows, unused)
    if options.prompt:
        # What its chat template is not fit for is found before anything is trained.
        prompt = PromptConfig.model_validate_json(options.prompt)
        chat_template_text(tokenizer, prompt)
        turn_ending(tokenizer, prompt)
    files, identity = model_identity(options.model)
    record = {
        "path": str(options.model),
        "origin": options.origin,
        "identity": identity,
        "files": files,
        "parameters": model_parameters(options.model),
        "downloaded": options.downloaded,
    }
    write_json(options.output, record)
    print(f"{options.origin}: {record['parameters']:,} parameters")


if __name__ == "__main__":
    main()
