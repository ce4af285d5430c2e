"""Layers of a model: which ones a method adapts.

Preflight checks take the layers from files, jobs take them from the loaded model. Both use the same
rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from forgetting.config.expand import Method
from forgetting.config.variants import VARIANTS

Kind = Literal["linear", "head", "tied head", "embedding", "tensor", "other"]

MODULE_NAMES = {
    "attention": {"self_attn", "attn", "attention", "self_attention"},
    "mlp": {"mlp", "feed_forward", "block_sparse_moe"},
}
"""Names of the modules that hold the linear layers of the attention and of the MLP."""

EXPERT_MODULES = {"gate", "router", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""Linear layers that peft treats as experts because of their names, in a model with experts."""

NO_DROPOUT: frozenset[Kind] = frozenset({"tensor", "embedding"})
"""Kinds of layers whose adapters have no dropout in peft."""

DESCRIPTIONS: dict[Kind, str] = {
    "tensor": "which belongs to the experts or their router and is adapted as a bare tensor",
    "embedding": "which is an embedding",
    "tied head": "which shares its weights with the input embedding",
}


class UnsupportedLayer(ValueError):
    """The model does not support the adapters of a method.

    Attributes:
        key: the key of the method that must change.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True)
class Layer:
    """A weight of a model.

    Attributes:
        name: of its module.
        shape: of the weight; (experts, rows, columns) for experts.
        kind: how it can be adapted: as a linear layer, an LM head (which may be tied to the input
            embedding), an embedding, a bare tensor (experts and routers), or not at all.
        parameter: name of the weight in its module.
        reads_text: whether text reaches it; only images reach a vision tower.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    parameter: str = "weight"
    reads_text: bool = True

    @property
    def leaf(self) -> str:
        """Return the name by which a study can list the layer."""
        return self.name.rpartition(".")[2] if self.parameter == "weight" else self.parameter

    @property
    def path(self) -> str:
        """Return the full name of the weight."""
        return f"{self.name}.{self.parameter}"

    def is_named(self, target: str) -> bool:
        """Return whether a target names the layer, or the experts that hold it."""
        names = [self.name] if self.parameter == "weight" else [self.name, self.path]
        # Files of a model without a head omit the prefix of the model.
        paths = [f".{prefix}{name}" for name in names for prefix in ("", "model.", "transformer.")]
        return any(path.endswith(f".{target}") for path in paths)


def mark_expert_layers(layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers; in a model with experts, those that peft treats as experts are tensors."""
    if not any(layer.kind == "tensor" for layer in layers):
        return list(layers)
    return [
        replace(layer, kind="tensor")
        if layer.kind == "linear" and layer.leaf in EXPERT_MODULES
        else layer
        for layer in layers
    ]


def selected_layers(layers: Iterable[Layer], targets: str | Sequence[str]) -> list[Layer]:
    """Return the layers of the language model that `target_modules` selects."""
    adaptable = [layer for layer in layers if layer.kind != "other" and layer.reads_text]
    if not isinstance(targets, str):
        return [layer for layer in adaptable if any(layer.is_named(name) for name in targets)]
    linear = [layer for layer in adaptable if layer.kind in ("linear", "tensor")]
    if targets not in MODULE_NAMES:
        return linear
    return [layer for layer in linear if MODULE_NAMES[targets] & set(layer.name.split("."))]


def layers_to_adapt(layers: Sequence[Layer], method: Method) -> list[Layer]:
    """Return the layers that a method adapts.

    Raises:
        UnsupportedLayer: a listed name selects nothing, no text reaches a layer, the variant cannot
            adapt a layer, or the rank exceeds that of a matrix.
    """
    targets = method.target_modules
    linear = [layer for layer in layers if layer.kind in ("linear", "tensor") and layer.reads_text]
    known = ", ".join(sorted({layer.leaf for layer in linear}))
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
    selected = selected_layers(layers, targets)
    if not selected:
        raise UnsupportedLayer(
            "target_modules",
            f"the model has no part called {targets}; name its linear layers, of {known}",
        )
    tied = any(layer.kind == "tied head" for layer in layers)
    if (
        method.second_stage
        and tied
        and any(layer.kind in ("tied head", "embedding") for layer in selected)
    ):
        raise UnsupportedLayer(
            "target_modules",
            "the input embedding and the LM head share their weights, so that to merge the adapter "
            "of one would change both; name other layers",
        )
    check_variant(selected, method)
    check_rank(selected, method)
    return selected


def check_variant(layers: Sequence[Layer], method: Method) -> None:
    """Raise `UnsupportedLayer` if variant, dropout or mitigation does not support a layer."""
    others = "name other layers in target_modules (attention, or a list)"
    for layer in layers:
        where = f"{layer.path}, {DESCRIPTIONS.get(layer.kind, '')}"
        if layer.kind in VARIANTS[method.variant].unsupported_layers:
            raise UnsupportedLayer(
                "variant",
                f"{method.variant} cannot adapt {where}; take variant lora or rslora, or {others}",
            )
        if method.dropout and layer.kind in NO_DROPOUT:
            raise UnsupportedLayer(
                "dropout", f"dropout is not supported on {where}; take dropout: 0, or {others}"
            )
        if layer.kind == "tensor" and _penalizes_weights(method):
            raise UnsupportedLayer(
                "mitigation",
                f"ewc and l2_sp need the update of a matrix, not of {where}; take another "
                f"mitigation, or {others}",
            )


def check_rank(layers: Sequence[Layer], method: Method) -> None:
    """Raise `UnsupportedLayer` if the rank exceeds the smaller side of an adapted matrix."""
    rank = method.largest_rank or 0
    smallest = min(layers, key=lambda layer: min(layer.shape[-2:]), default=None)
    if smallest is None or rank <= (limit := min(smallest.shape[-2:])):
        return
    name = smallest.name if smallest.parameter == "weight" else smallest.path
    raise UnsupportedLayer(
        "rank",
        f"{'initial rank' if method.rank_budget else 'rank'} {rank} is larger than the smallest "
        f"adapted matrix, which has rank {limit} ({name}, "
        f"{' x '.join(map(str, smallest.shape[-2:]))}); take ranks up to {limit}",
    )


def _penalizes_weights(method: Method) -> bool:
    sections = method.mitigation.sections.values() if method.mitigation else ()
    return any(section.needs_weight_update for section in sections)
