"""An adapter added into the matrices that it stands beside, for the length of a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer

from forgetting.models.loading import Model


@contextmanager
def merged(model: Model, precision: torch.dtype) -> Iterator[None]:
    """Measure with W + s B A in the place of W, then put every W back, bit for bit.

    A token is then multiplied once per layer instead of three times: without this, measuring an
    adapter costs up to twice what measuring its base costs. In bfloat16 a small update would be
    lost in the rounding of the sum, so there the adapter stays beside its matrix. While it lasts,
    the matrices that have an adapter are in memory twice.
    """
    layers: list[Any] = []
    if precision == torch.float32 and isinstance(model, PeftModel):
        # The update of a tied head would change the input embedding as well.
        layers = [layer for layer in adapter_layers(model) if not is_tied(model, layer)]
    weights = [adapted_weight(layer) for layer in layers]
    kept = [weight.detach().clone() for weight in weights]
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer in layers:
            layer.unmerge()
        with torch.no_grad():
            # Taking the update off again would leave the rounding of the sum.
            for weight, original in zip(weights, kept, strict=True):
                weight.copy_(original)


def adapter_layers(model: Model) -> list[Any]:
    """Return the layers of peft's that hold an adapter."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapted_weight(layer: Any) -> torch.Tensor:
    """Return the weight that an adapter updates: a matrix, or a tensor of experts."""
    weight: torch.Tensor = (
        layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
    )
    return weight


def is_tied(model: Model, layer: Any) -> bool:
    """Return whether the input embedding and the LM head share the weight of an adapted layer."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [_plain(end).weight for end in ends if end is not None]
    return len(weights) == 2 and weights[0] is weights[1] and adapted_weight(layer) is weights[0]


def _plain(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
