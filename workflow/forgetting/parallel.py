"""Several processes that train one run together: who does what, and how they agree.

A step's examples are dealt out over the processes; each computes the share of the loss, and of its
gradients, that is its own, divided by the target tokens of all. The sums over the processes are
then the loss and the gradients of the whole step, whatever the number of processes.

Full fine-tuning shards the model: each process holds its part of every weight, gradient and moment,
and the weights of a block are gathered while it computes (FSDP2, torch.distributed.fsdp). Adapters
are small: there each process holds the whole model, and the gradients of the adapters are added up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import pandas as pd
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import Store
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from forgetting.data import Row
from forgetting.encode import Example
from forgetting.forward import micro_batches
from forgetting.models import Model
from forgetting.records import InputError

T = TypeVar("T")

PATIENCE = timedelta(hours=6)
"""How long a process waits for the others: longer than one of them takes to tokenize all tables."""

GRACE = 5.0
"""Seconds in which the launcher has noticed that a process has ended, and ended the others."""


@dataclass(frozen=True)
class Team:
    """The processes that train one run; one alone agrees with itself, and waits for nobody."""

    rank: int = 0
    size: int = 1
    notes: Store | None = None
    """What the processes write for each other, also when they no longer go on together."""

    @classmethod
    def join(cls) -> Team:
        """Meet the processes that torchrun started beside this one; without it, be alone."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        backend, device = "gloo", None
        if torch.cuda.is_available():
            place, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if place >= there:
                raise InputError(
                    f"methods: processes: {size} processes need a GPU each, and this machine has "
                    f"{there}; ask for fewer, or run the job where there are more"
                )
            backend, device = "nccl", torch.device("cuda", place)
            torch.cuda.set_device(device)
        notes, rank, _ = next(rendezvous("env://"))
        dist.init_process_group(
            backend, timeout=PATIENCE, store=notes, rank=rank, world_size=size, device_id=device
        )
        return cls(rank, size, notes)

    def leave(self) -> None:
        """Part from the others, once all is done."""
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Is this the process that writes and tells?"""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.size > 1:
            dist.barrier()

    def agree(self, value: T) -> T:
        """The first process's value, on all."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order, on all."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def total(self, amount: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.size > 1:
            dist.all_reduce(amount)
        return amount

    def own_seed(self, seed: int) -> int:
        """A seed for this process, so that its dropout is not that of another's examples."""
        return seed + self.rank * 2**40

    def passes(self, rows: Sequence[Example], most: int, overhead: int) -> list[list[Example]]:
        """The examples of each of this process's forward passes.

        All processes make as many: gathering a block's weights takes all of them. One that has
        nothing left passes an example without targets, whose loss and gradients are 0.

        Args:
            rows: the examples of all processes.
            most: rows of the largest pass.
            overhead: what a pass costs beside its tokens, in tokens.
        """
        lengths = [len(example.ids) for example in rows]
        plans = [
            [
                [share[index] for index in part]
                for part in micro_batches([lengths[index] for index in share], most, overhead)
            ]
            for share in deal(lengths, self.size)
        ]
        own = [[rows[index] for index in part] for part in plans[self.rank]]
        idle = max(map(len, plans)) - len(own)
        return own + [[Example(ids=rows[0].ids[:1], prompt=1)] for _ in range(idle)]

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process go through, then the others, which find what it has written."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """Let what goes wrong be told by the process that meets it first, and by no other.

        One that has lost another has nothing of its own to tell: the launcher ends it.
        """
        try:
            yield
        except InputError:
            if self.notes and self.notes.add("mistakes", 1) > 1:
                raise SystemExit(1) from None
            raise
        except RuntimeError as error:
            if self.size == 1 or not _is_loss(error):
                raise
            time.sleep(GRACE)
            raise InputError(
                f"process {self.rank} no longer hears from the others ({error}); started again, "
                "the run goes on from its newest checkpoint"
            ) from None


def _is_loss(error: RuntimeError) -> bool:
    """Has a process waited in vain for another? Gloo tells it in a general error."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


ALONE = Team()


def deal(lengths: Sequence[int], shares: int) -> list[list[int]]:
    """Indices of the examples of each share, of about as many tokens: the longest first, each to
    the share that has the fewest tokens so far. Every share is in rising order.
    """
    dealt: list[list[int]] = [[] for _ in range(shares)]
    tokens = [0] * shares
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        share = tokens.index(min(tokens))
        dealt[share].append(index)
        tokens[share] += lengths[index]
    return [sorted(share) for share in dealt]


def shard(model: Model, team: Team, precision: torch.dtype) -> Model:
    """Divide the weights of a model over the processes, block by block; not of an adapted model.

    Each process keeps its rows of every weight in float32, and so its part of the gradients and of
    the optimizer's state. For bfloat16 the matrices of a block are rounded before they are
    gathered, and their gradients are added up in float32. That is what autocast does with them,
    under which a forward pass runs as in one process, so that its numbers are the same: norms,
    embeddings and the sums between blocks are float32 there and here.
    """
    if team.size == 1 or isinstance(model, PeftModel):
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
