"""Test the scoring benchmark at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import score as program
from scoring_baselines import TASKS

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.real_data, pytest.mark.long]


def test_comparisons_are_recorded_and_agree(real_data: Path, tmp_path: Path) -> None:
    """Log-likelihoods agree to 1e-4 per token."""
    record = tmp_path / "RECORD.md"
    record.write_text("# Record\n")
    options = {"data": real_data, "shape": "tiny", "limit": 3, "questions": 2, "epochs": 1}
    options |= {"more-epochs": 1, "rounds": 1, "adapters": 1, "record": record}
    program.main([f"--{name}={value}" for name, value in options.items()])
    text = record.read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(TASKS) + 7
    assert all(float(row[4]) > 0 for row in rows)
    differences = json.loads(text.splitlines()[-1])
    assert set(differences) == {*TASKS, "truth ratio"}
    assert max(differences.values()) < 1e-4
