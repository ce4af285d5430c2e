"""What tests train as a cohort: the tiny base on eight rows, two epochs of two steps, float32."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from forgetting.digests import sha256_of_all, visible_files
from forgetting.inputs import model_identity
from forgetting.models.base import model_parameters
from forgetting.records import write_json
from forgetting.scoring.forward import Batch
from forgetting.sections.measurement import Measurement
from forgetting.sections.method import Setting
from forgetting.sections.prompt import Prompt
from forgetting.sections.selection import Selection
from forgetting.sections.training import Training
from forgetting.settings.plan import Tuning
from forgetting.training.materials import CohortSpec, Materials


def record_base(path: Path, folder: Path, identity: str = "b") -> None:
    """Write the record of a base, as the job does that adopts it."""
    files, _ = model_identity(folder)
    write_json(
        path,
        {
            "path": str(folder),
            "origin": "made for a test",
            "identity": identity,
            "files": files,
            "parameters": model_parameters(folder),
        },
    )


def digests_in(checkpoint: Path) -> dict[str, str]:
    """What a selection records of a checkpoint's files."""
    return sha256_of_all(visible_files(checkpoint))[0] if checkpoint.exists() else {}


def materials_of(
    base: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], **changes: Any
) -> Materials:
    """Eight rows to learn, two of which are asked; what differs is given by name."""
    usual: dict[str, Any] = {
        "train": rows[:8],
        "probes": {"new": rows[:2]},
        "base_value": 0.1,
        "device": torch.device("cpu"),
        "precision": torch.float32,
    }
    return Materials(base=base, tokenizer=tokenizer, **usual | changes)


def spec_of(tuning: Tuning, settings: Sequence[Setting], fused: str, **changes: Any) -> CohortSpec:
    """A cohort of these settings; `changes` are those of the method."""
    return CohortSpec(
        tuning=tuning.model_copy(update={"settings": list(settings), **changes}),
        seed=0,
        prompt=Prompt(),
        training=Training(epochs=2.0, batch_size=4, warmup_epochs=0.0, fused=fused),
        measurement=Measurement(max_new_tokens=4),
        selection=Selection(probe="new"),
        precision="float32",
        knowledge={"new": "new"},
    )


def examples_in(batch: Batch) -> int:
    """How many examples a pass has, in rows of their own or side by side in one."""
    return int((batch.positions == 0).sum()) if batch.layout else len(batch.ids)


def told(*specs: CohortSpec) -> str:
    """What the program is told of a cohort: what its methods and seeds have in common, and each."""
    common = specs[0].model_dump(mode="json", exclude={"tuning", "seed"})
    members = [spec.model_dump(mode="json", include={"tuning", "seed"}) for spec in specs]
    return json.dumps(common | {"members": members})
