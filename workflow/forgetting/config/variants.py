"""The adapter variants that a study may name, and what the library has to know of each.

Plain data, without torch: planning reads it. A variant that peft trains by itself is one entry
here. One with steps of its own, such as AdaLoRA, also has functions in
`forgetting.models.adapters`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal


@dataclass(frozen=True)
class Variant:
    """What distinguishes an adapter variant.

    Attributes:
        description: for the table of study keys.
        peft_options: arguments of `peft.LoraConfig`.
        unsupported_layers: kinds of layers that it cannot adapt, or that peft adapts differently
            (`forgetting.models.layers.Kind`).
        batchable: whether runs of one rank can share forward and backward passes.
        linear_update: whether it changes a weight by scale * B * A, which EWC and L2-SP penalize.
        root_scale: whether the scale is alpha / sqrt(rank) instead of alpha / rank.
        rank_budget: whether ranks are pruned during training. Excludes LoRA+ and second stages.
        rounds_frozen_weights: whether adapted matrices may be kept in bfloat16 under autocast.
        extra_weights: trainable weights of an adapter beyond rank * (rows + columns), by rows
            and rank.
    """

    description: str
    peft_options: Mapping[str, Any] = field(default_factory=dict)
    unsupported_layers: frozenset[str] = frozenset({"tensor"})
    batchable: bool = False
    linear_update: bool = False
    root_scale: bool = False
    rank_budget: bool = False
    rounds_frozen_weights: bool = True
    extra_weights: Callable[[int, int], int] = lambda rows, rank: 0


VARIANTS: dict[str, Variant] = {
    "lora": Variant(
        description="scale alpha/r",
        unsupported_layers=frozenset(),
        batchable=True,
        linear_update=True,
    ),
    "rslora": Variant(
        description="alpha/sqrt(r) (arXiv 2312.03732)",
        peft_options={"use_rslora": True},
        unsupported_layers=frozenset(),
        batchable=True,
        linear_update=True,
        root_scale=True,
    ),
    "dora": Variant(
        description="weight-decomposed (arXiv 2402.09353)",
        peft_options={"use_dora": True},
        rounds_frozen_weights=False,
        extra_weights=lambda rows, rank: rows,  # a magnitude for each row
    ),
    "pissa": Variant(
        description="starts from the largest singular values (arXiv 2404.02948)",
        peft_options={"init_lora_weights": "pissa"},
        unsupported_layers=frozenset({"tensor", "embedding", "tied head"}),
        batchable=True,
    ),
    "adalora": Variant(
        description="distributes a rank budget over the layers, scale alpha over the initial rank "
        "(arXiv 2303.10512)",
        unsupported_layers=frozenset({"tensor", "embedding"}),
        rank_budget=True,
        extra_weights=lambda rows, rank: rank,  # a singular value for each direction
    ),
}

# A type checker wants a literal; validation and the JSON schema want the names above.
if TYPE_CHECKING:
    VariantName = str
else:
    VariantName = Literal[tuple(VARIANTS)]


def variants_where(trait: str) -> str:
    """Return the names of the variants that have a trait, as words: `lora and rslora`."""
    return " and ".join(name for name, variant in VARIANTS.items() if getattr(variant, trait))
