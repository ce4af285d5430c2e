"""Which layers get an adapter, and which variants can adapt them.

One rule for the plan, which reads the layers from the headers of files, and for the jobs, which
read them from the loaded model.

Do config.json and the weights tell of one model? As far as names and shapes say.

What is compared is certain for any type of model, or belongs to types whose layers are plain; the
job that loads the model sees the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard

from forgetting.config.expand import Method
from forgetting.config.variants import VARIANTS
from forgetting.errors import InputError

Kind = Literal["linear", "head", "tied head", "embedding", "tensor", "other"]

MODULE_NAMES = {
    "attention": {"self_attn", "attn", "attention", "self_attention"},
    "mlp": {"mlp", "feed_forward", "block_sparse_moe"},
}
"""Names of the modules that hold the linear layers of the attention and of the MLP."""

EXPERT_MODULES = {"gate", "router", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""Linear layers whose names peft takes for those of experts, in a model that has experts."""

NO_DROPOUT: frozenset[Kind] = frozenset({"tensor", "embedding"})
"""Kinds of layers before whose adapters peft has no dropout."""

DESCRIPTIONS: dict[Kind, str] = {
    "tensor": "which belongs to the experts or their router and is adapted as a bare tensor",
    "embedding": "which is an embedding",
    "tied head": "which shares its weights with the input embedding",
}


class UnsupportedLayer(ValueError):
    """A method asks for adapters that its model cannot have.

    Attributes:
        key: the method's key that has to change.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True)
class Layer:
    """A weight of a model.

    Attributes:
        name: of its module.
        shape: of the weight; of experts (experts, rows, columns).
        kind: how it can be adapted: as a linear layer, an LM head (which may be tied to the input
            embedding), an embedding, a bare tensor (experts and routers), or not at all.
        parameter: name of the weight in its module.
        reads_text: does text reach it? Images alone reach a vision tower.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    parameter: str = "weight"
    reads_text: bool = True

    @property
    def leaf(self) -> str:
        """Name by which a study can list the layer."""
        return self.name.rpartition(".")[2] if self.parameter == "weight" else self.parameter

    @property
    def path(self) -> str:
        """Full name of the weight."""
        return f"{self.name}.{self.parameter}"

    def is_named(self, target: str) -> bool:
        """Return whether a target names the layer, or the experts that hold it."""
        names = [self.name] if self.parameter == "weight" else [self.name, self.path]
        # Files of a model without its head leave the model's own name out.
        whole = [f".{prefix}{name}" for name in names for prefix in ("", "model.", "transformer.")]
        return any(name.endswith(f".{target}") for name in whole)


def adapts_experts(layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers; in a model with experts, what peft takes for experts is a tensor."""
    if not any(layer.kind == "tensor" for layer in layers):
        return list(layers)
    return [
        replace(layer, kind="tensor")
        if layer.kind == "linear" and layer.leaf in EXPERT_MODULES
        else layer
        for layer in layers
    ]


def selected_layers(layers: Iterable[Layer], targets: str | Sequence[str]) -> list[Layer]:
    """Return the layers that `target_modules` selects: those of the language model alone."""
    adaptable = [layer for layer in layers if layer.kind != "other" and layer.reads_text]
    if not isinstance(targets, str):
        return [layer for layer in adaptable if any(layer.is_named(name) for name in targets)]
    inner = [layer for layer in adaptable if layer.kind in ("linear", "tensor")]
    if targets not in MODULE_NAMES:
        return inner
    return [layer for layer in inner if MODULE_NAMES[targets] & set(layer.name.split("."))]


def layers_to_adapt(layers: Sequence[Layer], tuning: Method) -> list[Layer]:
    """Return the layers that a method adapts.

    Raises:
        Unadaptable: a listed name selects nothing, no text reaches a layer, the variant cannot
            adapt a layer, or the rank is larger than a matrix.
    """
    targets = tuning.target_modules
    inner = [layer for layer in layers if layer.kind in ("linear", "tensor") and layer.reads_text]
    known = ", ".join(sorted({layer.leaf for layer in inner}))
    for name in targets if isinstance(targets, list) else []:
        if selected_layers(layers, [name]):
            continue
        if any(layer.is_named(name) for layer in layers if not layer.reads_text):
            raise UnsupportedLayer(
                "target_modules",
                f"no text reaches the layers {name}, so that their adapters would not be trained; "
                f"name linear layers of the language model, of {known}",
            )
        raise UnsupportedLayer(
            "target_modules", f"the model has no linear layer {name}, but {known}"
        )
    chosen = selected_layers(layers, targets)
    if not chosen:
        raise UnsupportedLayer(
            "target_modules",
            f"the model has no part called {targets}; name its linear layers, of {known}",
        )
    tied = any(layer.kind == "tied head" for layer in layers)
    if (
        tuning.second_stage
        and tied
        and any(layer.kind in ("tied head", "embedding") for layer in chosen)
    ):
        raise UnsupportedLayer(
            "target_modules",
            "the input embedding and the LM head share their weights, so that to merge the adapter "
            "of one would change both; name other layers",
        )
    check_variant(chosen, tuning)
    check_rank(chosen, tuning)
    return chosen


def check_variant(chosen: Sequence[Layer], tuning: Method) -> None:
    """Refuse a variant, or dropout, that cannot be had on one of the layers."""
    for layer in chosen:
        if layer.kind in VARIANTS[tuning.variant].unsupported_layers:
            raise UnsupportedLayer(
                "variant",
                f"{tuning.variant} cannot adapt {layer.path}, {DESCRIPTIONS[layer.kind]}; "
                "take variant lora or rslora, or name other layers in target_modules "
                "(attention, or a list)",
            )
        if tuning.dropout and layer.kind in NO_DROPOUT:
            raise UnsupportedLayer(
                "dropout",
                f"no dropout can be had on {layer.path}, {DESCRIPTIONS[layer.kind]}; "
                "take dropout: 0, or name other layers in target_modules (attention, or a list)",
            )
        if layer.kind == "tensor" and _penalizes_weights(tuning):
            raise UnsupportedLayer(
                "mitigation",
                f"ewc and l2_sp need the update of a matrix, not of {layer.path}, "
                f"{DESCRIPTIONS[layer.kind]}; take another mitigation, or name other layers in "
                "target_modules (attention, or a list)",
            )


def check_rank(chosen: Sequence[Layer], tuning: Method) -> None:
    """Refuse a rank above the smaller side of an adapted matrix."""
    rank = tuning.largest_rank or 0
    smallest = min(chosen, key=lambda layer: min(layer.shape[-2:]), default=None)
    if smallest is None or rank <= (limit := min(smallest.shape[-2:])):
        return
    name = smallest.name if smallest.parameter == "weight" else smallest.path
    raise UnsupportedLayer(
        "rank",
        f"{'initial rank' if tuning.rank_budget else 'rank'} {rank} is larger than the smallest "
        f"adapted matrix, which has rank {limit} ({name}, "
        f"{' x '.join(map(str, smallest.shape[-2:]))}); take ranks up to {limit}",
    )


def _penalizes_weights(tuning: Method) -> bool:
    sections = tuning.mitigation.sections.values() if tuning.mitigation else ()
    return any(section.needs_weight_update for section in sections)


LayerShape = tuple[int, ...]
ExpectedShape = tuple[str | None, int | None]
"""A key of config.json and the length that it gives; of an unknown one, nothing."""

EMBEDDINGS = ("embed_tokens", "embed_in", "word_embeddings", "wte")
PLAIN = {"gemma", "gemma2", "llama", "mistral", "olmo", "olmo2", "qwen2", "qwen3"}
"""Types whose blocks are those of a Llama, whatever their norms and biases."""


def check_agreement(
    path: Path, config: Mapping[str, Any], shapes: Mapping[str, LayerShape]
) -> None:
    """Refuse weights that are not those of the model in config.json.

    Args:
        path: of config.json.
        config: what it holds.
        shapes: of the weights beside it, by the name of their module.

    Raises:
        InputError: names the file, the key and the weight.
    """
    expected = _lengths(config)
    for name, shape in shapes.items():
        told = expected.get(name) or next(
            (lengths for end, lengths in expected.items() if name.endswith(f".{end}")), ()
        )
        for (key, length), found in zip(told, shape, strict=False):
            if length is not None and length != found:
                raise InputError(
                    f"{path}: {key} is {length}, where the weights have {found} ({name}, "
                    f"{' x '.join(map(str, shape))}), so they are of another model; copy "
                    "config.json and all safetensors from the same one"
                )
    if config["model_type"] in PLAIN:
        _check_blocks(path, config, shapes)


def _check_blocks(path: Path, config: Mapping[str, Any], shapes: Mapping[str, LayerShape]) -> None:
    """Fewer than the configuration says; whatever is beyond them is not loaded."""
    wanted = config.get("num_hidden_layers")
    numbers = [re.search(r"(?:^|\.)layers\.(\d+)\.", name) for name in shapes]
    blocks = len({int(number[1]) for number in numbers if number})
    if _is_count(wanted) and blocks < wanted:
        raise InputError(
            f"{path}: num_hidden_layers is {wanted}, and there are weights of {blocks} blocks; "
            "copy config.json and all safetensors from the same model"
        )


def _lengths(config: Mapping[str, Any]) -> dict[str, tuple[ExpectedShape, ExpectedShape]]:
    """Lengths of matrices, by the end of their names."""
    width = _first(config, "hidden_size", "n_embd", "d_model")
    # Moshi's embedding has a row more.
    rows = _first(config, "vocab_size") if config["model_type"] != "moshi" else (None, None)
    # Some project narrower embeddings to the width of the blocks.
    narrow = _first(config, "word_embed_proj_dim", "embedding_size", "input_embedding_size")
    table = (rows, width if narrow[0] is None else narrow)
    expected = dict.fromkeys(EMBEDDINGS, table)
    if config["model_type"] not in PLAIN:
        return expected
    expected["lm_head"] = table
    inner = _first(config, "intermediate_size")
    expected |= {f"mlp.{name}_proj": (inner, width) for name in ("gate", "up")}
    expected["mlp.down_proj"] = (width, inner)
    heads, few = (_first(config, f"num_{kind}_heads") for kind in ("attention", "key_value"))
    across, within = _product(config, heads), _product(config, few)
    expected |= {"self_attn.q_proj": (across, width), "self_attn.o_proj": (width, across)}
    return expected | {f"self_attn.{name}_proj": (within, width) for name in "kv"}


def _product(config: Mapping[str, Any], heads: ExpectedShape) -> ExpectedShape:
    """Length of all heads together; of unknown heads, none."""
    size = config.get("head_dim")
    if heads[1] is None or not _is_count(size):
        return None, None
    return f"{heads[0]} x head_dim", heads[1] * size


def _first(config: Mapping[str, Any], *names: str) -> ExpectedShape:
    """The first of several keys that gives a number."""
    return next(
        ((name, config[name]) for name in names if _is_count(config.get(name))), (None, None)
    )


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
