"""Run groups for tests: the tiny base, eight rows, two epochs of two steps, float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
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
from forgetting.training.run_group import train_run_group
from forgetting.training.training_job import RunContext, TrainingJob


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


@dataclass
class RunGroupHarness:
    """Train run groups in one folder and note the run of every step."""

    context: RunContext
    state: Path
    inputs: Mapping[str, str] = field(default_factory=lambda: {"versions": "c"})
    logged: list[str] = field(default_factory=list)

    def __call__(
        self, config: RunGroupConfig, log: Callable[..., None] | None = None, **inputs: str
    ) -> list[dict[str, Any]]:
        """Train the runs that are missing, and return the records of all."""
        self.logged.clear()
        job = TrainingJob(
            config,
            self.context,
            {**self.inputs, **inputs},
            self.state,
            log or (lambda run, *_: self.logged.append(run)),
        )
        return train_run_group(job)

    @property
    def trained(self) -> list[str]:
        """Return the names of the runs that made a step, in order."""
        return list(dict.fromkeys(self.logged))

    def files(self) -> dict[str, int]:
        """Return every file with the time of its last change."""
        paths = [path for path in self.state.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.state)): path.stat().st_mtime_ns for path in paths}


def changed(config: RunGroupConfig, *settings: Hyperparameters, **changes: Any) -> RunGroupConfig:
    """Return a run group with other hyperparameters, if there are any, and other fields."""
    method = config.method.model_copy(
        update={"hyperparameters": list(settings)} if settings else {}
    )
    return config.model_copy(update={"method": method, **changes})


def checkpoint_weights(record: Mapping[str, Any], step: int = 4) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint of a run."""
    (file,) = Path(record["folder"], f"step-{step:07d}").glob("*model.safetensors")
    return load_file(file)


def are_equal(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Return whether two runs have the same losses, evaluations and weights, bit for bit."""
    ours, theirs = checkpoint_weights(first), checkpoint_weights(second)
    same = all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    keys = ("losses", "evaluations")
    return same and all(first[key] == second[key] for key in keys)


def examples_in(batch: Batch) -> int:
    """Return the number of examples of a batch, padded or padding-free."""
    return int((batch.positions == 0).sum()) if batch.layout else len(batch.ids)
