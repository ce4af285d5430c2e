"""An adapter added into the matrices that it stands beside, for the length of a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
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
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    weights = [layer.get_base_layer().weight for layer in layers]
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
