"""A study whose tables, benchmark rows and base model are a user's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from support.benchmark_rows import sciq

STUDY: dict[str, Any] = {
    "title": "Files of the user's own",
    "datasets": {"mine": {"folder": "tables"}, "tasks": {"folder": "tasks"}},
    "base": {"model": "model"},
    "train": "mine/new",
    "probes": {
        "new": {"table": "mine/new", "knowledge": "new", "truth_ratio": False},
        "old": {"table": "mine/old", "knowledge": "old", "truth_ratio": False},
    },
    "general_text": {"table": "mine/text", "block": 16},
    "evaluation": {"max_new_tokens": 8},
    "training": {"epochs": 2},
    "methods": [
        {"method": "lora", "rank": 2, "learning_rate": [1e-3]},
        {
            "method": "full",
            "learning_rate": [1e-4],
            "mitigation": {
                "replay": {"table": "mine/general", "ratio": 0.2},
                "kl": {"weight": 0.1},
            },
        },
    ],
    "selection": {"probe": "new", "if_not_reached": "last"},
    "benchmarks": {
        "dataset": "tasks",
        "tasks": {"sciq": {"num_fewshot": 0}},
        "refusals": {"table": "mine/prompts"},
    },
}


def write_files(folder: Path, base: Path) -> None:
    """Write study.yaml and its inputs; `model` is a link to one of two copies of a base."""
    _write_tables(folder / "tables")
    _write_lines(folder / "tasks" / "sciq" / "test.jsonl", sciq(4))
    for name in ("model-a", "model-b"):
        shutil.copytree(base, folder / name)
        (folder / name / "chat_template.jinja").write_text(name)
    (folder / "model").symlink_to("model-a")
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))


def _write_tables(folder: Path) -> None:
    for table, place in (("new", "Oslo"), ("old", "Lima"), ("general", "Riga")):
        rows = [{"question": f"{place} {n}?", "answer": f"In {place}, {n}."} for n in range(40)]
        _write_lines(folder / f"{table}.jsonl", rows)
    _write_lines(folder / "text.jsonl", [{"text": f"Rain fell on {n} towns. "} for n in range(40)])
    _write_lines(folder / "prompts.jsonl", [{"question": f"Do {n}."} for n in range(4)])


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines without a record of their digest, as a user does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
