"""How large a decoder is, from its configuration alone: weights, and arithmetic per token.

Nothing is loaded and nothing downloaded, so that the jobs of a study can be sized while they are
planned: from a folder's config.json and the headers of its weights, from the settings of a small
model that is trained here, or from a table of models that the hub has.

Models of the hub: what their config.json says of their size, since planning is offline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from forgetting.config.base_model import BaseModelConfig, SmallModelConfig, is_local
from forgetting.config.expand import Method
from forgetting.config.variants import VARIANTS
from forgetting.io import read_foreign_json
from forgetting.models.architecture import ModelLayers, layers_of, read_shapes, rows_are_apart
from forgetting.models.config_file import text_config_section
from forgetting.models.layers import Layer, selected_layers

LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "NousResearch/Llama-2-7b-hf": LLAMA_7B,
    "NousResearch/Llama-2-7b-chat-hf": LLAMA_7B,
    "meta-llama/Llama-2-7b-hf": LLAMA_7B,
    "meta-llama/Llama-2-7b-chat-hf": LLAMA_7B,
    "microsoft/phi-1_5": {
        "model_type": "phi",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "vocab_size": 51200,
        "max_position_embeddings": 2048,
    },
    "HuggingFaceTB/SmolLM2-135M": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "HuggingFaceTB/SmolLM2-1.7B": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "openai-community/gpt2": {
        "model_type": "gpt2",
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "vocab_size": 50257,
        "n_positions": 1024,
    },
}
"""Keys of config.json, by the name of the model."""


PLAIN_MLP = {"phi", "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "starcoder2"}
"""Types whose MLP has two matrices; the others have a gate beside them."""

OTHER_LAYERS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "falcon"}
"""Types whose linear layers are no plain ones, so that runs share no pass through them."""

LEARNED_POSITIONS = {"gpt2", "gpt_neo", "opt"}
"""Types with an embedding of positions."""


@dataclass(frozen=True)
class ModelSize:
    """A decoder in numbers.

    Attributes:
        layers: of its weights, by name.
        blocks: transformer blocks.
        width: of the residual stream.
        inner: width of the MLP.
        keys: numbers in the keys of a token in one block, as many as in its values.
        queries: numbers in the queries of a token in one block.
        vocabulary: rows of the embedding.
        tie_word_embeddings: is the LM head the input embedding?
        vectors: numbers in norms and biases.
        is_exact: is this the model's own size, rather than a guess?
        rows_are_apart: may rows of several runs share a pass through it (`training.fusing`)?
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
        """Weights of the linear layers in the blocks, in numbers."""
        return sum(math.prod(layer.shape) for layer in self._selected("all-linear"))

    def _selected(self, targets: str | list[str]) -> list[Layer]:
        return selected_layers(self.layers.layers, targets)

    @property
    def embedding(self) -> int:
        """Weights of the input embedding, as many as of the LM head, in numbers."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """Weights in all, tied ones once, in numbers."""
        ends = self.embedding if self.tie_word_embeddings else 2 * self.embedding
        return self.linear + ends + self.vectors

    @property
    def cache(self) -> int:
        """Numbers in the cache of keys and values, per token."""
        return 2 * self.keys * self.blocks

    def adapted(self, tuning: Method) -> int:
        """Weights of the matrices beside which a method puts an adapter, in numbers."""
        if tuning.kind == "full":
            return 0
        return sum(math.prod(layer.shape) for layer in self._selected(tuning.target_modules))

    def adapter(self, tuning: Method) -> int:
        """Weights of a method's adapters, in numbers.

        r (m + n) for each m x n matrix; dora has a magnitude for each of the m rows as well, and
        adalora, at its initial rank, a singular value for each of the r directions.
        """
        if tuning.kind == "full" or tuning.largest_rank is None:
            return 0
        rank, count = tuning.largest_rank, 0
        for layer in self._selected(tuning.target_modules):
            *experts, rows, columns = layer.shape
            count += math.prod(experts) * rank * (rows + columns)
            count += VARIANTS[tuning.variant].extra_weights(rows, rank)
        return count

    def trained(self, tuning: Method) -> int:
        """Weights that a method trains at once, in numbers; of a hybrid, in its larger part."""
        ends = self.embedding if self.tie_word_embeddings else 2 * self.embedding
        if tuning.kind == "full":
            return self.parameters - (0 if tuning.trains_embeddings else ends)
        own = self.adapter(tuning) + (ends if tuning.trains_embeddings else 0)
        if tuning.second_stage is None:
            return own
        return max(own, self.layers_of(tuning.second_stage.layers))

    def layers_of(self, layers: str | list[str]) -> int:
        """Weights of layers that a hybrid trains in full: `all`, `last N`, or at most all."""
        if isinstance(layers, str) and layers.startswith("last "):
            return self.linear * int(layers.split()[1]) // max(1, self.blocks)
        return self.parameters

    def forward(self, length: float, head: float) -> float:
        """FLOPs of a token's forward pass: 2 for each weight, and the attention's products.

        Args:
            length: tokens of its sequence, of which it sees half on average; queries times keys,
                and weights times values, take 2 each.
            head: share of the tokens at which the LM head is needed.
        """
        attention = 2.0 * length * self.queries * self.blocks
        return 2.0 * (self.linear + head * self.embedding) + attention

    def training(self, tuning: Method, length: float, head: float, again: bool) -> float:
        """FLOPs of a token that is trained on.

        Full: 6 N, thrice the forward pass, since the gradients of weights and those of activations
        take as much each. Adapters: 4 N + 6 N_adapter, since the base's weights get no gradients.
        With activation checkpointing (`again`) the forward pass of the blocks is made twice.
        """
        forward = self.forward(length, head)
        frozen = tuning.kind == "lora"
        ends = 2.0 * head * self.embedding
        flops = 3.0 * forward - (2.0 * self.linear if frozen else 0.0)
        flops -= ends if frozen and not tuning.trains_embeddings else 0.0
        flops += 6.0 * self.adapter(tuning)
        return flops + (forward - ends if again else 0.0)


def base_size(base: BaseModelConfig) -> ModelSize:
    """The base of a study in numbers, before it is trained or downloaded."""
    if base.pretrain:
        return small_model_size(base.pretrain)
    assert base.model
    if is_local(base.model):
        return folder_size(Path(base.model).expanduser())
    return known_size(base.model)


def small_model_size(spec: SmallModelConfig) -> ModelSize:
    """A model that is trained here; its head is the input embedding."""
    config = {
        "model_type": "llama",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "tie_word_embeddings": True,
    }
    return size_from_config(config)


def folder_size(folder: Path) -> ModelSize:
    """A model in a folder; its weights are counted by the headers of their files."""
    config = read_foreign_json(folder / "config.json")
    shape = size_from_config(config)
    shapes = read_shapes(folder)
    found = layers_of(shapes, multimodal=text_config_section(config) is not config)
    if not selected_layers(found, "all-linear"):
        return shape  # under names that are not known
    layers = ModelLayers(found, True, True, shape.blocks, shape.layers.context)
    vectors = sum(math.prod(s) for s in shapes.values() if len(s) == 1)
    tied = not any(name.endswith("lm_head") for name in shapes)
    return ModelSize(
        **(vars(shape) | {"layers": layers, "vectors": vectors, "tie_word_embeddings": tied})
    )


def known_size(model: str) -> ModelSize:
    """A model of the hub: as the table has it, else one of 7 billion weights, marked as a guess."""
    if model in KNOWN_CONFIGS:
        return size_from_config(KNOWN_CONFIGS[model])
    return ModelSize(**(vars(size_from_config(LLAMA_7B)) | {"is_exact": False}))


def size_from_config(config: Mapping[str, Any]) -> ModelSize:
    """A decoder with the usual layers, from the keys of its config.json.

    One whose keys have other names is taken for a model of 7 billion weights, marked as a guess.
    """
    config = text_config_section(config)

    def of(*names: str, default: int = 0) -> int:
        return next((int(config[n]) for n in names if config.get(n) is not None), default)

    width, blocks = of("hidden_size", "n_embd"), of("num_hidden_layers", "n_layer")
    heads, vocabulary = of("num_attention_heads", "n_head"), of("vocab_size")
    if not (width and blocks and heads and vocabulary):
        return known_size("")
    inner = of("intermediate_size", "n_inner", default=4 * width)
    size = of("head_dim", default=width // heads)
    keys, queries = of("num_key_value_heads", default=heads) * size, heads * size
    kind = str(config.get("model_type", "llama"))
    gated = kind not in PLAIN_MLP
    block = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    } | ({"mlp.gate_proj": (inner, width)} if gated else {})
    shapes = {
        f"model.layers.{number}.{name}": matrix
        for number in range(blocks)
        for name, matrix in block.items()
    }
    shapes |= {"model.embed_tokens": (vocabulary, width), "lm_head": (vocabulary, width)}
    context = of("max_position_embeddings", "n_positions") or None
    tied = config.get("tie_word_embeddings", kind == "gpt2")
    return ModelSize(
        layers=ModelLayers(layers_of(shapes), True, True, blocks, context),
        blocks=blocks,
        hidden_size=width,
        intermediate_size=inner,
        keys=keys,
        queries=queries,
        vocab_size=vocabulary,
        tie_word_embeddings=bool(tied),
        batchable_rows=rows_are_apart(config) and kind not in OTHER_LAYERS,
        vectors=_vector_parameters(kind, shapes, blocks, width, vocabulary)
        + (width * (context or 0) if kind in LEARNED_POSITIONS else 0),
    )


def _vector_parameters(
    kind: str, shapes: Mapping[str, tuple[int, ...]], blocks: int, width: int, vocabulary: int
) -> int:
    """Numbers in norms and biases: Llama's kind has two norms a block and no biases."""
    outputs = sum(shape[0] for name, shape in shapes.items() if ".layers." in name)
    if kind == "phi":  # one LayerNorm a block, biases everywhere, on the LM head too
        return 2 * (blocks + 1) * width + outputs + vocabulary
    if kind in PLAIN_MLP:
        return 2 * (2 * blocks + 1) * width + outputs
    return (2 * blocks + 1) * width
