"""Run groups for tests: the tiny base, eight rows, two epochs of two steps, float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig, SelectionConfig
from forgetting.config.expand import Method, RunGroupConfig
from forgetting.config.methods import Hyperparameters
from forgetting.config.training import TrainingConfig
from forgetting.digests import sha256_of_all, visible_files
from forgetting.inputs import model_identity
from forgetting.io import write_json
from forgetting.models.forward import Batch
from forgetting.models.loading import load_meta_model
from forgetting.training.run_group import RunContext


def record_base(path: Path, folder: Path, identity: str = "b") -> None:
    """Write the record of a base model, as the job does that registers it."""
    files, _ = model_identity(folder)
    write_json(
        path,
        {
            "path": str(folder),
            "origin": "made for a test",
            "identity": identity,
            "files": files,
            "parameters": load_meta_model(folder).num_parameters(),
        },
    )


def digests_in(checkpoint: Path) -> dict[str, str]:
    """Return the digests that a selection records for the files of a checkpoint."""
    return sha256_of_all(visible_files(checkpoint))[0] if checkpoint.exists() else {}


def run_context(
    base: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], **changes: Any
) -> RunContext:
    """Return a context with eight rows to learn and two probe rows; `changes` are its fields."""
    defaults: dict[str, Any] = {
        "train": rows[:8],
        "probes": {"new": rows[:2]},
        "base_value": 0.1,
        "device": torch.device("cpu"),
        "precision": torch.float32,
    }
    return RunContext(base=base, tokenizer=tokenizer, **defaults | changes)


def run_group_config(
    method: Method, settings: Sequence[Hyperparameters], batched_lora: str, **changes: Any
) -> RunGroupConfig:
    """Return a run group with these hyperparameters; `changes` are fields of the method."""
    return RunGroupConfig(
        method=method.model_copy(update={"hyperparameters": list(settings), **changes}),
        seed=0,
        prompt=PromptConfig(),
        training=TrainingConfig(
            epochs=2.0, batch_size=4, warmup_epochs=0.0, batched_lora=batched_lora
        ),
        evaluation=EvaluationConfig(max_new_tokens=4),
        selection=SelectionConfig(probe="new"),
        precision="float32",
        knowledge={"new": "new"},
    )


def examples_in(batch: Batch) -> int:
    """Return the number of examples of a batch, padded or padding-free."""
    return int((batch.positions == 0).sum()) if batch.layout else len(batch.ids)
