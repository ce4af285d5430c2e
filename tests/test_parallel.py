"""One run trained by several processes: the same numbers as by one, whatever becomes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from teams import train, weights
from transformers import PreTrainedTokenizerBase

from forgetting.cohort import CohortSpec, Materials, run_key
from forgetting.encode import Example
from forgetting.models import load_checkpoint
from forgetting.parallel import ALONE, Team, deal
from forgetting.plan import Tuning
from forgetting.study import Measurement, Mitigation, Prompt, Selection, Setting, Training

pytestmark = pytest.mark.usefixtures("one_thread")

Rows = list[dict[str, Any]]
FULL = Tuning(name="full", kind="full", label="full", settings=[Setting(learning_rate=1e-3)])
STEPS = 6


@pytest.fixture
def materials(base_folder: Path, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> Materials:
    """Nine rows to learn in batches of four, four and one; five questions for two or four."""
    return Materials(
        base=base_folder,
        tokenizer=tokenizer,
        train=rows[:9],
        probes={"new": rows[:3], "old": rows[8:]},
        base_value=0.1,
        device=torch.device("cpu"),
        precision=torch.float32,
        general={"world/documents": [{"id": f"text/{n}", "text": n * "la "} for n in range(3, 9)]},
    )


@pytest.fixture
def spec(tuning: Tuning) -> CohortSpec:
    """Six steps of full fine-tuning, the gradient being clipped, with evaluations at 3 and 6."""
    return CohortSpec(
        tuning=FULL,
        seed=0,
        prompt=Prompt(),
        training=Training(
            epochs=2.0, batch_size=4, micro_batch_size=2, warmup_epochs=0.0, gradient_clip=0.3
        ),
        measurement=Measurement(max_new_tokens=4),
        selection=Selection(probe="new"),
        precision="float32",
        knowledge={"new": "new", "old": "old"},
    )


def _lora(tuning: Tuning) -> Tuning:
    """Without dropout, which is another one in each process."""
    return tuning.model_copy(update={"dropout": 0.0})


def _training(spec: CohortSpec, **changes: Any) -> CohortSpec:
    return spec.model_copy(update={"training": spec.training.model_copy(update=changes)})


def _agree(found: dict[str, Any], expected: dict[str, Any], rel: float = 2e-5) -> None:
    """Losses, weights and items, but for the order of sums."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=rel)
    assert (found["steps"], found["tokens"]) == (expected["steps"], expected["tokens"])
    assert len(found["losses"]) == STEPS
    theirs = weights(expected, STEPS)
    ours = weights(found, STEPS)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=10 * rel, atol=10 * rel)
    for step in (3, 6):
        items, others = (
            pd.read_parquet(Path(record["folder"], f"items-{step:07d}.parquet"))
            for record in (found, expected)
        )
        pd.testing.assert_frame_equal(items, others, rtol=100 * rel, atol=100 * rel)


def _same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses, points and weights, bit for bit."""
    assert found["losses"] == expected["losses"]
    assert found["points"] == expected["points"]
    theirs = weights(expected, STEPS)
    for name, tensor in weights(found, STEPS).items():
        assert torch.equal(tensor, theirs[name]), name


# --- who does what ------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [1, 2, 3, 4, 7])
def test_every_example_is_dealt_once_and_the_shares_weigh_the_same(shares: int) -> None:
    """No two shares differ by more tokens than the longest example has."""
    lengths = [(7 * n) % 23 + 1 for n in range(40)]
    dealt = deal(lengths, shares)
    assert sorted(index for share in dealt for index in share) == list(range(40))
    tokens = [sum(lengths[index] for index in share) for share in dealt]
    assert max(tokens) - min(tokens) <= max(lengths)
    assert deal(lengths[:2], 3) == [[1], [0], []]


@pytest.mark.parametrize("most", [1, 2, 32])
def test_all_processes_make_as_many_passes(most: int) -> None:
    """Each example is in one pass of one process; what fills up has no targets."""
    rows = [Example(ids=[n] * (n + 2), prompt=1) for n in range(7)]
    passes = [Team(rank, 4).passes(rows, most, 10) for rank in range(4)]
    assert len({len(own) for own in passes}) == 1
    found = [example for own in passes for part in own for example in part]
    assert sorted(e.ids[0] for e in found if e.targets) == list(range(7))
    assert max(len(part) for own in passes for part in own) <= most
    assert Team(1, 2).passes(rows[:1], most, 10)[0][0].targets == 0
    assert ALONE.passes([], most, 10) == Team(1, 2).passes([], most, 10) == []


# --- the same numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_processes_train_like_one(
    spec: CohortSpec, materials: Materials, tuning: Tuning, tmp_path: Path, kind: str
) -> None:
    """Batches of uneven rows, clipped by the norm of all gradients; and what is measured."""
    if kind == "lora":
        spec = spec.model_copy(update={"tuning": _lora(tuning)})
    one, two = (train(size, spec, materials, tmp_path / str(size)) for size in (1, 2))
    _agree(two, one)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["trainable_parameters"] == two["trainable_parameters"]
    loose = train(2, _training(spec, gradient_clip=None), materials, tmp_path / "loose")
    assert loose["losses"] != pytest.approx(one["losses"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_four_processes_train_like_one(
    spec: CohortSpec, materials: Materials, tuning: Tuning, tmp_path: Path, kind: str
) -> None:
    """More processes than some batches have rows."""
    if kind == "lora":
        spec = spec.model_copy(update={"tuning": _lora(tuning)})
    one, four = (train(size, spec, materials, tmp_path / str(size)) for size in (1, 4))
    _agree(four, one)


def test_bfloat16_rounds_in_two_processes_what_it_rounds_in_one(
    spec: CohortSpec, materials: Materials, tmp_path: Path
) -> None:
    """Matrices and what they multiply, but no norm, embedding or sum; weights stay float32."""
    rounded = replace(materials, precision=torch.bfloat16)
    one, two = (train(size, spec, rounded, tmp_path / str(size)) for size in (1, 2))
    exact = train(1, spec, materials, tmp_path / "exact")
    _agree(two, one, rel=1e-4)
    assert two["losses"] != pytest.approx(exact["losses"], rel=1e-4)
    assert {tensor.dtype for tensor in weights(two, STEPS).values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_mitigations_are_the_same_in_two_processes(
    spec: CohortSpec, materials: Materials, tuning: Tuning, tmp_path: Path, kind: str
) -> None:
    """Replay and KL are shared like the batch; EWC and L2-SP are not counted twice."""
    table = "world/documents"
    mitigation = Mitigation.model_validate(
        {
            "replay": {"table": table, "share": 0.3},
            "kl": {"weight": 0.5},
            "ewc": {"weight": 50.0, "table": table, "samples": 3},
            "l2_sp": {"weight": 0.5},
        }
    )
    chosen = FULL if kind == "full" else _lora(tuning)
    spec = spec.model_copy(update={"tuning": chosen.model_copy(update={"mitigation": mitigation})})
    one, two = (train(size, spec, materials, tmp_path / str(size)) for size in (1, 2))
    _agree(two, one, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["lionw", "adamw"])
def test_every_optimizer_that_can_be_sharded_is(
    spec: CohortSpec, materials: Materials, tmp_path: Path, optimizer: str
) -> None:
    spec = _training(spec, optimizer=optimizer)
    one, two = (train(size, spec, materials, tmp_path / str(size)) for size in (1, 2))
    assert two["losses"] == pytest.approx(one["losses"], rel=2e-5)


# --- activation checkpointing -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_recomputed_activations_change_no_bit(
    spec: CohortSpec, materials: Materials, tuning: Tuning, tmp_path: Path, kind: str, size: int
) -> None:
    """The adapter's dropout is drawn again as it was; the run is the same run."""
    if kind == "lora":
        spec = spec.model_copy(update={"tuning": tuning})
    frugal = _training(spec, activation_checkpointing=True)
    kept = train(size, spec, materials, tmp_path / "kept")
    recomputed = train(size, frugal, materials, tmp_path / "recomputed")
    _same(recomputed, kept)
    assert kept["losses"][-1] < kept["losses"][0]
    setting = spec.tuning.settings[0]
    assert run_key(frugal, setting, {}) == run_key(spec, setting, {})


# --- going on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_stopped_team_goes_on_as_if_it_had_not_been(
    spec: CohortSpec, materials: Materials, tuning: Tuning, tmp_path: Path, kind: str
) -> None:
    """Bit for bit, dropout of each process included."""
    if kind == "lora":
        spec = spec.model_copy(update={"tuning": tuning})
    reference = train(2, spec, materials, tmp_path / "reference")
    assert train(2, spec, materials, tmp_path / "state", stop_at=5) is None
    _same(train(2, spec, materials, tmp_path / "state"), reference)


@pytest.mark.parametrize(
    ("before", "after"),
    [(2, 1), (1, 2), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(4, 2), (2, 4)])],
)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_another_number_of_processes_goes_on(
    spec: CohortSpec,
    materials: Materials,
    tuning: Tuning,
    tmp_path: Path,
    kind: str,
    before: int,
    after: int,
) -> None:
    """Weights and moments come back in other parts; nothing is trained twice."""
    if kind == "lora":
        spec = spec.model_copy(update={"tuning": _lora(tuning)})
    reference = train(1, spec, materials, tmp_path / "reference")
    assert train(before, spec, materials, tmp_path / "state", stop_at=4) is None
    assert len(list((tmp_path / "state").rglob("progress.json"))) == 1
    record = train(after, spec, materials, tmp_path / "state")
    _agree(record, reference)
