"""Which layers get an adapter, and which variants can adapt them.

One rule for the plan, which reads the layers from the headers of files, and for the jobs, which
read them from the loaded model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from forgetting.settings.plan import Tuning

Kind = Literal["linear", "head", "tied head", "embedding", "tensor", "other"]

PARTS = {
    "attention": {"self_attn", "attn", "attention", "self_attention"},
    "mlp": {"mlp", "feed_forward", "block_sparse_moe"},
}
"""Names of the modules that hold the linear layers of the attention and of the MLP."""

BESIDE_EXPERTS = {"gate", "router", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""Linear layers whose names peft takes for those of experts, in a model that has experts."""

UNFIT: dict[str, set[Kind]] = {
    "lora": set(),
    "rslora": set(),
    "dora": {"tensor"},
    "pissa": {"tensor", "embedding", "tied head"},
    "adalora": {"tensor", "embedding"},
    "dropout": {"tensor", "embedding"},
}
"""Kinds of layers that a variant cannot adapt, or peft adapts otherwise than the variant says."""

DESCRIPTIONS: dict[Kind, str] = {
    "tensor": "which belongs to the experts or their router and is adapted as a bare tensor",
    "embedding": "which is an embedding",
    "tied head": "which shares its weights with the input embedding",
}


class Unadaptable(ValueError):
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


def beside_experts(layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers; in a model with experts, what peft takes for experts is a tensor."""
    if not any(layer.kind == "tensor" for layer in layers):
        return list(layers)
    return [
        replace(layer, kind="tensor")
        if layer.kind == "linear" and layer.leaf in BESIDE_EXPERTS
        else layer
        for layer in layers
    ]


def selected_layers(layers: Iterable[Layer], targets: str | Sequence[str]) -> list[Layer]:
    """Return the layers that `target_modules` selects: those of the language model alone."""
    adaptable = [layer for layer in layers if layer.kind != "other" and layer.reads_text]
    if not isinstance(targets, str):
        return [layer for layer in adaptable if any(layer.is_named(name) for name in targets)]
    inner = [layer for layer in adaptable if layer.kind in ("linear", "tensor")]
    if targets not in PARTS:
        return inner
    return [layer for layer in inner if PARTS[targets] & set(layer.name.split("."))]


def layers_to_adapt(layers: Sequence[Layer], tuning: Tuning) -> list[Layer]:
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
            raise Unadaptable(
                "target_modules",
                f"no text reaches the layers {name}, so that their adapters would not be trained; "
                f"name linear layers of the language model, of {known}",
            )
        raise Unadaptable("target_modules", f"the model has no linear layer {name}, but {known}")
    chosen = selected_layers(layers, targets)
    if not chosen:
        raise Unadaptable(
            "target_modules",
            f"the model has no part called {targets}; name its linear layers, of {known}",
        )
    tied = any(layer.kind == "tied head" for layer in layers)
    if tuning.then and tied and any(layer.kind in ("tied head", "embedding") for layer in chosen):
        raise Unadaptable(
            "target_modules",
            "the input embedding and the LM head share their weights, so that to merge the adapter "
            "of one would change both; name other layers",
        )
    check_variant(chosen, tuning)
    check_rank(chosen, tuning)
    return chosen


def check_variant(chosen: Sequence[Layer], tuning: Tuning) -> None:
    """Refuse a variant, or dropout, that cannot be had on one of the layers."""
    for layer in chosen:
        if layer.kind in UNFIT[tuning.variant]:
            raise Unadaptable(
                "variant",
                f"{tuning.variant} cannot adapt {layer.path}, {DESCRIPTIONS[layer.kind]}; "
                "take variant lora or rslora, or name other layers in target_modules "
                "(attention, or a list)",
            )
        if tuning.dropout and layer.kind in UNFIT["dropout"]:
            raise Unadaptable(
                "dropout",
                f"no dropout can be had on {layer.path}, {DESCRIPTIONS[layer.kind]}; "
                "take dropout: 0, or name other layers in target_modules (attention, or a list)",
            )
        if layer.kind == "tensor" and _penalizes_weights(tuning):
            raise Unadaptable(
                "mitigation",
                f"ewc and l2_sp need the update of a matrix, not of {layer.path}, "
                f"{DESCRIPTIONS[layer.kind]}; take another mitigation, or name other layers in "
                "target_modules (attention, or a list)",
            )


def check_rank(chosen: Sequence[Layer], tuning: Tuning) -> None:
    """Refuse a rank above the smaller side of an adapted matrix."""
    rank = tuning.largest_rank or 0
    smallest = min(chosen, key=lambda layer: min(layer.shape[-2:]), default=None)
    if smallest is None or rank <= (limit := min(smallest.shape[-2:])):
        return
    name = smallest.name if smallest.parameter == "weight" else smallest.path
    raise Unadaptable(
        "rank",
        f"{'initial rank' if tuning.budget else 'rank'} {rank} is larger than the smallest adapted "
        f"matrix, which has rank {limit} ({name}, {' x '.join(map(str, smallest.shape[-2:]))}); "
        f"take ranks up to {limit}",
    )


def _penalizes_weights(tuning: Tuning) -> bool:
    return bool(tuning.mitigation and (tuning.mitigation.ewc or tuning.mitigation.l2_sp))
