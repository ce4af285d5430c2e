"""Check a base model that was trained elsewhere and record what it is."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path

from safetensors import safe_open

from forgetting.models import load_tokenizer, quieten_libraries
from forgetting.records import InputError, sha256, tells_input_errors, write_json


@tells_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the record that names the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder in Hugging Face form")
    parser.add_argument("--origin", required=True, help="how the study names the model")
    parser.add_argument("--output", type=Path, required=True, help="record of the base (JSON)")
    options = parser.parse_args(argv)
    quieten_libraries()
    shards = sorted(options.model.glob("*.safetensors"))
    if not shards:
        raise InputError(f"{options.model}: no *.safetensors there; other formats are not read")
    load_tokenizer(options.model)
    files = {path.name: sha256(path) for path in [*shards, *sorted(options.model.glob("*.json"))]}
    record = {
        "path": str(options.model),
        "origin": options.origin,
        "identity": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        "files": files,
        "parameters": sum(_parameters(path) for path in shards),
    }
    write_json(options.output, record)
    print(f"{options.origin}: {record['parameters']:,} parameters")


def _parameters(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


if __name__ == "__main__":
    main()
