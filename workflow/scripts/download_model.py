"""Fetch a base model from the hub at a pinned revision: safetensors, tokenizer, configuration."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetting.data.hub import fetch_model
from forgetting.errors import reports_input_errors


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """The folder appears when all files are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="OWNER/NAME on the hub")
    parser.add_argument("--revision", required=True, help="commit of the model")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    options = parser.parse_args(argv)
    fetch_model(options.model, options.revision, options.output)
    print(f"{options.model} at {options.revision} is in {options.output}")


if __name__ == "__main__":
    main()
