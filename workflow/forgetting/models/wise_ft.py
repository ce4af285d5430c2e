"""WiSE-FT: weights on the line between the base and a tuned model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from forgetting.errors import InputError
from forgetting.models.adapters import adapter_layers, is_tied
from forgetting.models.loading import Model


def interpolated_weights(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """theta0 + share * (theta - theta0), exact at 0 and 1 (Wortsman et al. 2022, arXiv 2109.01903).

    Of an adapter whose update is scale*B*A, this is the adapter with share * scale.
    """
    return {
        name: torch.lerp(base[name], tensor, share) if tensor.is_floating_point() else tensor
        for name, tensor in tuned.items()
    }


def interpolated_models(
    base: PreTrainedModel, tuned: Model, shares: Sequence[float]
) -> Iterator[tuple[float, PreTrainedModel]]:
    """The base with each share of the update in turn, in the base's own memory.

    Adapters are merged first, so that one definition serves every variant: with dora, say, a
    smaller scale alone would leave the tuned magnitudes.
    """
    if isinstance(tuned, PeftModel):
        if any(is_tied(tuned, layer) for layer in adapter_layers(tuned)):
            raise InputError(
                "target_modules: the input embedding and the LM head share their weights, so that "
                "to merge the adapter of one would change both; interpolate other methods"
            )
        tuned = tuned.merge_and_unload()
    # Kept on the host: two models are the most that the device is to hold.
    start, end = ({n: t.cpu().clone() for n, t in m.state_dict().items()} for m in (base, tuned))
    for share in shares:
        base.load_state_dict(interpolated_weights(start, end, share))
        yield share, base
