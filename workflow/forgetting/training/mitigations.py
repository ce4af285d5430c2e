"""Mitigations of forgetting: replay, a KL penalty to the base model, EWC and L2-SP.

`Mitigations` holds what a run adds to its batches and to its loss; the training loop adds it up.
Weight penalties do not depend on the batch and are added once per step. Token penalties are sums
over target tokens; the loop divides them by the number of targets in the whole step, so that no
gradient depends on how a batch is split.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from forgetting.config.mitigations import EwcConfig, L2SpConfig, MitigationConfig
from forgetting.data.dataset import shuffled
from forgetting.data.tables import evenly_spaced
from forgetting.data.tokenize import Example
from forgetting.models.forward import Batch, collate, target_logits
from forgetting.models.loading import Model, autocast_dtype
from forgetting.training.distributed import broadcast_tensor, is_sharded, replica_count
from forgetting.training.microbatches import attention_for

WeightPenalty = Callable[[Model], Tensor]
"""Return the penalty on the weights of a model, which is added to the loss of a step."""

TokenPenalty = Callable[[Model, Batch, Tensor], Tensor]
"""Return a sum over the target tokens of a batch, given the model's logits at its columns."""


@dataclass(frozen=True)
class Mitigations:
    """All mitigations of a run.

    Attributes:
        replay: examples of general text.
        replay_ratio: fraction of replayed examples among all training examples.
        new_token_penalty: penalty on the predicted distributions at targets of new knowledge.
        replay_token_penalty: penalty on those at targets of replayed examples.
        weight_penalties: penalties on the weights.
    """

    replay: Sequence[Example] = ()
    replay_ratio: float = 0.0
    new_token_penalty: TokenPenalty | None = None
    replay_token_penalty: TokenPenalty | None = None
    weight_penalties: tuple[WeightPenalty, ...] = ()

    def replayed(self, seed: int, start: int, end: int) -> list[Example]:
        """Return the examples to replay with the new examples [start, end) of a run."""
        if not self.replay:
            return []
        indices = replay_indices(len(self.replay), self.replay_ratio, seed, start, end)
        return [self.replay[index] for index in indices]


def build_mitigations(
    model: Model,
    mitigation: MitigationConfig | None,
    tables: Mapping[str, Sequence[Example]],
    replay: Sequence[Example],
    seed: int,
    load_base: Callable[[], Model] | None = None,
) -> Mitigations:
    """Build the mitigations of a method.

    Args:
        model: computes what the base model does; it is not trained yet.
        mitigation: of the method.
        tables: examples of general text, by table.
        replay: examples of the replayed table, packed as those of the new knowledge are.
        seed: seed of the run.
        load_base: load the base model again where `model` is sharded and cannot be copied.
    """
    if mitigation is None:
        return Mitigations()
    kl = token_kl(model, mitigation.kl.weight, load_base) if mitigation.kl else None
    weight_penalties = [
        WEIGHT_PENALTIES[key](model, section, tables, seed)
        for key, section in mitigation.sections.items()
        if key in WEIGHT_PENALTIES
    ]
    return Mitigations(
        replay=replay,
        replay_ratio=mitigation.replay.ratio if mitigation.replay else 0.0,
        new_token_penalty=kl if mitigation.kl and mitigation.kl.tokens == "all" else None,
        replay_token_penalty=kl,
        weight_penalties=tuple(weight_penalties),
    )


def replay_indices(size: int, ratio: float, seed: int, start: int, end: int) -> list[int]:
    """Return which of `size` general examples are replayed with the new examples [start, end).

    The first n new examples of a run are accompanied by floor(n * ratio / (1 - ratio)) replayed
    ones, so that the ratio is exact in the long run, also with small batches. Replay goes through
    one permutation of the general examples after another.
    """
    begun, due = (math.floor(count * ratio / (1 - ratio) + 1e-9) for count in (start, end))
    indices: list[int] = []
    while begun < due:
        epoch, position = divmod(begun, size)
        # The offset keeps these seeds away from those that order the new examples.
        order = shuffled(size, 2**40 + seed * 1_000_003 + epoch)
        taken = order[position : position + due - begun].tolist()
        indices += taken
        begun += len(taken)
    return indices


def token_kl(
    model: Model, weight: float, load_base: Callable[[], Model] | None = None
) -> TokenPenalty:
    """Return the penalty weight * sum over target tokens of KL(base || model), in nats."""
    base_logits = base_predictor(model, load_base)

    def penalty(model: Model, batch: Batch, logits: Tensor) -> Tensor:
        return weight * kl_penalty(base_logits(model, batch), logits, batch.labels).sum()

    return penalty


def kl_penalty(base: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return KL(p || q) = sum_v p(v) (log p(v) - log q(v)) in nats at each target, 0 elsewhere.

    p is the base model's and q the trained model's distribution of the next token, in float32.

    Args:
        base: logits of the base model, of shape (rows, columns, vocabulary).
        logits: logits of the trained model, of the same shape.
        labels: of shape (rows, columns); -100 where there is no target.
    """
    losses = nn.functional.kl_div(
        logits.float().log_softmax(-1),
        base.float().log_softmax(-1),
        reduction="none",
        log_target=True,
    )
    return losses.sum(-1).masked_fill(labels == -100, 0.0)


def base_predictor(
    model: Model, load_base: Callable[[], Model] | None = None
) -> Callable[[Model, Batch], Tensor]:
    """Return a function that computes the base model's logits at the columns of a batch.

    It uses neither dropout nor gradients. Where all adapters start with an update of zero, it
    disables them, since the weights under them are those of the base model. Otherwise it uses a
    frozen copy of the model before training.
    """
    if isinstance(model, PeftModel) and all(
        _is_untrained(layer) for layer in adapted_layers(model)
    ):
        return _without_adapter
    frozen = load_base() if load_base and is_sharded(model) else copy.deepcopy(model)
    frozen = frozen.eval().requires_grad_(False)

    def predict(model: Model, batch: Batch) -> Tensor:
        # With the attention of the trained model: equal weights then have a KL of exactly 0.
        precision = autocast_dtype(batch.ids.device)
        with torch.no_grad(), attention_for(frozen, batch, precision) as frozen_batch:
            return target_logits(frozen, frozen_batch)

    return predict


def _is_untrained(layer: Any) -> bool:
    if isinstance(layer, AdaLoraLayer):
        return not any(values.any() for values in layer.lora_E.values())
    return bool((squared_update_norm(layer) == 0).all())


def _without_adapter(model: Model, batch: Batch) -> Tensor:
    training = model.training
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        logits = target_logits(model, batch)
    model.train(training)
    return logits


def l2_sp(model: Model, weight: float) -> WeightPenalty:
    """Return the penalty weight/2 * ||theta - theta0||^2 over all trained weights.

    Source: Li et al. 2018, section 3.2. For an adapted matrix the distance is its update scale*B*A.
    Weight decay of an adapter differs: it shrinks A and B, whatever their product.
    """
    start = unadapted_weights(model)

    def penalty(model: Model) -> Tensor:
        updates = [squared_update_norm(layer) for layer in adapted_layers(model)]
        distances = [change.square().sum() for change in _differences(model, start)]
        return weight / 2 * torch.stack([*updates, *distances]).sum()

    return penalty


def ewc(model: Model, weight: float, examples: Sequence[Example], seed: int) -> WeightPenalty:
    """Return the penalty weight/2 * sum_i F_i (theta_i - theta0_i)^2 over all trained weights.

    For an adapted matrix, theta - theta0 is its update scale*B*A and F is the Fisher information of
    the matrix. The entries of A and B have no base value from which to measure a distance.
    """
    start = unadapted_weights(model)
    adapted = [layer.get_base_layer().weight for layer in adapted_layers(model)]
    weights = [*adapted, *(model.get_parameter(name) for name in start)]
    information = fisher_information(model, weights, examples, seed)

    def penalty(model: Model) -> Tensor:
        updates = [
            layer.get_delta_weight(*layer.active_adapters) for layer in adapted_layers(model)
        ]
        changes = [*updates, *_differences(model, start)]
        terms = [(f * d.square()).sum() for f, d in zip(information, changes, strict=True)]
        return weight / 2 * torch.stack(terms).sum()

    return penalty


def _differences(model: Model, start: Mapping[str, Tensor]) -> list[Tensor]:
    """Return theta - theta0 of some weights, in the order of `start`."""
    return [model.get_parameter(name) - before for name, before in start.items()]


def fisher_information(
    model: Model, weights: Sequence[nn.Parameter], examples: Sequence[Example], seed: int
) -> list[Tensor]:
    """Estimate the diagonal Fisher information of some weights, per target token.

    F_i = mean over contexts of E_{y ~ model}[(d log p(y | context) / d theta_i)^2]. A token y is
    drawn from the model at each target. The tokens of the text would give the empirical Fisher,
    which differs wherever the model does not fit the text (Kunstner et al. 2019, arXiv 1905.12558).

    The gradients of drawn tokens have mean 0 and are uncorrelated. The expected square of their sum
    over an example is therefore the sum of their squares, which needs one backward pass.

    Returns:
        For each weight, a tensor of its shape.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    sums = [torch.zeros_like(weight) for weight in weights]
    required, training = [weight.requires_grad for weight in weights], model.training
    model.eval()
    for weight in weights:
        weight.requires_grad_(True)
    for example in examples:
        logits = target_logits(model, collate([example], 0, model.device))[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
        # The processes of a sharded model sum their gradients, here of the same example.
        score = -nn.functional.cross_entropy(logits, drawn, reduction="sum") / replica_count(model)
        score.backward()  # type: ignore[no-untyped-call]
        for total, weight in zip(sums, weights, strict=True):
            if weight.grad is not None:
                total += weight.grad.square()
        model.zero_grad(set_to_none=True)
    for weight, before in zip(weights, required, strict=True):
        weight.requires_grad_(before)
    model.train(training)
    targets = sum(example.targets for example in examples)
    return [broadcast_tensor(total / targets) for total in sums]


def adapted_layers(model: Model) -> list[Any]:
    """Return the layers that have an adapter, in the order of the model."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def squared_update_norm(layer: Any) -> Tensor:
    """Return ||scale * B A||_F^2 of one adapter, without forming B A.

    ||B A||_F^2 = tr(A^T B^T B A) = tr((B^T B) (A A^T)), the product of two Gram matrices of size
    rank x rank. Both are symmetric, so the trace is the sum of their elementwise product.
    """
    (adapter,) = layer.active_adapters
    if adapter in layer.lora_A:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    else:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    product: Tensor = (b.T @ b) * (a @ a.T)
    return product.sum() * float(layer.scaling[adapter]) ** 2


def unadapted_weights(model: Model) -> dict[str, Tensor]:
    """Return a copy of all trained weights that do not belong to an adapter, by name."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" not in name
    }


def _build_ewc(
    model: Model, section: EwcConfig, tables: Mapping[str, Sequence[Example]], seed: int
) -> WeightPenalty:
    rows = evenly_spaced(tables[section.table], section.samples)
    return ewc(model, section.weight, rows, seed)


def _build_l2_sp(
    model: Model, section: L2SpConfig, tables: Mapping[str, Sequence[Example]], seed: int
) -> WeightPenalty:
    return l2_sp(model, section.weight)


WEIGHT_PENALTIES: dict[str, Callable[..., WeightPenalty]] = {
    "ewc": _build_ewc,
    "l2_sp": _build_l2_sp,
}
"""Builders of the penalties on the weights, by their keys in `MitigationConfig`."""
