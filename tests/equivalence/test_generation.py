"""Test that greedy answers equal those of transformers' `generate` in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from forgetting.config.expand import Method
from forgetting.evaluation import generation as module
from forgetting.evaluation.generation import can_drop_rows, generate_greedy, supports_refill
from forgetting.models.adapters import attach_adapter
from forgetting.models.attention import attention_implementation
from forgetting.models.forward import length_batches

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 96,
}
MAX_NEW_TOKENS = 20


def _models() -> dict[str, Any]:
    torch.manual_seed(1)
    # A window shorter than a prompt with its answer.
    mistral = MistralConfig(**SHAPE, num_key_value_heads=1, sliding_window=8, initializer_range=0.5)
    gpt2 = GPT2Config(
        vocab_size=24, n_embd=32, n_layer=2, n_head=2, n_positions=96, initializer_range=0.5
    )
    mamba = MambaConfig(
        vocab_size=24, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.5
    )
    made = {
        "llama": LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.5)),
        "shared heads": LlamaForCausalLM(
            LlamaConfig(**SHAPE, num_key_value_heads=1, initializer_range=0.5)
        ),
        "neox": GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, initializer_range=0.5)),
        "phi": PhiForCausalLM(PhiConfig(**SHAPE, initializer_range=0.5)),
        "mistral": MistralForCausalLM(mistral),
        "gpt2": GPT2LMHeadModel(gpt2),
        "mamba": MambaForCausalLM(mamba),
    }
    for model in made.values():
        model.generation_config.eos_token_id = None
    return {name: model.eval() for name, model in made.items()}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Random models of several architectures."""
    return _models()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Thirteen prompts of one to twelve tokens."""
    generator = torch.Generator().manual_seed(4)
    return [
        torch.randint(4, 24, (1 + number % 12,), generator=generator).tolist()
        for number in range(13)
    ]


def _free(model: Any, prompt: list[int]) -> list[int]:
    """Return the answer of `generate` to one prompt, without padding and stop tokens."""
    config = GenerationConfig(do_sample=False, max_new_tokens=MAX_NEW_TOKENS, pad_token_id=0)
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def _expected(model: Any, prompts: list[list[int]]) -> tuple[int, list[list[int]]]:
    """Return the stop token that gives answers of the most different lengths, and the answers."""
    free = [_free(model, prompt) for prompt in prompts]

    def ended(end: int) -> list[list[int]]:
        return [answer[: answer.index(end)] if end in answer else answer for answer in free]

    end = max(range(24), key=lambda token: len({len(answer) for answer in ended(token)}))
    assert len({len(answer) for answer in ended(end)}) > 2
    return end, ended(end)


@pytest.mark.parametrize("size", [1, 4, 7, 64])
@pytest.mark.parametrize("name", ["llama", "shared heads", "neox", "phi", "mistral", "gpt2"])
def test_greedy_answers_equal_generate(
    models: dict[str, Any], prompts: list[list[int]], name: str, size: int
) -> None:
    """Learned and rotary positions, a window, several rows that end early and some never."""
    end, expected = _expected(models[name], prompts)
    assert can_drop_rows(models[name])
    # A sliding window depends on positions in the row.
    assert supports_refill(models[name]) == (name != "mistral")
    assert generate_greedy(models[name], prompts, MAX_NEW_TOKENS, size, {end}, end) == expected


def test_recurrent_model_uses_generate(models: dict[str, Any], prompts: list[list[int]]) -> None:
    """A recurrent state has no rows and positions to take out."""
    assert not can_drop_rows(models["mamba"])
    end, expected = _expected(models["mamba"], prompts)
    assert generate_greedy(models["mamba"], prompts, MAX_NEW_TOKENS, 1, {end}, end) == expected


@pytest.mark.parametrize("way", ["sdpa", "eager"])
def test_attention_implementation_is_restored(
    models: dict[str, Any], prompts: list[list[int]], way: str
) -> None:
    """Also a model whose masks are not those of PyTorch's kernel answers, batch by batch."""
    model = models["phi"]
    end, expected = _expected(model, prompts)
    model.set_attn_implementation(way)
    try:
        assert supports_refill(model) == (way == "sdpa")
        assert generate_greedy(model, prompts, MAX_NEW_TOKENS, 4, {end}, end) == expected
        assert attention_implementation(model) == way
    finally:
        model.set_attn_implementation("sdpa")


def test_endless_answer_does_not_delay_others(
    models: dict[str, Any], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer passes than the longest answers of batches, one after the other, would take."""
    model, max_new_tokens, passes = models["llama"], 12, 0
    end, longer = _expected(model, prompts)
    expected = [answer[:max_new_tokens] for answer in longer]
    assert 1 < sum(len(answer) == max_new_tokens for answer in expected) < len(prompts) / 2
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += bool(kwargs["past_key_values"].get_seq_length())
        return forward(*args, **kwargs)

    monkeypatch.setattr(module, "supports_refill", lambda _: True)
    monkeypatch.setattr(model, "forward", counted)
    assert generate_greedy(model, prompts, max_new_tokens, 4, {end}, end) == expected
    batches = length_batches([len(prompt) for prompt in prompts], 4)
    longest = [max(len(expected[index]) for index in batch) for batch in batches]
    assert passes < 0.8 * sum(longest)


@pytest.mark.parametrize("refill", [True, False])
def test_ended_rows_are_not_computed(
    models: dict[str, Any],
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    refill: bool,
) -> None:
    """Every token that is fed in belongs to an unfinished answer."""
    model, fed = models["llama"], 0
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal fed
        if kwargs["input_ids"].shape[1] == 1 and kwargs["past_key_values"].get_seq_length():
            fed += len(kwargs["input_ids"])
        return forward(*args, **kwargs)

    end, expected = _expected(model, prompts)
    monkeypatch.setattr(module, "can_drop_rows", lambda _: True)
    monkeypatch.setattr(module, "supports_refill", lambda _: refill)
    monkeypatch.setattr(model, "forward", counted)
    assert generate_greedy(model, prompts, MAX_NEW_TOKENS, 64, {end}, end) == expected
    # The last token is not fed in.
    assert fed == sum(min(len(answer), MAX_NEW_TOKENS - 1) for answer in expected)


def test_greedy_answers_use_the_adapter(
    base: Any, tuning: Method, prompts: list[list[int]]
) -> None:
    model = attach_adapter(base, tuning.model_copy(update={"dropout": 0.0}), 0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.5)
    model.eval()
    free = [_free(model, prompt) for prompt in prompts]
    assert generate_greedy(model, prompts, MAX_NEW_TOKENS, 7, {-1}, 0) == free
    with model.disable_adapter():
        assert free != [_free(model, prompt) for prompt in prompts]


@pytest.mark.parametrize("name", ["llama", "shared heads", "neox", "phi", "gpt2"])
def test_greedy_answers_in_bfloat16_nearly_equal_generate(
    models: dict[str, Any], prompts: list[list[int]], name: str
) -> None:
    """Keys and values of one layer may have different types: rotations widen keys."""
    model = models[name]
    with torch.autocast("cpu", torch.bfloat16):
        end, expected = _expected(model, prompts)
        found = generate_greedy(model, prompts, MAX_NEW_TOKENS, 4, {end}, end)
    first = [answer[:1] for answer in found]
    assert sum(a == b[:1] for a, b in zip(first, expected, strict=True)) >= 12
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 9
