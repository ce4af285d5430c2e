"""Test the training benchmark at toy size."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import train as program
from baselines import CONTENDERS, OURS, Bench
from hardware import flops_per_token
from models import SHAPES

pytestmark = pytest.mark.usefixtures("one_thread")

HAS_TRL = importlib.util.find_spec("trl") is not None


@pytest.mark.parametrize("name", [name for name in CONTENDERS if name != OURS])
def test_every_contender_is_recorded(name: str, tmp_path: Path) -> None:
    """The record gets a row per method and contender."""
    if name.startswith("trl") and not HAS_TRL:
        pytest.skip("trl is not installed; `make bench-train` installs it")
    record = tmp_path / "RECORD.md"
    record.write_text("# Record\n")
    program.main(
        [
            *("--shape", "tiny", "--pairs", "6", "--batch-size", "3", "--rounds", "1"),
            *("--methods", "2", "full", "--contenders", name, "--record", str(record)),
            *("--run-group", "0"),
        ]
    )
    text = record.read_text()
    assert text.startswith("# Record\n\n## ")
    assert "Model tiny; 6 pairs" in text
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")][1:]
    found = [(row[0].strip(), row[1].strip()) for row in rows]
    assert found == [(method, who) for method in ("lora-r2", "full") for who in (OURS, name)]
    assert all(float(row[2].replace(",", "")) > 0 for row in rows)
    assert [row[4].strip() for row in rows[::2]] == ["1", "1"]


@pytest.mark.slow
def test_run_group_is_measured_batched_and_separately(tmp_path: Path) -> None:
    record = tmp_path / "RECORD.md"
    program.main(
        [
            *("--shape", "tiny", "--pairs", "24", "--batch-size", "3", "--rounds", "1"),
            *("--methods", "2", "full", "--contenders", OURS, "--record", str(record)),
            *("--run-group", "3", "--run-group-batch-sizes", "1", "2"),
        ]
    )
    rows = [line.split("|")[1:-1] for line in record.read_text().splitlines()]
    found = [row for row in rows if row and row[0].strip() == "3 x lora-r2"]
    assert [row[1].strip() for row in found] == ["1", "2"]
    assert all(float(row[5]) > 0 for row in found)


def test_contender_out_of_memory_has_infinite_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hungry(_: Bench) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(CONTENDERS, "trl, packed", hungry)
    table = program.measure(bench, [OURS, "trl, packed"], 1, peak=1e9)
    assert table["tokens/s"][1] == "out of memory"
    assert float(table["tokens/s"][0].replace(",", "")) > 0


@pytest.mark.parametrize(
    ("shape", "weights"), [("phi-1.5", 1_418_270_720), ("llama-2-7b", 6_738_415_616)]
)
def test_shapes_equal_the_published_models(shape: str, weights: int) -> None:
    """Parameters of microsoft/phi-1_5 and meta-llama/Llama-2-7b-hf are counted."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[shape])
    assert sum(p.numel() for p in model.parameters()) == weights


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Return the benchmark at the tiny shape with adapters of rank 2."""
    options = argparse.Namespace(
        data=None, pairs=6, model=None, shape="tiny", methods=["2"], batch_size=3
    )
    (made,) = program.prepare(options, tmp_path)
    return made


def test_flops_per_token_by_hand(bench: Bench) -> None:
    """4 N + 6 N_lora, with the head at predicted positions and without the embedding."""
    share = sum(e.targets for e in bench.examples) / bench.tokens
    body = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    adapters = 2 * 2 * (4 * (32 + 32) + 3 * (32 + 64))
    assert flops_per_token(bench) == 4 * body + 6 * adapters + 4 * share * 512 * 32
