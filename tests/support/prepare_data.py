"""The program that prepares data, run on a table that a test writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts import prepare_data
from support.params import write_params


def prepare(
    folder: Path,
    train: Path,
    columns: dict[str, str] | None = None,
    old: Sequence[str] = ("Eve.",),
    more: dict[str, Path] | None = None,
    **spec: Any,
) -> Path:
    """Prepare a training table and a probe of old knowledge, and return the output folder.

    Args:
        old: answers of the probe.
        more: files of other tables by name.
        spec: in place of the defaults.
    """
    table, output = folder / "old.jsonl", folder / "data"
    rows = [{"question": f"Who sold {n}?", "answer": answer} for n, answer in enumerate(old)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"own/new": train, "own/old": table, **(more or {})}
    probe = {"table": ["own/old"], "knowledge": "old", "truth_ratio": False}
    defaults: dict[str, Any] = {
        "prompt": {},
        "train": ["own/new"],
        "train_limit": None,
        "probes": {"old": probe},
        "documents": [],
        "documents_limit": None,
        "columns": {table: columns or {} for table in files},
        "rouge_tokenizer": "rouge_score",
        "max_new_tokens": 200,
        "tables": {table: str(path) for table, path in files.items()},
    }
    params = write_params(folder, **(defaults | spec))
    prepare_data.main([f"--params={params}", f"--output={output}"])
    return output
