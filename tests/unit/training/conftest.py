"""Fixtures of the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from forgetting.config.data import PromptConfig
from forgetting.config.expand import Method
from support.training import TrainingHarness


@pytest.fixture
def harness(
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    rows: list[dict[str, Any]],
    tuning: Method,
    tmp_path: Path,
) -> TrainingHarness:
    """A run with adapters of rank 4 and dropout in a folder of its own."""
    return TrainingHarness.build(base_folder, tokenizer, prompt, rows, tuning, tmp_path / "run")
