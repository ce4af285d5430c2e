"""Sizes of models from their configuration, the basis of memory and time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from forgetting.config.base_model import SmallModelConfig
from forgetting.config.evaluation import SelectionConfig
from forgetting.config.expand import Method, expand_methods
from forgetting.config.methods import Hyperparameters, MethodConfig
from forgetting.config.study import StudyConfig
from forgetting.models.adapters import attach_adapter
from forgetting.models.size import (
    KNOWN_CONFIGS,
    ModelSize,
    folder_size,
    known_size,
    size_from_config,
    small_model_size,
)

CONFIGS: list[PretrainedConfig] = [
    LlamaConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=320, tie_word_embeddings=True),
    PhiConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
              vocab_size=320),
    GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=320, n_positions=64),
    GPTNeoXConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                  vocab_size=320),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_parameter_counts_equal_those_of_the_model(config: PretrainedConfig) -> None:
    """The counts from the configuration are exact."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = size_from_config(config.to_dict())
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())


def test_sizes_of_published_models() -> None:
    """Phi-1.5 has 1.42 B weights, 1.313 B of them in matrix products; Llama-2-7B 6.74 and 6.607."""
    phi, llama = known_size("microsoft/phi-1_5"), known_size("NousResearch/Llama-2-7b-hf")
    assert (phi.parameters, phi.linear + phi.embedding) == (1_418_270_720, 1_312_817_152)
    assert (llama.parameters, llama.linear + llama.embedding) == (6_738_415_616, 6_607_077_376)
    # Keys and values of a token: 524 KB in bfloat16.
    assert 2 * llama.cache == 524_288
    assert [phi.adapter(_lora(1)), llama.adapter(_lora(1))] == [884_736, 2_498_560]
    assert all(shape.is_exact for shape in (phi, llama))
    assert not known_size("someone/something").is_exact
    assert all(known_size(model).parameters > 10**8 for model in KNOWN_CONFIGS)


def test_folder_is_counted_by_its_headers(base_folder: Path, base: PreTrainedModel) -> None:
    shape = folder_size(base_folder)
    assert shape.parameters == base.num_parameters()
    assert shape.blocks == base.config.num_hidden_layers


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_folder_size_finds_tied_embeddings(config: PretrainedConfig, tmp_path: Path) -> None:
    """Whatever the files call the LM head."""
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    size = folder_size(tmp_path)
    assert size.tie_word_embeddings == config.tie_word_embeddings
    assert size.embeddings == size_from_config(config.to_dict()).embeddings


def test_small_model_size_matches_transformers(small: ModelSize) -> None:
    config = LlamaConfig(
        hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        vocab_size=2048, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        assert small.parameters == AutoModelForCausalLM.from_config(config).num_parameters()


@pytest.fixture(scope="module")
def small() -> ModelSize:
    return small_model_size(SmallModelConfig())


METHODS: list[dict[str, Any]] = [
    {"method": "lora", "rank": 4},
    {"method": "lora", "rank": 4, "target_modules": "attention"},
    {"method": "lora", "rank": 4, "target_modules": ["up_proj", "down_proj"]},
    {"method": "lora", "rank": 4, "variant": "dora"},
    {"method": "lora", "rank": 4, "variant": "adalora"},
    {"method": "lora", "rank": 4, "embeddings": "trained"},
    {"method": "full"},
    {"method": "full", "embeddings": "frozen"},
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_trained_matches_the_trainable_parameters(method: dict[str, Any]) -> None:
    """They equal those of adapters on a real model."""
    config = CONFIGS[0]
    tuning = _tuning(method)
    model = attach_adapter(AutoModelForCausalLM.from_config(config), tuning, seed=0)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert size_from_config(config.to_dict()).trained(tuning) == trained


def test_flops_per_token_by_hand() -> None:
    """6 N for full fine-tuning, 4 N + 6 N_adapter for adapters; equal at the published rank."""
    phi, llama = known_size("microsoft/phi-1_5"), known_size("NousResearch/Llama-2-7b-hf")
    for shape, break_even in ((phi, 495), (llama, 881)):
        whole = shape.linear + shape.embedding
        full = shape.training(_tuning({"method": "full"}), 0, 1.0, recompute=False)
        assert full == 6.0 * whole
        lora = shape.training(_lora(8), 0, 1.0, recompute=False)
        assert lora == 4.0 * whole + 6.0 * shape.adapter(_lora(8))
        assert shape.training(_lora(break_even - 1), 0, 1.0, recompute=False) < full
        assert shape.training(_lora(break_even + 1), 0, 1.0, recompute=False) > full
    # Attention over 4096 tokens: queries x keys and weights x values; half of it is masked.
    more = llama.forward(4096, 1.0) - llama.forward(0, 1.0)
    assert more == 2 * 2 * 4096 * 4096 * 32 / 2


def test_recomputed_activations_cost_another_forward_pass(small: ModelSize) -> None:
    full = _tuning({"method": "full"})
    more = small.training(full, 100, 0.5, recompute=True) - small.training(
        full, 100, 0.5, recompute=False
    )
    assert more == small.forward(100, 0.0)


def _lora(rank: int) -> Method:
    return _tuning({"method": "lora", "rank": rank})


def _tuning(method: dict[str, Any]) -> Method:
    (tuning,) = expand_methods(
        StudyConfig.model_construct(
            methods=[MethodConfig.model_validate(method | {"learning_rate": 1e-3})],
            selection=SelectionConfig(probe="new"),
        )
    )
    assert tuning.hyperparameters == [Hyperparameters(learning_rate=1e-3)]
    return tuning
