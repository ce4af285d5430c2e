"""Short rows in bfloat16 on a CPU use eager attention in training, with the same numbers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from forgetting.data.tokenize import Example
from forgetting.models import attention
from forgetting.models.attention import attention_implementation, eager_if_faster
from forgetting.models.forward import Batch, collate, logprobs_of, target_logits

WORDS = 60


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    # Two queries per key, as in grouped-query attention.
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, initializer_range=0.2, **shape, **heads))


def _padded() -> Batch:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(WORDS, (n,), generator=generator).tolist() for n in (9, 31, 17)]
    return collate([Example(ids=ids, prompt_length=3) for ids in rows], pad=0)


def _packed() -> Batch:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(WORDS, (30,), generator=generator).tolist()
    spans = [(2, 9), (12, 20), (23, 30)]
    return collate(
        [Example(ids=ids, prompt_length=2, document_starts=[0, 9, 20], spans=spans)], pad=0
    )


def _gradient(model: LlamaForCausalLM, batch: Batch, precision: torch.dtype) -> torch.Tensor:
    model.zero_grad()
    half = precision == torch.bfloat16
    with eager_if_faster(model, batch.mask, precision) as mask:
        batch = Batch(batch.ids, mask, batch.columns, batch.labels, batch.positions)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = -logprobs_of(target_logits(model, batch), batch).sum() / batch.targets
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def _differ(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("batch", [_padded(), _packed()], ids=["padded", "packed"])
def test_eager_attention_is_as_precise_as_the_kernel(
    model: LlamaForCausalLM, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masked positions have no effect, and rounding errors are no larger."""
    exact = _gradient(model, batch, torch.float32)
    quick = _gradient(model, batch, torch.bfloat16)
    monkeypatch.setattr(attention, "MAX_EAGER_TOKENS", 0)
    kernel = _gradient(model, batch, torch.bfloat16)
    assert not torch.equal(quick, kernel)
    assert _differ(quick, exact) < min(0.05, 1.2 * _differ(kernel, exact))


def test_float32_and_long_rows_use_the_kernel(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = _padded().mask
    with eager_if_faster(model, mask, torch.float32) as given:
        assert given is mask
        assert attention_implementation(model) == "sdpa"
    monkeypatch.setattr(attention, "MAX_EAGER_TOKENS", mask.shape[1] - 1)
    with eager_if_faster(model, mask, torch.bfloat16):
        assert attention_implementation(model) == "sdpa"


def test_attention_is_restored_after_an_error(model: LlamaForCausalLM) -> None:
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        eager_if_faster(model, _padded().mask, torch.bfloat16),
    ):
        assert attention_implementation(model) == "eager"
        raise RuntimeError("out of memory")
    assert attention_implementation(model) == "sdpa"


@pytest.mark.parametrize("batch", [_padded(), _packed()], ids=["padded", "packed"])
def test_eager_only_model_trains_the_same(model: LlamaForCausalLM, batch: Batch) -> None:
    """Documents stay independent, since the boolean mask becomes an additive one."""
    kernel = _gradient(model, batch, torch.float32)
    model.set_attn_implementation("eager")
    products = _gradient(model, batch, torch.float32)
    assert _differ(products, kernel) < 1e-5
    assert attention_implementation(model) == "eager"
