"""Which runs share a pass: what may, what is quicker so, and what finds room."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations
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
from forgetting.training.batched_lora import batchable_groups, meta_model, supports_batching

FULL = Method(name="full", kind="full", label="full", hyperparameters=[])


def _outline(config: Any, tmp_path: Path, tuning: Method) -> Model:
    config.save_pretrained(tmp_path / "outline")
    return meta_model(tmp_path / "outline", tuning)


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 100}


def test_only_models_whose_rows_go_their_own_way_are_fused(tmp_path: Path, tuning: Method) -> None:
    llama = LlamaConfig(**SMALL, num_attention_heads=2)
    assert supports_batching(_outline(llama, tmp_path, tuning))
    llama.attention_dropout = 0.1
    assert not supports_batching(_outline(llama, tmp_path, tuning))
    mixtral = MixtralConfig(**SMALL, num_attention_heads=2, num_key_value_heads=2)
    assert not supports_batching(
        _outline(mixtral, tmp_path, tuning.model_copy(update={"dropout": 0.0}))
    )
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    gpt2 = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=100, **still)
    assert not supports_batching(_outline(gpt2, tmp_path, tuning))  # its layers are no nn.Linear
    llama = LlamaConfig(**SMALL, num_attention_heads=2)
    for other in ("embed_tokens", "lm_head"):
        more = {"target_modules": ["q_proj", other], "dropout": 0.0}
        beside = tuning.model_copy(update=more)
        assert not supports_batching(_outline(llama, tmp_path, beside))


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
def test_which_methods_are_fused(tuning: Method, changes: dict[str, Any], applies: bool) -> None:
    if "mitigation" in changes:
        changes = {"mitigation": MitigationConfig.model_validate(changes["mitigation"])}
    assert is_plain_lora(tuning.model_copy(update=changes)) == applies
    assert not is_plain_lora(FULL)


def test_which_runs_share_a_pass(
    base_folder: Path, tuning: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU of small steps, as many runs as a pass has rows, and what they train is bounded."""
    cpu, model = torch.device("cpu"), meta_model(base_folder, tuning)
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    training = TrainingConfig(micro_batch_size=6)

    def sizes(count: int, tokens: float = 100.0, **changes: Any) -> list[int]:
        changed = training.model_copy(update=changes)
        parts = batchable_groups([tuning] * count, base_folder, changed, tokens, cpu)
        assert sorted(run for part in parts for run in part) == list(range(count))
        return [len(part) for part in parts]

    assert sizes(12) == [6, 6]
    assert sizes(3) == [1, 1, 1]
    assert sizes(12, tokens=1e9) == [1] * 12
    assert sizes(12, batched_lora="never") == [1] * 12
    assert sizes(12, durations=[1.0]) == [1] * 12, "a branch has the bits of its trunk alone"
    trained = 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
    monkeypatch.setattr(run_groups, "CPU_BYTES", 4 * 16 * trained)
    assert sizes(12) == [4, 4, 4]
    monkeypatch.setattr(run_groups, "CPU_BYTES", 4 * 16 * trained - 1)
    assert sizes(12) == [1] * 12


@pytest.mark.parametrize(
    ("sizes", "most", "parts"),
    [
        ([1] * 17, 6, [6, 6, 5]),
        ([1] * 11, 6, [6, 5]),
        ([1] * 9, 8, [5, 4]),
        ([1] * 5, 4, [4, 1]),
        ([1] * 12, 3, [1] * 12),
        ([], 8, []),
    ],
)
def test_runs_of_one_size_are_packed_evenly(sizes: list[int], most: int, parts: list[int]) -> None:
    """Into as few passes as hold them; with fewer than four runs in one, it is none."""
    assert [len(part) for part in partition_runs([1] * len(sizes), sizes, most, 10**9)] == parts


def test_large_runs_do_not_keep_small_ones_apart() -> None:
    """Each pass holds what fits by the sum of sizes, small ones with small ones."""
    sizes = [300, 1, 2, 300, 1, 2, 90, 100, 90, 80]
    assert partition_runs([1] * 10, sizes, 8, 16 * 400) == [[0], [1, 2, 4, 5, 6, 7, 8, 9], [3]]
    assert partition_runs([1] * 10, sizes, 8, 16 * 6000) == [[0, 3, 6, 7, 8], [1, 2, 4, 5, 9]]
    assert partition_runs([1] * 4, [8, 16, 64, 256], 16, 16 * 400) == [[0, 1, 2, 3]]


def _fewest_parts(runs: Sequence[int], sizes: Sequence[int], most: int, room: int) -> int:
    """As few as any partition into parts within the bounds has, by trying all."""

    def is_allowed(part: Sequence[int]) -> bool:
        count, taken = (sum(runs[n] for n in part), sum(16 * runs[n] * sizes[n] for n in part))
        return len(part) == 1 or (run_groups.MIN_RUNS <= count <= most and taken <= room)

    def partitions(left: list[int]) -> Iterator[int]:
        if not left:
            yield 0
            return
        for size in range(len(left)):
            for others in combinations(left[1:], size):
                if is_allowed([left[0], *others]):
                    rest = [load for load in left[1:] if load not in others]
                    yield from (1 + count for count in partitions(rest))

    return min(partitions(list(range(len(sizes)))))


@pytest.mark.parametrize("seed", range(10))
def test_few_loads_are_packed_as_well_as_any_way_does(seed: int) -> None:
    """Every load is in one part, within both bounds; of single runs as few as there can be."""
    chance = random.Random(seed)
    for _ in range(30):
        runs = [chance.choice([1, 1, 2, 3]) for _ in range(chance.randint(1, 6))]
        sizes = [chance.choice([1, 4, 16, 64, 256]) for _ in runs]
        most, room = chance.randint(4, 10), 16 * chance.randint(1, 800)
        for loads in ([1] * len(runs), runs):
            parts = partition_runs(loads, sizes, most, room)
            assert sorted(load for part in parts for load in part) == list(range(len(runs)))
            for part in parts:
                if len(part) > 1:
                    assert run_groups.MIN_RUNS <= sum(loads[load] for load in part) <= most
                    assert sum(16 * loads[load] * sizes[load] for load in part) <= room
            if loads != runs:
                assert len(parts) == _fewest_parts(loads, sizes, most, room)


def test_a_pass_on_a_cpu_holds_no_more_tokens_however_many_runs_share_it() -> None:
    """Nobody tells there that memory runs out: what many runs pass at once is bounded."""
    assert rows_per_pass(32, 1, 500.0, "cpu") == 32
    assert rows_per_pass(32, 8, 64.0, "cpu") == 8
    assert rows_per_pass(4, 8, 64.0, "cpu") == 4
    assert rows_per_pass(32, 32, 500.0, "cpu") == 1
    assert rows_per_pass(32, 32, 500.0, "cuda") == 32
