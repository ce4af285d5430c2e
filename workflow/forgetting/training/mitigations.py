"""Mitigations of forgetting: what a run adds to its loss or its batches, built once per run.

The loop of training only sums what stands in `Mitigations`. Penalties on the weights do not depend
on the batch, and are added once per step; penalties on predictions are sums over target tokens, and
the loop divides by their number in the whole step, so that no gradient depends on how a batch is
split.
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
"""What is added to the loss of a step for where the weights are."""


TokenPenalty = Callable[[Model, Batch, Tensor], Tensor]
"""A sum over the target tokens of a batch, given the model's logits at its columns."""


@dataclass(frozen=True)
class Mitigations:
    """All that a run does against forgetting.

    Attributes:
        replay: examples of general text.
        share: share of them among all examples that are trained on.
        on_new: penalty on the predictions of target tokens of the new knowledge.
        on_replayed: the same of the replayed examples.
        on_weights: penalties on the weights.
    """

    replay: Sequence[Example] = ()
    replay_ratio: float = 0.0
    new_token_penalty: TokenPenalty | None = None
    replay_token_penalty: TokenPenalty | None = None
    weight_penalties: tuple[WeightPenalty, ...] = ()

    def replayed(self, seed: int, first: int, last: int) -> list[Example]:
        """The examples replayed beside the new ones from the `first` of a run to the `last`."""
        if not self.replay:
            return []
        indices = replay_indices(len(self.replay), self.replay_ratio, seed, first, last)
        return [self.replay[index] for index in indices]


def build_mitigations(
    model: Model,
    mitigation: MitigationConfig | None,
    tables: Mapping[str, Sequence[Example]],
    seed: int,
    load_base: Callable[[], Model] | None = None,
) -> Mitigations:
    """What the method asks for; `model` must still compute what the base does.

    `load_base` gives the base anew where `model`, being sharded, cannot be copied.
    """
    if mitigation is None:
        return Mitigations()
    on_tokens = token_kl(model, mitigation.kl.weight, load_base) if mitigation.kl else None
    on_weights = [
        WEIGHT_PENALTIES[key](model, section, tables, seed)
        for key, section in mitigation.sections.items()
        if key in WEIGHT_PENALTIES
    ]
    return Mitigations(
        replay=tables[mitigation.replay.table] if mitigation.replay else (),
        replay_ratio=mitigation.replay.ratio if mitigation.replay else 0.0,
        new_token_penalty=on_tokens if mitigation.kl and mitigation.kl.tokens == "all" else None,
        replay_token_penalty=on_tokens,
        weight_penalties=tuple(on_weights),
    )


def replay_indices(rows: int, share: float, seed: int, first: int, last: int) -> list[int]:
    """Which of `rows` general rows stand beside the new examples [first, last) of a run.

    Beside n new ones stand floor(n * share / (1 - share)) in all, so that the share is exact in the
    long run, also of small batches. The rows come in permutations, each row once before any twice.
    """
    start, end = (math.floor(count * share / (1 - share) + 1e-9) for count in (first, last))
    indices: list[int] = []
    while start < end:
        round_, place = divmod(start, rows)
        # Far from the seeds that order the new examples.
        order = shuffled(rows, 2**40 + seed * 1_000_003 + round_)
        taken = order[place : place + end - start].tolist()
        indices += taken
        start += len(taken)
    return indices


def token_kl(
    model: Model, weight: float, load_base: Callable[[], Model] | None = None
) -> TokenPenalty:
    """weight * sum over target tokens of KL(base || model)."""
    base_logits = base_predictor(model, load_base)

    def penalty(model: Model, batch: Batch, logits: Tensor) -> Tensor:
        return weight * kl_penalty(base_logits(model, batch), logits, batch.labels).sum()

    return penalty


def kl_penalty(base: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """KL(p || q) = sum_v p(v) (log p(v) - log q(v)) in nats at each target, 0 elsewhere.

    p is the base's and q the model's distribution of the next token, in float32.
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
    """What gives the base's logits at a batch's columns, without dropout and without gradients.

    An adapter that starts as nothing leaves the base's weights as they are: without it, the model
    is the base. Otherwise a frozen copy of the model is made, as it is before training.
    """
    if isinstance(model, PeftModel) and all(
        _is_untrained(layer) for layer in adapted_layers(model)
    ):
        return _without_adapter
    frozen = load_base() if load_base and is_sharded(model) else copy.deepcopy(model)
    frozen = frozen.eval().requires_grad_(False)

    def predict(model: Model, batch: Batch) -> Tensor:
        # In the same way as the model beside it, so that no rounding stands between the two.
        precision = autocast_dtype(batch.ids.device)
        with torch.no_grad(), attention_for(frozen, batch, precision) as own:
            return target_logits(frozen, own)

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
    """weight/2 * ||theta - theta0||^2 over all that is trained (Li et al. 2018, section 3.2).

    With adapters, over the updates scale*B*A of the matrices that they stand beside. Weight decay
    of an adapter is another thing: it shrinks A and B, whatever their product.
    """
    start = unadapted_weights(model)

    def penalty(model: Model) -> Tensor:
        updates = [squared_update_norm(layer) for layer in adapted_layers(model)]
        distances = [distance.square().sum() for distance in _squared_distances(model, start)]
        return weight / 2 * torch.stack([*updates, *distances]).sum()

    return penalty


def ewc(model: Model, weight: float, rows: Sequence[Example], seed: int) -> WeightPenalty:
    """weight/2 * sum_i F_i (theta_i - theta0_i)^2 over all that is trained.

    With adapters, over the updates scale*B*A, with the information of the matrices that they stand
    beside: the adapter's own entries have no place from which to measure a distance.
    """
    start = unadapted_weights(model)
    adapted = [layer.get_base_layer().weight for layer in adapted_layers(model)]
    weights = [*adapted, *(model.get_parameter(name) for name in start)]
    information = fisher_information(model, weights, rows, seed)

    def penalty(model: Model) -> Tensor:
        updates = [
            layer.get_delta_weight(*layer.active_adapters) for layer in adapted_layers(model)
        ]
        moved = [*updates, *_squared_distances(model, start)]
        terms = [(f * move.square()).sum() for f, move in zip(information, moved, strict=True)]
        return weight / 2 * torch.stack(terms).sum()

    return penalty


def _squared_distances(model: Model, start: Mapping[str, Tensor]) -> list[Tensor]:
    """theta - theta0 of some weights, in the order of `start`."""
    return [model.get_parameter(name) - was for name, was in start.items()]


def fisher_information(
    model: Model, weights: Sequence[nn.Parameter], rows: Sequence[Example], seed: int
) -> list[Tensor]:
    """Diagonal Fisher information of some weights, per target token of the rows.

    F_i = mean over contexts of E_{y ~ model}[(d log p(y | context) / d theta_i)^2]. For each target
    a token is drawn from the model instead: with the text's own tokens it would be the empirical
    Fisher, another matrix wherever the model does not fit the text (Kunstner et al. 2019, arXiv
    1905.12558). The gradients of drawn tokens have mean 0 and are uncorrelated, so that the square
    of their sum over a row is, on average, the sum of their squares: one backward pass a row.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    sums = [torch.zeros_like(weight) for weight in weights]
    trained, training = [weight.requires_grad for weight in weights], model.training
    model.eval()
    for weight in weights:
        weight.requires_grad_(True)
    for row in rows:
        logits = target_logits(model, collate([row], 0, model.device))[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
        # Of a sharded model, the gradients of all processes are added up: here, of the same row.
        score = -nn.functional.cross_entropy(logits, drawn, reduction="sum") / replica_count(model)
        score.backward()  # type: ignore[no-untyped-call]
        for total, weight in zip(sums, weights, strict=True):
            if weight.grad is not None:
                total += weight.grad.square()
        model.zero_grad(set_to_none=True)
    for weight, was in zip(weights, trained, strict=True):
        weight.requires_grad_(was)
    model.train(training)
    targets = sum(row.targets for row in rows)
    return [broadcast_tensor(total / targets) for total in sums]


def adapted_layers(model: Model) -> list[Any]:
    """The layers that have an adapter, in the order of the model."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def squared_update_norm(layer: Any) -> Tensor:
    """||scale * B A||_F^2 of one adapter, without forming B A.

    ||B A||_F^2 = tr(A^T B^T B A) = tr((B^T B) (A A^T)): two Gram matrices of the size of the rank.
    Both are symmetric, so that the trace is the sum of their elementwise product.
    """
    (adapter,) = layer.active_adapters
    if adapter in layer.lora_A:
        first, second = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    else:
        first, second = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    product: Tensor = (second.T @ second) * (first @ first.T)
    return product.sum() * float(layer.scaling[adapter]) ** 2


def unadapted_weights(model: Model) -> dict[str, Tensor]:
    """A copy of all weights of the model that are trained, those of an adapter aside."""
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
