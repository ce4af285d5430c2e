"""Which runs share a forward pass: by method, by model, by the size of a step, by memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MixtralConfig

from forgetting.config.expand import Method
from forgetting.config.mitigations import MitigationConfig
from forgetting.config.training import TrainingConfig
from forgetting.models.loading import Model
from forgetting.study import run_groups
from forgetting.study.run_groups import is_plain_lora, partition_runs, rows_per_pass
from forgetting.training.batched_lora import meta_model, runs_per_pass, supports_batching

FULL = Method(name="full", kind="full", label="full", hyperparameters=[])


def _meta_model(config: Any, tmp_path: Path, method: Method) -> Model:
    config.save_pretrained(tmp_path / "model")
    return meta_model(tmp_path / "model", method)


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 100}


def test_supports_batching_needs_independent_rows(tmp_path: Path, tuning: Method) -> None:
    llama = LlamaConfig(**SMALL, num_attention_heads=2)
    assert supports_batching(_meta_model(llama, tmp_path, tuning))
    llama.attention_dropout = 0.1
    assert not supports_batching(_meta_model(llama, tmp_path, tuning))
    mixtral = MixtralConfig(**SMALL, num_attention_heads=2, num_key_value_heads=2)
    assert not supports_batching(
        _meta_model(mixtral, tmp_path, tuning.model_copy(update={"dropout": 0.0}))
    )
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    gpt2 = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=100, **still)
    assert not supports_batching(_meta_model(gpt2, tmp_path, tuning))  # its layers are no nn.Linear
    llama = LlamaConfig(**SMALL, num_attention_heads=2)
    for other, supported in (("embed_tokens", False), ("lm_head", True)):
        more = {"target_modules": ["q_proj", other], "dropout": 0.0}
        changed = tuning.model_copy(update=more)
        assert supports_batching(_meta_model(llama, tmp_path, changed)) == supported


@pytest.mark.parametrize(
    ("changes", "applies"),
    [
        ({}, True),
        ({"variant": "rslora"}, True),
        ({"variant": "pissa"}, True),
        ({"loraplus_lr_ratio": 16.0}, True),
        ({"mitigation": {"replay": {"table": "a/b"}}}, True),
        ({"variant": "dora"}, False),
        ({"mitigation": {"kl": {"weight": 0.1}}}, False),
        ({"mitigation": {"replay": {"table": "a/b"}, "l2_sp": {"weight": 0.1}}}, False),
        ({"mitigation": {"ewc": {"weight": 0.1, "table": "a/b"}}}, False),
    ],
)
def test_is_plain_lora_by_method(tuning: Method, changes: dict[str, Any], applies: bool) -> None:
    if "mitigation" in changes:
        changes = {"mitigation": MitigationConfig.model_validate(changes["mitigation"])}
    assert is_plain_lora(tuning.model_copy(update=changes)) == applies
    assert not is_plain_lora(FULL)


def test_runs_per_pass_by_step_size_and_memory(
    base_folder: Path, tuning: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU: only small steps, as many runs as a pass has rows, within a bound on memory."""
    cpu, model = torch.device("cpu"), meta_model(base_folder, tuning)
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    training = TrainingConfig(micro_batch_size=6)

    def sizes(count: int, tokens: float = 100.0, **changes: Any) -> list[int]:
        changed = training.model_copy(update=changes)
        return runs_per_pass(tuning, count, base_folder, changed, tokens, cpu)

    assert sizes(12) == [6, 6]
    assert sizes(3) == [1, 1, 1]
    assert sizes(12, tokens=1e9) == [1] * 12
    assert sizes(12, batched_lora="never") == [1] * 12
    assert sizes(12, durations=[1.0]) == [1] * 12, "a branch is bit-identical to its run"
    trained = 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
    monkeypatch.setattr(run_groups, "CPU_BYTES", 4 * 16 * trained)
    assert sizes(12) == [4, 4, 4]
    monkeypatch.setattr(run_groups, "CPU_BYTES", 4 * 16 * trained - 1)
    assert sizes(12) == [1] * 12


@pytest.mark.parametrize(
    ("runs", "max_runs", "sizes"),
    [
        (17, 6, [6, 6, 5]),
        (11, 6, [6, 5]),
        (9, 8, [5, 4]),
        (5, 4, [4, 1]),
        (9, 4, [4, 4, 1]),
        (7, 6, [6, 1]),
        (12, 3, [1] * 12),
        (3, 8, [1, 1, 1]),
        (0, 8, []),
    ],
)
def test_partition_runs_fills_few_passes_evenly(runs: int, max_runs: int, sizes: list[int]) -> None:
    """A pass of fewer than four runs would not be faster: these runs are trained singly."""
    assert partition_runs(runs, 1, max_runs, 10**9) == sizes


def _fewest_passes(runs: int, capacity: int) -> int:
    """Return the smallest number of passes that hold all runs, from all possible sizes."""
    allowed = {1, *range(run_groups.MIN_RUNS, capacity + 1)}
    fewest = [0]
    for count in range(1, runs + 1):
        fewest.append(1 + min(fewest[count - size] for size in allowed if size <= count))
    return fewest[-1]


@pytest.mark.parametrize("capacity", range(1, 12))
def test_partition_runs_needs_the_fewest_passes(capacity: int) -> None:
    """Every run is in one pass, and every pass is within both bounds."""
    for runs in range(50):
        for bounds in ((capacity, 10**9), (10**9, 16 * 5 * capacity)):
            parts = partition_runs(runs, 5, *bounds)
            assert sum(parts) == runs
            sizes = set(parts) - {1}
            assert all(run_groups.MIN_RUNS <= size <= capacity for size in sizes)
            assert len(parts) == _fewest_passes(runs, capacity)


def test_rows_per_pass_bounds_the_tokens_on_a_cpu() -> None:
    """A CPU process gets no error when memory is short, so many runs pass fewer rows each."""
    assert rows_per_pass(32, 1, 500.0, "cpu") == 32
    assert rows_per_pass(32, 8, 64.0, "cpu") == 8
    assert rows_per_pass(4, 8, 64.0, "cpu") == 4
    assert rows_per_pass(32, 32, 500.0, "cpu") == 1
    assert rows_per_pass(32, 32, 500.0, "cuda") == 32
