"""Size of a decoder from its configuration alone: number of weights and FLOPs per token.

Resource requests are computed while jobs are planned, so nothing is loaded or downloaded. The size
comes from a folder's config.json and safetensors' headers, from the configuration of a small model
that is pretrained here, or from a table of models on the hub.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from forgetting.config.base_model import BaseModelConfig, SmallModelConfig, is_local
from forgetting.config.expand import Method
from forgetting.config.variants import VARIANTS
from forgetting.io import read_foreign_json
from forgetting.models.architecture import ModelLayers, layers_of, read_shapes, rows_are_independent
from forgetting.models.config_file import text_config_section
from forgetting.models.layers import Layer, selected_layers

KNOWN_CONFIGS: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("known_models.yaml").read_bytes()
)
"""The size-related keys of config.json of models on the hub, by the name of the model."""

GUESS = "meta-llama/Llama-2-7b-hf"
"""Model whose size unknown models are assumed to have."""

UNGATED_MLP_TYPES = {
    *("phi", "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "starcoder2"),
}
"""Types whose MLP has two matrices; the MLP of other types also has a gate."""

CUSTOM_LINEAR_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "falcon"}
"""Types whose linear layers are not `nn.Linear`, so that batched LoRA does not support them."""

LEARNED_POSITION_TYPES = {"gpt2", "gpt_neo", "opt"}
"""Types with an embedding of positions."""


@dataclass(frozen=True)
class ModelSize:
    """Size of a decoder.

    Attributes:
        layers: its weights.
        blocks: number of transformer blocks.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        keys: width of the keys of a token in one block, which equals that of the values.
        queries: width of the queries of a token in one block.
        vocab_size: rows of the embedding.
        tie_word_embeddings: whether the LM head is the input embedding.
        vectors: number of weights in norms and biases.
        is_exact: whether this is the size of the model itself, not a guess.
        batchable_rows: whether a forward pass may hold rows of several runs
            (`training.batched_lora`).
    """

    layers: ModelLayers
    blocks: int
    hidden_size: int
    intermediate_size: int
    keys: int
    queries: int
    vocab_size: int
    tie_word_embeddings: bool
    vectors: int
    is_exact: bool = True
    batchable_rows: bool = True

    @cached_property
    def linear(self) -> int:
        """Return the number of weights in the linear layers of the blocks."""
        return sum(math.prod(layer.shape) for layer in self._selected("all-linear"))

    def _selected(self, targets: str | list[str]) -> list[Layer]:
        return selected_layers(self.layers.layers, targets)

    @property
    def embedding(self) -> int:
        """Return the number of weights of the input embedding, which equals that of the LM head."""
        return self.vocab_size * self.hidden_size

    @property
    def embeddings(self) -> int:
        """Return the number of weights of input embedding and LM head, which may be tied."""
        return self.embedding if self.tie_word_embeddings else 2 * self.embedding

    @property
    def parameters(self) -> int:
        """Return the number of weights, with tied ones counted once."""
        return self.linear + self.embeddings + self.vectors

    @property
    def cache(self) -> int:
        """Return how many numbers the KV cache holds per token."""
        return 2 * self.keys * self.blocks

    def adapted(self, method: Method) -> int:
        """Return the number of weights in the matrices that a method adapts."""
        if method.kind == "full":
            return 0
        return sum(math.prod(layer.shape) for layer in self._selected(method.target_modules))

    def adapter(self, method: Method) -> int:
        """Return the number of weights in a method's adapters.

        An m x n matrix needs r (m + n); dora adds a magnitude for each of the m rows, and adalora
        adds a singular value for each of the r directions of its initial rank.
        """
        if method.kind == "full" or method.largest_rank is None:
            return 0
        rank, count = method.largest_rank, 0
        for layer in self._selected(method.target_modules):
            *experts, rows, columns = layer.shape
            count += math.prod(experts) * rank * (rows + columns)
            count += VARIANTS[method.variant].extra_weights(rows, rank)
        return count

    def trained(self, method: Method) -> int:
        """Return the number of weights that a method trains at once, the maximum over stages."""
        if method.kind == "full":
            return self.parameters - (0 if method.trains_embeddings else self.embeddings)
        first_stage = self.adapter(method) + (self.embeddings if method.trains_embeddings else 0)
        if method.second_stage is None:
            return first_stage
        return max(first_stage, self.second_stage_limit(method.second_stage.layers))

    def second_stage_limit(self, layers: str | list[str]) -> int:
        """Return an upper bound of the number of weights in the layers of a second stage."""
        if isinstance(layers, str) and layers.startswith("last "):
            return self.linear * int(layers.split()[1]) // max(1, self.blocks)
        return self.parameters

    def forward(self, length: float, head: float) -> float:
        """Return the FLOPs of a token's forward pass: 2 for each weight, plus attention.

        Args:
            length: tokens of its sequence. A token attends to half of them on average; queries
                times keys, and weights times values, take 2 FLOPs each.
            head: fraction of the tokens at which the LM head runs.
        """
        attention = 2.0 * length * self.queries * self.blocks
        return 2.0 * (self.linear + head * self.embedding) + attention

    def training(self, method: Method, length: float, head: float, recompute: bool) -> float:
        """Return the FLOPs of training on a token.

        Full fine-tuning takes 6 N, three times the forward pass, because the gradients of weights
        and those of activations take as much as the forward pass each. Adapters take
        4 N + 6 N_adapter, because the base's weights get no gradients.

        Args:
            method: what is trained.
            length: tokens of the sequence.
            head: fraction of the tokens at which the LM head runs.
            recompute: whether activation checkpointing repeats the forward pass of the blocks.
        """
        forward = self.forward(length, head)
        is_frozen = method.kind == "lora"
        head_flops = 2.0 * head * self.embedding
        flops = 3.0 * forward - (2.0 * self.linear if is_frozen else 0.0)
        flops -= head_flops if is_frozen and not method.trains_embeddings else 0.0
        flops += 6.0 * self.adapter(method)
        return flops + (forward - head_flops if recompute else 0.0)


def base_size(base: BaseModelConfig) -> ModelSize:
    """Return the size of a study's base model before it is trained or downloaded."""
    if base.pretrain:
        return small_model_size(base.pretrain)
    assert base.model
    if is_local(base.model):
        return folder_size(Path(base.model).expanduser())
    return known_size(base.model)


def small_model_size(config: SmallModelConfig) -> ModelSize:
    """Return the size of a model that is pretrained here, whose head is the input embedding."""
    return size_from_config(
        {
            "model_type": "llama",
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_position_embeddings,
            "tie_word_embeddings": True,
        }
    )


def folder_size(folder: Path) -> ModelSize:
    """Return the size of a model in a folder, counted from the headers of its weights."""
    config = read_foreign_json(folder / "config.json")
    size = size_from_config(config)
    shapes = read_shapes(folder)
    layers = layers_of(shapes, multimodal=text_config_section(config) is not config)
    if not selected_layers(layers, "all-linear"):
        return size  # The weights have unknown names.
    return replace(
        size,
        layers=ModelLayers(layers, True, True, size.blocks, size.layers.context),
        vectors=sum(math.prod(shape) for shape in shapes.values() if len(shape) == 1),
        tie_word_embeddings=any(layer.kind == "tied head" for layer in layers),
    )


def known_size(model: str) -> ModelSize:
    """Return the size of a model on the hub; unknown models are guessed to have 7 B weights."""
    size = size_from_config(KNOWN_CONFIGS.get(model, KNOWN_CONFIGS[GUESS]))
    return replace(size, is_exact=model in KNOWN_CONFIGS)


def size_from_config(config: Mapping[str, Any]) -> ModelSize:
    """Return the size of a decoder with the usual layers, from the keys of its config.json.

    A config with unknown keys gives a model of 7 B weights, marked as a guess.
    """
    config = text_config_section(config)

    def value(*names: str, default: int = 0) -> int:
        return next((int(config[n]) for n in names if config.get(n) is not None), default)

    width, blocks = value("hidden_size", "n_embd"), value("num_hidden_layers", "n_layer")
    heads, vocab_size = value("num_attention_heads", "n_head"), value("vocab_size")
    if not (width and blocks and heads and vocab_size):
        return known_size("")
    mlp_width = value("intermediate_size", "n_inner", default=4 * width)
    head_dim = value("head_dim", default=width // heads)
    keys, queries = value("num_key_value_heads", default=heads) * head_dim, heads * head_dim
    model_type = str(config.get("model_type", "llama"))
    block: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.up_proj": (mlp_width, width),
        "mlp.down_proj": (width, mlp_width),
    }
    if model_type not in UNGATED_MLP_TYPES:
        block["mlp.gate_proj"] = (mlp_width, width)
    block["input_layernorm"] = (width,)
    if model_type != "phi":
        block["post_attention_layernorm"] = (width,)
    shapes = {
        f"model.layers.{number}.{name}": shape
        for number in range(blocks)
        for name, shape in block.items()
    }
    shapes |= {"model.embed_tokens": (vocab_size, width), "model.norm": (width,)}
    is_tied = bool(config.get("tie_word_embeddings", model_type == "gpt2"))
    if not is_tied:
        shapes["lm_head"] = (vocab_size, width)
    context = value("max_position_embeddings", "n_positions") or None
    vectors = sum(shape[0] for shape in shapes.values() if len(shape) == 1)
    if model_type in UNGATED_MLP_TYPES:  # Norms and linear layers have biases.
        vectors += width + sum(shape[0] for name, shape in shapes.items() if ".layers." in name)
    if model_type == "phi":  # The LM head has one, too.
        vectors += vocab_size
    if model_type in LEARNED_POSITION_TYPES:
        vectors += width * (context or 0)
    return ModelSize(
        layers=ModelLayers(layers_of(shapes), True, True, blocks, context),
        blocks=blocks,
        hidden_size=width,
        intermediate_size=mlp_width,
        keys=keys,
        queries=queries,
        vocab_size=vocab_size,
        tie_word_embeddings=is_tied,
        batchable_rows=rows_are_independent(config) and model_type not in CUSTOM_LINEAR_TYPES,
        vectors=vectors,
    )
