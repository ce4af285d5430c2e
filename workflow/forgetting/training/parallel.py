"""Models that several processes train together: shards of full ones, copies of adapted ones.

Full fine-tuning shards the model: each process holds its part of every weight, gradient and moment,
and the weights of a block are gathered while it computes (FSDP2, torch.distributed.fsdp). Adapters
are small: there each process holds the whole model, and the gradients of the adapters are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import pandas as pd
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from forgetting.data.table_files import Row
from forgetting.models.loading import Model
from forgetting.training.team import Team


def shard(model: Model, team: Team, precision: torch.dtype) -> Model:
    """Divide the weights of a model over the processes, block by block; adapters stay whole.

    Each process keeps its rows of every weight in float32, and so its part of the gradients and of
    the optimizer's state. For bfloat16 the matrices of a block are rounded before they are
    gathered, and their gradients are added up in float32. That is what autocast does with them,
    under which a forward pass runs as in one process, so that its numbers are the same: norms,
    embeddings and the sums between blocks are float32 there and here.
    """
    if team.size == 1:
        return model
    if isinstance(model, PeftModel):
        # Drawn alike, but PiSSA's are computed, and may differ by rounding.
        for parameter in model.parameters():
            if parameter.requires_grad:
                same_on_all(parameter.data)
        return model
    mesh = init_device_mesh(model.device.type, (team.size,))
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(precision, torch.float32, cast_forward_inputs=False)
    for block in [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]:
        norms = [part for part in block.modules() if _has_only_vectors(part)]
        if precision != torch.float32 and norms:
            # So small that they may stay gathered until the backward pass.
            fully_shard(norms, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
        fully_shard(block, mesh=mesh, mp_policy=rounded if norms else exact)
    fully_shard(model, mesh=mesh, mp_policy=exact)
    for part in _sharded_parts(model):
        # Sums, not means: the loss is divided by the tokens of all processes already.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    return model


def _has_only_vectors(part: nn.Module) -> bool:
    own = list(part.parameters(recurse=False))
    return bool(own) and all(parameter.ndim < 2 for parameter in own)


def _sharded_parts(model: Model) -> list[FSDPModule]:
    return [part for part in model.modules() if isinstance(part, FSDPModule)]


def is_sharded(model: Model) -> bool:
    """Does each process hold a part of the weights?"""
    return isinstance(model, FSDPModule)


@contextmanager
def gathered(model: Model) -> Iterator[None]:
    """All weights on every process, so that each can measure at its own pace."""
    parts = _sharded_parts(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            is_block = isinstance(part, GradientCheckpointingLayer)
            part.set_reshard_after_forward(is_block, recurse=False)


def add_gradients(parameters: Iterable[nn.Parameter], team: Team) -> None:
    """Sum over the processes what each has; the gradients of a sharded model are summed already."""
    if team.size == 1:
        return
    for parameter in parameters:
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def copies(model: Model) -> int:
    """How many processes add to the gradients of this model while they compute them."""
    return dist.get_world_size() if is_sharded(model) else 1


def same_on_all(value: Tensor) -> Tensor:
    """The first process's value of what each has computed; parts of a sharded tensor stay."""
    if dist.is_initialized() and not isinstance(value, DTensor):
        dist.broadcast(value, src=0)
    return value


def whole(value: Tensor) -> Tensor:
    """A plain tensor, the sum over the processes' parts if it is made of such."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def measure_together(
    measure: Callable[[Mapping[str, list[Row]]], pd.DataFrame],
    probes: Mapping[str, list[Row]],
    team: Team,
) -> pd.DataFrame:
    """The items of all probes, of which each process measures every so manieth, in their order."""
    if team.size == 1:
        return measure(probes)
    rows = [(name, row) for name, probe in probes.items() for row in probe]
    places = range(team.rank, len(rows), team.size)
    own: dict[str, list[Row]] = {name: [] for name in probes}
    for place in places:
        name, row = rows[place]
        own[name].append(row)
    parts = team.gather(measure(own).set_axis(places) if places else pd.DataFrame())
    return pd.concat([part for part in parts if len(part)]).sort_index().reset_index(drop=True)
