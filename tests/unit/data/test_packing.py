"""Packed, padded and single examples have the same loss and gradient."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig, SelectionConfig
from forgetting.config.expand import Method, RunGroupConfig
from forgetting.config.methods import Hyperparameters
from forgetting.config.mitigations import MitigationConfig
from forgetting.config.training import TrainingConfig
from forgetting.data.dataset import PackedDataset, bin_pack, pack_dataset
from forgetting.data.tokenize import Example, concatenate
from forgetting.errors import InputError
from forgetting.models.adapters import attach_adapter
from forgetting.models.forward import collate, token_logprobs
from forgetting.models.loading import load_base
from forgetting.schedule import LrSchedule
from forgetting.training.checkpoints import TrainState
from forgetting.training.mitigations import Mitigations, token_kl
from forgetting.training.run_config import RunConfig, loss_groups
from forgetting.training.run_group import check_model_inputs, train_run_group
from forgetting.training.train_step import compute_gradients
from forgetting.training.training_job import RunContext, TrainingJob
from support.kill import Killed

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 50
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "initializer_range": 0.3}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
# Rotary positions over whole heads or parts of them, and learned positions. OPT computes its
# positions from the mask unless they are passed.
ARCHITECTURES = {
    "llama": LlamaConfig(**SHAPE, **LAYERS, num_key_value_heads=1),
    "phi": PhiConfig(**SHAPE, **LAYERS),
    "neox": GPTNeoXConfig(**SHAPE, **LAYERS),
    "gpt2": GPT2Config(
        **SHAPE, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=64,
        word_embed_proj_dim=32,
        dropout=0.0,
        init_std=0.3,
    ),
}
LENGTH = 40
Rows = list[dict[str, Any]]


def _model(config: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Auto.from_config(config)


def _draw(draw: random.Random, count: int) -> list[Example]:
    """Return examples of random lengths from 2 tokens on, some with two runs of targets."""
    examples = []
    for _ in range(count):
        size = draw.randint(2, LENGTH)
        ids = [draw.randrange(2, VOCABULARY) for _ in range(size)]
        prompt = draw.randint(1, size - 1)
        spans: tuple[tuple[int, int], ...] = ()
        if size - prompt > 4 and draw.random() < 0.5:
            spans = ((prompt, prompt + 1), (prompt + 3, size - draw.randint(0, 1)))
        examples.append(Example(ids, prompt, spans))
    return examples


def _gradient(
    model: PreTrainedModel, passes: Sequence[Sequence[Example]], targets: int
) -> tuple[float, Tensor]:
    """Return the mean loss per target and its gradient over several forward passes."""
    model.zero_grad()
    total = 0.0
    for examples in passes:
        loss = -token_logprobs(model, collate(examples, pad=0)).sum() / targets
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_packed_padded_and_single_examples_match(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Gradients differ by at most the tolerance times the largest gradient."""
    model = _model(ARCHITECTURES[name]).to(dtype)
    for seed in range(6):
        examples = _draw(random.Random(seed), 9)
        packed = pack_dataset(examples, TrainingConfig(max_length=LENGTH + 20, packing=True))
        assert 1 < len(packed) < len(examples)
        targets = sum(example.targets for example in examples)
        assert sum(sequence.targets for sequence in packed) == targets
        loss, gradient = _gradient(model, [[example] for example in examples], targets)
        layouts = {
            "padded": [examples],
            "packed": [list(packed)],
            "one pack at a time": [[sequence] for sequence in packed],
            "packed next to unpacked": [[concatenate(examples[:3]), examples[3]], examples[4:]],
        }
        for layout, passes in layouts.items():
            other_loss, other = _gradient(model, passes, targets)
            assert other_loss == pytest.approx(loss, rel=tolerance), (layout, seed)
            distance = (other - gradient).norm() / gradient.norm()
            assert float(distance) < tolerance, (layout, seed)


def test_joined_sequence_keeps_targets_and_documents() -> None:
    """This holds for sequences that are joined twice."""
    first, second = Example([1, 2, 3], 2), Example([4, 5, 6, 7], 1, ((1, 2), (3, 4)))
    joined = concatenate([concatenate([first, second]), first])
    assert joined.ids == [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]
    assert joined.document_starts == (0, 3, 7)
    assert joined.target_spans == ((2, 3), (4, 5), (6, 7), (9, 10))
    assert joined.targets == 4
    batch = collate([joined], pad=0)
    assert batch.columns.tolist() == [1, 3, 5, 8]
    assert batch.labels.tolist() == [[3, 5, 7, 3]]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1, 2]]
    sees = batch.mask[0, 0]
    assert sees[4].nonzero().flatten().tolist() == [3, 4]
    assert sees[9].nonzero().flatten().tolist() == [7, 8, 9]


def test_every_example_is_in_one_pack_untruncated() -> None:
    examples = _draw(random.Random(1), 60)
    training = TrainingConfig(max_length=LENGTH, packing=True)
    packed = pack_dataset(examples, training)
    assert isinstance(packed, PackedDataset)
    assert sorted(place for pack in packed.packs for place in pack) == list(range(60))
    assert all(len(sequence.ids) <= LENGTH for sequence in packed)
    again = pack_dataset(examples, training)
    assert list(again) == list(packed)
    assert pack_dataset(examples, TrainingConfig()) is examples


def test_every_epoch_has_all_packed_sequences() -> None:
    """Three samples per sequence, as Biderman et al. trained."""
    examples = [Example([n, n, n, n], 1) for n in range(1, 25)]
    training = TrainingConfig(max_length=12, packing=True, batch_size=3, epochs=2.0)
    packed = pack_dataset(examples, training)
    schedule = LrSchedule.plan(len(packed), training, 1.0)
    assert (len(packed), schedule.steps_per_epoch, schedule.steps) == (8, 3, 6)
    recipe = _recipe(training, schedule)
    for epoch in range(2):
        groups = [loss_groups(packed, recipe, epoch * 3 + step)[0][0] for step in range(3)]
        assert [len(rows) for rows in groups] == [3, 3, 2]
        seen = [ids[0] for rows in groups for row in rows for ids in _documents(row)]
        assert sorted(seen) == list(range(1, 25))


def _documents(sequence: Example) -> list[list[int]]:
    ends = [*sequence.document_starts[1:], len(sequence.ids)]
    return [sequence.ids[a:b] for a, b in zip(sequence.document_starts, ends, strict=True)]


def _recipe(training: TrainingConfig, schedule: LrSchedule) -> RunConfig:
    return RunConfig(
        hyperparameters=Hyperparameters(learning_rate=1e-2),
        seed=4,
        training=training,
        schedule=schedule,
        base_value=0.1,
        threshold=0.9,
        stop_after_evaluations=None,
        precision=torch.float32,
        pad=0,
    )


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_kl_penalty_treats_packed_examples_separately(
    base_folder: Path, tuning: Method, kind: str
) -> None:
    """A step with replay and KL from changed weights is the same, packed and unpacked."""
    quiet = tuning.model_copy(update={"dropout": 0.0})
    full = Method(name="full", kind="full", label="full", hyperparameters=[])
    model = attach_adapter(
        load_base(base_folder, torch.device("cpu")), quiet if kind == "lora" else full, 0
    )
    mitigations = Mitigations(
        new_token_penalty=(penalty := token_kl(model, 0.5)), replay_token_penalty=penalty
    )
    torch.manual_seed(1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.1 * torch.randn_like(parameter)
    examples, old = _draw(random.Random(2), 8), _draw(random.Random(3), 4)
    found = []
    for packing in (False, True):
        training = TrainingConfig(
            batch_size=100, micro_batch_size=2, max_length=2 * LENGTH, packing=packing
        )
        rows, replayed = pack_dataset(examples, training), pack_dataset(old, training)
        plan = LrSchedule.plan(len(rows), training, 1.0)
        recipe = replace(_recipe(training, plan), mitigations=mitigations)
        groups = [(list(rows), penalty), (list(replayed), penalty)]
        optimizer = torch.optim.SGD(trained, lr=0.0)
        (loss,) = compute_gradients(model, recipe, groups, TrainState(), optimizer)
        found.append((loss, torch.cat([p.grad.flatten() for p in trained if p.grad is not None])))
    (loss, gradient), (packed_loss, packed) = found
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert float((packed - gradient).norm() / gradient.norm()) < 1e-5


def test_packing_refuses_a_model_that_ignores_the_mask() -> None:
    config = MistralConfig(**SHAPE, **LAYERS, num_key_value_heads=1, sliding_window=4)
    model = _model(config)
    check_model_inputs(model, _draw(random.Random(0), 2), TrainingConfig())
    with pytest.raises(InputError, match=r"training\.packing: in this model \(mistral\).* false"):
        check_model_inputs(model, _draw(random.Random(0), 2), TrainingConfig(packing=True))


@pytest.fixture
def run_group(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase, tuning: Method, rows: Rows
) -> Callable[..., dict[str, Any]]:
    """Return a function that trains a run with packing and replay, two steps an epoch."""
    replay = MitigationConfig.model_validate({"replay": {"table": "w/d", "ratio": 0.4}})
    spec = RunGroupConfig(
        method=tuning.model_copy(update={"mitigation": replay}),
        seed=0,
        prompt=PromptConfig(),
        training=TrainingConfig(
            epochs=3.0, batch_size=2, max_length=128, packing=True, warmup_epochs=0.0
        ),
        evaluation=EvaluationConfig(max_new_tokens=2),
        selection=SelectionConfig(probe="new"),
        precision="float32",
        knowledge={"new": "new"},
    )
    general = [
        {"id": f"d/{n}", "text": f"{place} lies by the sea."} for n, place in enumerate("ab")
    ]
    context = RunContext(
        base=base_folder,
        tokenizer=tokenizer,
        train=rows[:8],
        probes={"new": rows[:1]},
        base_value=0.1,
        device=torch.device("cpu"),
        precision=torch.float32,
        general_text={"w/d": general},
    )

    def run(state: Path, log: Callable[..., None] = lambda *_: None) -> dict[str, Any]:
        (record,) = train_run_group(TrainingJob(spec, context, {}, state, log))
        return record

    return run


def test_killed_packed_run_ends_with_the_same_result(
    run_group: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    whole = run_group(tmp_path / "whole")
    assert whole["steps_per_epoch"] < 8 / 2  # more than one pair per sequence
    for step in range(1, whole["steps"] + 1):

        def stop(run: str, progress: TrainState, schedule: LrSchedule, step: int = step) -> None:
            if progress.step == step:
                raise Killed

        state = tmp_path / str(step)
        with pytest.raises(Killed):
            run_group(state, stop)
        again = run_group(state)
        assert again["losses"] == whole["losses"]
        assert again["evaluations"] == whole["evaluations"]


def test_bins_hold_every_document_once() -> None:
    lengths = [7, 3, 9, 1, 10, 5, 5, 2, 8] * 30
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    blocks = bin_pack(lengths, 10, order)
    assert sorted(d for block in blocks for d in block) == sorted(order)
    assert all(sum(lengths[d] for d in block) <= 10 for block in blocks)
    assert len(blocks) <= 1.15 * sum(lengths) / 10
