"""Two studies run in one folder at the same time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from forgetting.locks import OWNER_FILE, is_locked

ROOT = Path(__file__).resolve().parents[2]
STUDY: dict[str, Any] = {
    "title": "One of two",
    "datasets": {"world": {"generate": "micro-world", "seed": 0}},
    "base": {
        "pretrain": {
            "documents": ["world/documents"],
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_layers": 1,
            "num_heads": 2,
            "vocab_size": 300,
            "block_size": 320,
            "batch_tokens": 960,
            "epochs": 0.1,
            "limit": 40,
        }
    },
    "train": "world/new_authors",
    "train_limit": 4,
    "probes": {
        "new": {"table": "world/new_authors", "knowledge": "new", "limit": 2},
        "old": {"table": "world/real_authors", "knowledge": "old", "limit": 2},
    },
    "evaluation": {"max_new_tokens": 2},
    "training": {"epochs": 2, "batch_size": 4, "schedule": "constant", "warmup_epochs": 1},
    "methods": [{"method": "lora", "rank": 2, "learning_rate": 1e-3}],
    "selection": {"probe": "new", "threshold": 0.9, "if_not_reached": "last"},
}


def _write_study(path: Path, title: str) -> None:
    path.write_text(yaml.safe_dump(STUDY | {"title": title}, sort_keys=False), encoding="utf-8")


def _snakemake(folder: Path, study: str, *options: str) -> subprocess.Popen[str]:
    environment = {key: v for key, v in os.environ.items() if not key.startswith("SNAKEMAKE")}
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "snakemake", *options),
            *("--snakefile", str(ROOT / "Snakefile")),
            *("--configfile", str(ROOT / "config" / "config.yaml"), "--config", f"study={study}"),
        ],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _ended(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-6000:]
    return output


@pytest.mark.slow
def test_two_studies_run_at_the_same_time(tmp_path: Path) -> None:
    """Each has its own page; that of the last run is also `tradeoff.html`."""
    _write_study(tmp_path / "one.yaml", title="The first")
    _write_study(tmp_path / "two.yaml", title="The second")
    both = [_snakemake(tmp_path, f"{name}.yaml", "--cores", "1") for name in ("one", "two")]
    while not all(is_locked(tmp_path / "results" / name) for name in ("one", "two")):
        assert all(process.poll() is None for process in both), [p.communicate() for p in both]
        time.sleep(0.05)
    _ended(_snakemake(tmp_path, "one.yaml", "--unlock"))
    again = _snakemake(tmp_path, "two.yaml", "--cores", "1")
    output, _ = again.communicate(timeout=600)
    assert again.returncode
    assert "results/two: another snakemake runs this study here" in output
    for process in both:
        _ended(process)

    reports = tmp_path / "reports"
    pages = {name: (reports / f"{name}.html").read_text() for name in ("one", "two")}
    assert "The first" in pages["one"]
    assert "The second" in pages["two"]
    assert (reports / "tradeoff.html").read_text() in pages.values()
    for name in ("one", "two"):
        assert list((reports / f"{name}-figures").glob("*.svg"))
        output = _ended(_snakemake(tmp_path, f"{name}.yaml", "--cores", "1"))
        assert "Fine-tune " not in output
        assert (reports / "tradeoff.html").read_text() == pages[name]
    output = _ended(_snakemake(tmp_path, "two.yaml", "--cores", "1", "--dry-run"))
    assert "Nothing to be done" in output
    owner = json.loads((tmp_path / "results" / "two" / OWNER_FILE).read_text())
    assert owner == {"study": "two.yaml"}
