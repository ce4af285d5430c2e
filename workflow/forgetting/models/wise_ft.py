"""WiSE-FT: interpolation between the weights of the base model and of a tuned model."""

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
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """Return theta0 + alpha * (theta - theta0), exact at 0 and 1.

    See Wortsman et al. (2022, arXiv 2109.01903). For an adapter whose update is scale*B*A, the
    result equals the adapter with alpha * scale.
    """
    return {
        name: torch.lerp(base[name], tensor, alpha) if tensor.is_floating_point() else tensor
        for name, tensor in tuned.items()
    }


def interpolated_models(
    base: PreTrainedModel, tuned: Model, alphas: Sequence[float]
) -> Iterator[tuple[float, PreTrainedModel]]:
    """Yield each alpha with the interpolated model, which replaces the weights of `base`.

    Adapters are merged first, so that one definition serves every variant: a smaller scale of a
    dora adapter would keep the tuned magnitudes.

    Raises:
        InputError: an adapter updates a weight that input embedding and LM head share.
    """
    if isinstance(tuned, PeftModel):
        if any(is_tied(tuned, layer) for layer in adapter_layers(tuned)):
            raise InputError(
                "target_modules: the input embedding and the LM head share their weights, so that "
                "to merge the adapter of one would change both; interpolate other methods"
            )
        tuned = tuned.merge_and_unload()
    # Copies on the host, so that the device holds at most two models.
    start, end = ({n: t.cpu().clone() for n, t in m.state_dict().items()} for m in (base, tuned))
    for alpha in alphas:
        base.load_state_dict(interpolated_weights(start, end, alpha))
        yield alpha, base
