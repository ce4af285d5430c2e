"""Side by side in one row, without padding, documents train as each does by itself."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
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
    Qwen3Config,
)

from forgetting.config.training import TrainingConfig
from forgetting.data.tokenize import Example, concatenate
from forgetting.evaluation.prefix_tree import supports_custom_mask
from forgetting.models import forward
from forgetting.models.adapters import attach_adapter
from forgetting.models.attention import (
    PADDING_FREE,
    SUPPORTED_MODEL_TYPES,
    PaddingFreeLayout,
    padding_free_attention,
)
from forgetting.models.forward import collate, concatenate_examples, logprobs_of, target_logits
from forgetting.models.loading import recompute_activations
from forgetting.training import microbatches, train_step
from forgetting.training.checkpoints import TrainState
from forgetting.training.microbatches import attention_for, use_padding_free
from support.training import adapter_method, run_config

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 50
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "initializer_range": 0.3}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
# Two queries to a key, heads wider than their share, whole or partly rotated, learned positions.
ARCHITECTURES = {
    "llama": LlamaConfig(**SHAPE, **LAYERS, num_key_value_heads=2),
    "qwen": Qwen3Config(**SHAPE, **LAYERS, num_key_value_heads=1, head_dim=16),
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


def _model(config: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Auto.from_config(config)


def _examples(seed: int, count: int = 9, longest: int = 40) -> list[Example]:
    """Of random lengths, some with two runs of targets, some of them packed."""
    draw = random.Random(seed)
    examples = []
    for _ in range(count):
        ids = [draw.randrange(2, VOCABULARY) for _ in range(draw.randint(2, longest))]
        prompt = draw.randint(1, len(ids) - 1)
        spans: tuple[tuple[int, int], ...] = ()
        if len(ids) - prompt > 4 and draw.random() < 0.5:
            spans = ((prompt, prompt + 1), (prompt + 3, len(ids)))
        examples.append(Example(ids, prompt, spans))
    return [concatenate(examples[:3]), *examples[3:]]


def _alone(examples: Sequence[Example]) -> list[Example]:
    """Every document of the examples as an example."""
    alone = []
    for example in examples:
        for begin, size in zip(example.document_starts, example.document_lengths, strict=True):
            spans = [
                (first - begin, last - begin)
                for first, last in example.target_spans
                if begin <= first < begin + size
            ]
            alone.append(Example(example.ids[begin : begin + size], spans[0][0], tuple(spans)))
    return alone


def _gradient(
    model: PreTrainedModel, batches: Sequence[forward.Batch], precision: torch.dtype = torch.float32
) -> tuple[float, Tensor]:
    """Mean loss per target and its gradient, added up over forward passes."""
    model.zero_grad()
    targets, total = sum(batch.targets for batch in batches), 0.0
    half = precision == torch.bfloat16
    for batch in batches:
        with attention_for(model, batch, precision) as part:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = -logprobs_of(target_logits(model, part), part).sum() / targets
            loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _differ(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("lot_overhead", [0, 20, 10_000])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_padding_free_batch_matches_single_examples(
    name: str,
    dtype: torch.dtype,
    tolerance: float,
    lot_overhead: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loss and gradient, with a bucket per document, for several or for all."""
    monkeypatch.setattr(forward, "BATCH_OVERHEAD_TOKENS", lot_overhead)
    model = _model(ARCHITECTURES[name]).to(dtype)
    for seed in range(3):
        examples = _examples(seed)
        assert use_padding_free(model, examples, torch.float32)
        loss, gradient = _gradient(model, [collate([one], pad=0) for one in _alone(examples)])
        other_loss, other = _gradient(model, [concatenate_examples(examples)])
        assert other_loss == pytest.approx(loss, rel=tolerance)
        assert _differ(other, gradient) < tolerance


def test_padding_free_bfloat16_is_as_precise_as_padded() -> None:
    """What is rounded is rounded once: 32 examples, on the scale of the gradient."""
    model = _model(LlamaConfig(**{**SHAPE, "initializer_range": 0.1}, **LAYERS))
    examples = _examples(5, count=32)
    _, exact = _gradient(model, [collate([one], pad=0) for one in examples])
    _, padded = _gradient(model, [collate(examples, pad=0)], torch.bfloat16)
    _, joined = _gradient(model, [concatenate_examples(examples)], torch.bfloat16)
    assert not torch.equal(joined, padded)
    assert _differ(joined, exact) < min(0.05, 1.2 * _differ(padded, exact))


def test_recomputed_activations_give_the_same_bits() -> None:
    """The backward pass reads the row as the forward pass did."""
    model = _model(ARCHITECTURES["llama"]).train()
    batch = concatenate_examples(_examples(1))
    kept = _gradient(model, [batch])
    recompute_activations(model)
    again = _gradient(model, [batch])
    assert kept[0] == again[0]
    assert torch.equal(kept[1], again[1])


def test_padding_free_row_holds_only_the_documents() -> None:
    """Nothing is padding, and the head is asked for targets alone."""
    examples = _examples(2)
    batch = concatenate_examples(examples)
    assert batch.ids.numel() == sum(len(example.ids) for example in examples)
    assert batch.labels.numel() == sum(example.targets for example in examples)
    assert batch.labels.flatten().tolist() == [
        token
        for example in examples
        for begin, end in example.target_spans
        for token in example.ids[begin:end]
    ]


def test_every_token_is_in_one_bucket() -> None:
    layout = PaddingFreeLayout.of([3, 1, 4], [[2, 0], [1]])
    positions = torch.cat([bucket.positions for bucket in layout.buckets])
    is_padding = torch.cat([bucket.is_padding for bucket in layout.buckets]).flatten()
    assert positions[~is_padding].sort().values.tolist() == list(range(8))
    assert positions[layout.restore_order].tolist() == list(range(8))
    assert not is_padding[layout.restore_order].any()


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SHAPE, **LAYERS, sliding_window=8),
        GPT2Config(**SHAPE, n_layer=2, n_head=2),
        LlamaConfig(**SHAPE, **LAYERS, attn_implementation="eager"),
    ],
    ids=["sliding window", "dropout of its own", "attention of its own"],
)
def test_unsupported_models_use_padded_rows(config: Any) -> None:
    assert not use_padding_free(_model(config), _examples(0), torch.float32)


@pytest.mark.parametrize(("precision", "most"), [(torch.float32, 128), (torch.bfloat16, 512)])
def test_long_documents_are_padded_and_packs_of_short_ones_are_not(
    precision: torch.dtype, most: int
) -> None:
    model = _model(LlamaConfig(**SHAPE, **LAYERS))
    short, long = Example([1] * most, 1), Example([1] * (most + 1), 1)
    assert use_padding_free(model, [short, concatenate([short, short])], precision)
    assert not use_padding_free(model, [short, long], precision)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_adapter_with_dropout_uses_padded_rows(dropout: float) -> None:
    """Dropout masks depend on the position in the batch, which batched runs share."""
    method = adapter_method(dropout=dropout)
    model = attach_adapter(_model(LlamaConfig(**SHAPE, **LAYERS)), method, seed=0)
    assert use_padding_free(model, _examples(0), torch.float32) is (dropout == 0.0)


def _small(kind: str) -> PreTrainedModel:
    """A model of a type, small, without dropout or windows."""
    usual = transformers.CONFIG_MAPPING[kind]()
    sizes = {
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "n_embd": 32, "word_embed_proj_dim": 32},
        **{"num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4, "n_head": 4},
        **{"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
        **{"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "ffn_dim": 64},
        **{"max_position_embeddings": 200, "n_positions": 200, "initializer_range": 0.3},
        **{"init_std": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
        **{"sliding_window": None, "use_sliding_window": False, "no_rope_layers": [1, 0]},
    }
    config = type(usual)(**{key: value for key, value in sizes.items() if key in vars(usual)})
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return _model(config)


@pytest.mark.parametrize("kind", sorted(SUPPORTED_MODEL_TYPES))
def test_supported_types_match_single_examples(kind: str) -> None:
    model = _small(kind).train()
    examples = _examples(5, longest=30)
    assert use_padding_free(model, examples, torch.float32)
    alone = _gradient(model, [collate([example], 0) for example in _alone(examples)])
    joined = _gradient(model, [concatenate_examples(examples)])
    assert joined[0] == pytest.approx(alone[0], rel=1e-5)
    assert joined[1].shape == alone[1].shape
    assert _differ(joined[1], alone[1]) < 2e-5


@pytest.mark.parametrize("kind", ["falcon", "jetmoe", "bart", "roberta", "doge", "bert"])
def test_types_with_own_attention_use_padded_rows(kind: str) -> None:
    """Without an error they would train on a wrong loss."""
    assert not use_padding_free(_small(kind), _examples(0), torch.float32)


@pytest.mark.parametrize("kind", ["bart", "roberta", "doge", "bert"])
def test_packing_is_refused_where_positions_or_masks_would_not_hold(kind: str) -> None:
    assert not supports_custom_mask(_small(kind))


def test_attention_is_restored_after_an_error() -> None:
    model = _model(ARCHITECTURES["llama"])
    layout = concatenate_examples(_examples(0)).layout
    assert layout
    with pytest.raises(RuntimeError, match="out of memory"), padding_free_attention(model, layout):
        assert model.config._attn_implementation == PADDING_FREE
        raise RuntimeError("out of memory")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_step_computes_nothing_for_padding(
    precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many tokens enter the blocks as the examples of the step have, in passes of at most four
    examples, and the gradient is that of padded rows."""
    model = _model(LlamaConfig(**{**SHAPE, "initializer_range": 0.1}, **LAYERS)).train()
    examples = _examples(3)
    training = TrainingConfig(epochs=1.0, batch_size=9, micro_batch_size=4, warmup_epochs=0.0)
    config = run_config(examples, training, pad=0, precision=precision)
    seen: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))

    def gradient() -> tuple[float, Tensor]:
        (loss,) = train_step.compute_gradients(
            model, config, [(examples, None)], TrainState(), torch.optim.SGD(model.parameters())
        )
        return loss.tokens, torch.cat([p.grad.flatten() for p in model.parameters()])

    loss, joined = gradient()
    assert len(seen) == 2
    assert sum(seen) == 32 * sum(len(example.ids) for example in examples)
    monkeypatch.setattr(microbatches, "use_padding_free", lambda *_: False)
    other, padded = gradient()
    assert sum(seen[2:]) > sum(seen[:2])
    close = 1e-5 if precision == torch.float32 else 0.02
    assert loss == pytest.approx(other, rel=close)
    assert _differ(joined, padded) < close


def test_loss_sums_are_separate_for_each_batched_run() -> None:
    """Every run reads the same examples, in the order of the runs."""
    examples = _examples(4)
    for padded in (True, False):
        shared = microbatches.MicroBatch(examples, 3, padded)
        batch = shared.to_batch(0, torch.device("cpu"))
        assert batch.ids.numel() % 3 == 0
        values = torch.arange(batch.labels.numel(), dtype=torch.float32).view_as(batch.labels)
        expected = [float(part.sum()) for part in values.flatten().chunk(3)]
        assert shared.loss_sums(values).tolist() == pytest.approx(expected)
