"""Runs of several ranks and seeds in one pass: each as if alone."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from cohorts import examples_in, materials_of, spec_of
from forgetting.models.loading import load_base
from forgetting.scoring.forward import target_logits
from forgetting.sections.method import Setting
from forgetting.sections.mitigation import Mitigation
from forgetting.settings.plan import Tuning
from forgetting.training import cohort, fusing, gradients, passes
from forgetting.training import train as train_module
from forgetting.training.cohort import train_cohort
from forgetting.training.fused import trained_weights
from forgetting.training.fusible import outline
from forgetting.training.materials import CohortSpec, Materials
from killing import Killed, kill_at

pytestmark = pytest.mark.usefixtures("one_thread")

RATES = (Setting(learning_rate=0.01), Setting(learning_rate=0.003, weight_decay=0.1))
INPUTS = {"versions": "c"}


@pytest.fixture(scope="module", autouse=True)
def _two_runs_are_enough() -> Iterator[None]:
    """Fuse as few as two runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusing, "FEWEST", 2)
        yield


@pytest.fixture(scope="module")
def materials(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> Materials:
    """Eight rows to learn, of other lengths, so that another order is padded otherwise."""
    return materials_of(base_folder, tokenizer, rows, base_value=0.001)


@pytest.fixture(scope="module")
def specs(tuning: Tuning) -> list[CohortSpec]:
    """Three methods of other ranks and scales, one of them LoRA+, and two seeds of each."""
    methods = [
        tuning.model_copy(update={"dropout": 0.0, **changes})
        for changes in (
            {"name": "lora-r4"},
            {"name": "rslora-r2", "rank": 2, "variant": "rslora", "alpha": 3.0},
            {"name": "lora-r8-plus", "rank": 8, "alpha": 16.0, "lora_plus_ratio": 4.0},
        )
    ]
    return [
        spec_of(method, RATES, "across").model_copy(update={"seed": seed})
        for method in methods
        for seed in (0, 7)
    ]


def _apart(specs: Sequence[CohortSpec], materials: Materials, state: Path) -> list[dict[str, Any]]:
    """Every run in a pass of its own."""
    found = []
    for spec in specs:
        training = spec.training.model_copy(update={"fused": "never"})
        alone = spec.model_copy(update={"training": training})
        found += train_cohort([alone], materials, INPUTS, state, lambda *_: None)
    return found


@pytest.fixture(scope="module")
def together(
    specs: list[CohortSpec], materials: Materials, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The twelve runs in one pass, for tests that change none of their files."""
    state = tmp_path_factory.mktemp("together")
    return train_cohort(specs, materials, INPUTS, state, lambda *_: None)


@pytest.fixture(scope="module")
def apart(
    specs: list[CohortSpec], materials: Materials, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Each of the twelve runs in a pass of its own."""
    return _apart(specs, materials, tmp_path_factory.mktemp("apart"))


def _files(records: Sequence[dict[str, Any]], pattern: str) -> dict[str, Path]:
    return {
        f"{record['run']}/{path.relative_to(record['folder'])}": path
        for record in records
        for path in sorted(Path(record["folder"]).glob(pattern))
    }


def test_runs_of_other_ranks_and_seeds_are_the_runs_alone(
    together: list[dict[str, Any]], apart: list[dict[str, Any]]
) -> None:
    """Twelve runs in a pass: the losses, tokens, items and adapters of each as if it were alone."""
    ours, theirs = together, apart
    assert [record["trained_together"] for record in ours] == [12] * 12
    same = ("run", "key", "setting", "status", "steps", "tokens", "trainable_parameters")
    for one, other in zip(ours, theirs, strict=True):
        assert {key: one[key] for key in same} == {key: other[key] for key in same}
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-4)
    assert len({record["losses"][0] for record in theirs}) > 1, "seeds have orders of their own"
    tables = _files(ours, "items-*.parquet")
    assert len(tables) == 24
    for name, path in _files(theirs, "items-*.parquet").items():
        pd.testing.assert_frame_equal(
            pd.read_parquet(tables[name]), pd.read_parquet(path), rtol=1e-3
        )
    adapters = _files(ours, "step-*/adapter_model.safetensors")
    for name, path in _files(theirs, "step-*/adapter_model.safetensors").items():
        found = load_file(adapters[name])
        for weight, tensor in load_file(path).items():
            torch.testing.assert_close(found[weight], tensor, rtol=1e-3, atol=5e-4)


def test_runs_of_other_seeds_stand_side_by_side(
    specs: list[CohortSpec], materials: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their batches have unlike numbers of tokens: what the shorter ones lack is all that is filled
    up, in a single row, and the head is asked for no target more.
    """
    rows, targets = [], []

    def noted(model: Any, batch: Any) -> torch.Tensor:
        rows.append(batch.ids.shape)
        targets.append(batch.labels.numel())
        return target_logits(model, batch)

    monkeypatch.setattr(gradients, "target_logits", noted)
    records = train_cohort(specs, materials, INPUTS, tmp_path, lambda *_: None)
    useful = sum(record["tokens"] for record in records)
    assert {count for count, _ in rows} == {1}
    assert useful < sum(length for _, length in rows) < 1.2 * useful
    assert all(length % 12 == 0 for _, length in rows)
    assert sum(targets) < useful


def test_a_checkpoint_tells_its_own_rank_and_scale(
    together: list[dict[str, Any]], materials: Materials
) -> None:
    """Whatever run sat in the model before: plain peft computes what was measured in training."""
    ids = torch.tensor(
        [materials.tokenizer("Where was the author of many long books born?")["input_ids"]]
    )
    for record, rank, scale in zip(together[::4], (4, 2, 8), (2.0, 3.0 / 2**0.5, 2.0), strict=True):
        checkpoint = Path(record["folder"]) / f"step-{record['steps']:07d}"
        assert json.loads((checkpoint / "adapter_config.json").read_text())["r"] == rank
        base = AutoModelForCausalLM.from_pretrained(materials.base, dtype=torch.float32)
        before = base(ids).logits
        model = PeftModel.from_pretrained(base, checkpoint)
        layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
        assert layer.scaling["default"] == pytest.approx(scale)
        assert not torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("call", [1, 9, 14, 24])
def test_a_killed_mixed_cohort_ends_with_the_same_bits(
    specs: list[CohortSpec],
    materials: Materials,
    together: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
) -> None:
    """Killed while checkpoints are written, and started again."""
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, train_module, "write_checkpoint", call, after=False)
        train_cohort(specs, materials, INPUTS, tmp_path / "killed", lambda *_: None)
    ended = train_cohort(specs, materials, INPUTS, tmp_path / "killed", lambda *_: None)
    for one, other in zip(ended, together, strict=True):
        assert one["losses"] == other["losses"]
    ours = _files(ended, "step-*/adapter_model.safetensors")
    theirs = _files(together, "step-*/adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].read_bytes() == theirs[name].read_bytes()


def test_a_run_of_one_rank_that_diverges_harms_no_other(
    specs: list[CohortSpec], materials: Materials, tmp_path: Path
) -> None:
    wild = specs[2].tuning.model_copy(update={"settings": [Setting(learning_rate=1e30)]})
    mixed = [specs[0], specs[2].model_copy(update={"tuning": wild}), *specs[4:]]
    ours = train_cohort(mixed, materials, INPUTS, tmp_path / "across", lambda *_: None)
    assert [record["status"] for record in ours] == ["ok", "ok", "diverged", *["ok"] * 4]
    for one, other in zip(ours, _apart(mixed, materials, tmp_path / "apart"), strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-4)


def test_one_base_is_in_memory_at_a_time(
    specs: list[CohortSpec], materials: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each method and seed begins from a base of its own; no two are there at once."""
    loaded: list[weakref.ref[Any]] = []
    alive = []

    def load(base: Path, device: torch.device, parameters: int | None) -> Any:
        gc.collect()
        alive.append(sum(model() is not None for model in loaded))
        model = load_base(base, device, parameters)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(cohort, "load_base", load)
    train_cohort(specs, materials, INPUTS, tmp_path, lambda *_: None)
    assert alive == [0] * 6


def test_a_run_that_has_ended_keeps_no_other_in_memory(
    specs: list[CohortSpec], materials: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are its own again as soon as the others go on without it."""
    settings = [*RATES, Setting(learning_rate=1e30)]
    wild = specs[0].tuning.model_copy(update={"settings": settings})
    mixed = [specs[0].model_copy(update={"tuning": wild}), *specs[1:]]
    kept = {}
    step = train_module._step

    def watched(model: Any, examples: Any, runs: Any, stack: Any) -> Any:
        for run in runs:
            kept[run.folder] = run.own.weights
        for folder in kept.keys() - {run.folder for run in runs}:
            for weight in kept[folder].values():
                assert weight.untyped_storage().nbytes() == weight.numel() * weight.itemsize
                ended.add(folder)
        return step(model, examples, runs, stack)

    ended: set[Path] = set()
    monkeypatch.setattr(train_module, "_step", watched)
    train_cohort(mixed, materials, INPUTS, tmp_path, lambda *_: None)
    assert len(ended) == 1


def test_replayed_rows_are_those_of_the_seed(
    specs: list[CohortSpec], materials: Materials, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    replay = Mitigation.model_validate({"replay": {"table": "a/b", "share": 0.4}})
    replaying = [
        spec.model_copy(
            update={"tuning": spec.tuning.model_copy(update={"mitigation": replay}), "columns": {}}
        )
        for spec in specs[:4]
    ]
    told = replace(materials, general={"a/b": rows[5:]})
    ours = train_cohort(replaying, told, INPUTS, tmp_path / "across", lambda *_: None)
    for one, other in zip(ours, _apart(replaying, told, tmp_path / "apart"), strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-4)
        assert one["tokens"] == other["tokens"]


def test_one_mask_of_dropout_is_that_of_every_rank(
    specs: list[CohortSpec], materials: Materials, tmp_path: Path
) -> None:
    """Of one seed: each run drops what it drops alone, at other ranks and scales."""
    dropping = [
        spec.model_copy(update={"tuning": spec.tuning.model_copy(update={"dropout": 0.2})})
        for spec in specs[::2]
    ]
    ours = train_cohort(dropping, materials, INPUTS, tmp_path / "across", lambda *_: None)
    theirs = _apart(dropping, materials, tmp_path / "apart")
    assert [record["trained_together"] for record in ours] == [6] * 6
    for one, other in zip(ours, theirs, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-4)
    without = train_cohort(specs[::2], materials, INPUTS, tmp_path / "without", lambda *_: None)
    assert [record["losses"] for record in without] != [record["losses"] for record in ours]


def test_out_of_memory_halves_the_pass_of_unlike_runs(
    specs: list[CohortSpec], materials: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = specs[0].training.model_copy(update={"micro_batch_size": 4})
    specs = [spec.model_copy(update={"training": training}) for spec in specs]
    roomy = train_cohort(specs, materials, INPUTS, tmp_path / "roomy", lambda *_: None)
    target_logits, refused = gradients.target_logits, []

    def limited(model: Any, batch: Any) -> torch.Tensor:
        if (examples := examples_in(batch)) > 12:  # those that fill up among them
            refused.append(examples)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return target_logits(model, batch)

    monkeypatch.setattr(gradients, "target_logits", limited)
    monkeypatch.setitem(passes.FORWARD_OVERHEAD, "cpu", 100_000)
    narrow = train_cohort(specs, materials, INPUTS, tmp_path / "narrow", lambda *_: None)
    # Four rows of four runs, once in each of three passes; then two of each to the end.
    assert len(refused) == 3
    assert min(refused) >= 16
    for one, other in zip(narrow, roomy, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-4)


def test_what_finds_no_room_in_a_pass_is_trained_alone(
    specs: list[CohortSpec],
    materials: Materials,
    apart: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The runs of rank 8 are too large for it; those of 4 and 2 are trained together."""
    monkeypatch.setattr(fusing, "FEWEST", 8)
    rank_4 = sum(
        w.numel() for w in trained_weights(outline(materials.base, specs[0].tuning)).values()
    )
    monkeypatch.setattr(fusing, "CPU_BYTES", 7 * 16 * rank_4)  # those of the others take 6
    ours = train_cohort(specs, materials, INPUTS, tmp_path / "across", lambda *_: None)
    assert [record["trained_together"] for record in ours] == [8] * 8 + [1] * 4
    for one, other in zip(ours, apart, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-4)


@pytest.mark.parametrize("call", [5, 17])
def test_runs_that_were_half_trained_go_on_as_the_study_says_now(
    specs: list[CohortSpec],
    materials: Materials,
    apart: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
) -> None:
    """Begun each in its own job, killed, gone on across, killed, and ended one by one."""
    by_seed = [[spec for spec in specs if spec.seed == seed] for seed in (0, 7)]
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, train_module, "write_checkpoint", 3, after=True)
        train_cohort(by_seed[0][:1], materials, INPUTS, tmp_path / "state", lambda *_: None)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, train_module, "write_checkpoint", call, after=True)
        train_cohort(specs, materials, INPUTS, tmp_path / "state", lambda *_: None)
    ended = _apart(specs, materials, tmp_path / "state")
    for one, other in zip(ended, apart, strict=True):
        assert one["run"] == other["run"]
        assert one["status"] == "ok"
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-4)
        assert [point[0] for point in one["points"]] == [point[0] for point in other["points"]]
