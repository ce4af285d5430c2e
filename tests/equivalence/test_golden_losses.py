"""Twenty losses equal those of trl, transformers and peft on the same batches, to 1e-5.

The reference losses are in golden/losses.json, with the versions of the libraries.
golden/make_losses.py makes them.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from forgetting.config.expand import Method
from forgetting.config.methods import Hyperparameters
from forgetting.config.training import TrainingConfig
from forgetting.data.tokenize import Example
from forgetting.models.adapters import attach_adapter
from forgetting.models.loading import load_base
from forgetting.training import run_config as batches
from forgetting.training.optimizer import learning_rate_ratios
from forgetting.training.trainer import train_run
from golden.make_losses import (
    ALPHA,
    CASES,
    CLIP,
    FILE,
    PAD,
    RANK,
    ROWS,
    STEPS,
    WARMUP,
    Case,
    draw_adapter,
    outcome,
    rows,
    weights,
    write_base,
)
from support.training import FULL, no_items, run_config

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = json.loads(FILE.read_text())


def _method(case: Case) -> Method:
    if case.variant is None:
        return FULL
    return Method(
        name="adapter",
        kind="lora",
        label="adapter",
        variant=case.variant,
        rank=RANK,
        alpha=ALPHA,
        loraplus_lr_ratio=case.loraplus_lr_ratio,
        hyperparameters=[],
    )


def _train_ours(case: Case, folder: Path) -> dict[str, Any]:
    """Train on the same batches with the trainer of this project."""
    write_base(folder / "base")
    method = _method(case)
    model = attach_adapter(load_base(folder / "base", torch.device("cpu")), method, seed=0)
    if case.variant != "pissa":
        draw_adapter(model)
    training = TrainingConfig(
        epochs=1.0,
        batch_size=ROWS,
        micro_batch_size=ROWS // case.accumulate,
        schedule="linear",
        warmup_epochs=WARMUP / STEPS,
        max_grad_norm=CLIP,
        decay_norms_and_biases=case.decay_norms_and_biases,
        optimizer=case.optimizer,
        scale_parameter=case.scale_parameter,
    )
    examples = [Example(ids=ids, prompt_length=prompt) for ids, prompt in rows()]
    config = run_config(
        examples,
        training,
        PAD,
        hyperparameters=Hyperparameters(learning_rate=case.rate, weight_decay=case.decay),
        lr_ratios=learning_rate_ratios(model, method),
    )
    start = {name: p.detach().clone() for name, p in weights(model).items()}
    progress = train_run(model, examples, config, no_items, folder / "run", lambda *_: None)
    return outcome(model, start, progress.losses)


def _in_file_order(count: int, size: int, seed: int, step: int) -> list[int]:
    return list(range(step * size, min(count, (step + 1) * size)))


@pytest.mark.parametrize("name", CASES)
def test_twenty_losses_match_other_libraries(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses, the change of the weights, and the logits at the end."""
    monkeypatch.setattr(batches, "batch_indices", _in_file_order)
    ours, theirs = _train_ours(CASES[name], tmp_path), GOLDEN["cases"][name]
    assert len(ours["losses"]) == STEPS
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert ours["moved"] == pytest.approx(theirs["moved"], rel=1e-4)
    assert ours["logits"] == pytest.approx(theirs["logits"], abs=1e-3)
    assert theirs["losses"][-1] < 0.9 * theirs["losses"][0]


def test_golden_cases_differ() -> None:
    """A value that every variant meets would test nothing; accumulation changes no loss."""
    last = {name: case["losses"][-1] for name, case in GOLDEN["cases"].items()}
    same = ["lora-accumulated", "full-accumulated", "full-transformers"]
    distinct = sorted(value for name, value in last.items() if name not in same)
    gaps = [after - before for before, after in itertools.pairwise(distinct)]
    assert min(gaps) > 1e-3
    assert last["lora-accumulated"] == pytest.approx(last["lora"], rel=1e-6)
    assert last["full-accumulated"] == pytest.approx(last["full"], rel=1e-6)
    assert last["full-transformers"] == pytest.approx(last["full"], rel=1e-6)
