"""Several processes that train one run together: who does what, and how they agree.

A step's examples are dealt out over the processes; each computes the share of the loss, and of its
gradients, that is its own, divided by the target tokens of all. The sums over the processes are
then the loss and the gradients of the whole step, whatever the number of processes.

Models that several processes train together: shards of full ones, copies of adapted ones.

Full fine-tuning shards the model: each process holds its part of every weight, gradient and moment,
and the weights of a block are gathered while it computes (FSDP2, torch.distributed.fsdp). Adapters
are small: there each process holds the whole model, and the gradients of the adapters are added up.
"""

from __future__ import annotations

import os
import threading
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

from forgetting.data.table_files import Row
from forgetting.data.tokenize import Example
from forgetting.errors import InputError
from forgetting.models.forward import micro_batches
from forgetting.models.loading import Model
from forgetting.training.launch import request_restart

T = TypeVar("T")

INIT_TIMEOUT = timedelta(hours=6)
"""How long a process waits for the others: longer than one of them takes to tokenize all tables."""

END_GRACE_SECONDS = 5.0
"""Seconds in which the launcher has noticed that a process has ended, and ended the others."""


class OutOfMemory(Exception):
    """Memory has run out in one of several processes, with so many rows in a forward pass."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.rows = rows


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train one run; one alone agrees with itself, and waits for nobody."""

    rank: int = 0
    world_size: int = 1
    notes: Store | None = None
    """What the processes write for each other, also when they no longer go on together."""

    @classmethod
    def init(cls) -> ProcessGroup:
        """Meet the processes that torchrun started beside this one; without it, be alone."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        threading.Thread(target=_abort_with, args=(os.getppid(),), daemon=True).start()
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
            backend, timeout=INIT_TIMEOUT, store=notes, rank=rank, world_size=size, device_id=device
        )
        return cls(rank, size, notes)

    def destroy(self) -> None:
        """Part from the others, once all is done."""
        if self.world_size > 1:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Is this the process that writes and tells?"""
        return self.rank == 0

    def barrier(self) -> None:
        """Go on when all have come here."""
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, value: T) -> T:
        """The first process's value, on all."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes, in their order, on all."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def all_reduce_sum(self, amount: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.world_size > 1:
            dist.all_reduce(amount)
        return amount

    def rank_seed(self, seed: int) -> int:
        """A seed for this process, so that its dropout is not that of another's examples."""
        return seed + self.rank * 2**40

    def microbatches(
        self, rows: Sequence[Example], most: int, overhead: int
    ) -> list[list[Example]]:
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
            for share in split_by_tokens(lengths, self.world_size)
        ]
        own = [[rows[index] for index in part] for part in plans[self.rank]]
        idle = max(map(len, plans)) - len(own)
        return own + [[Example(ids=rows[0].ids[:1], prompt_length=1)] for _ in range(idle)]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the first process go through, then the others, which find what it has written."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    @contextmanager
    def report_once(self) -> Iterator[None]:
        """Let what goes wrong be told by the process that meets it first, and by no other.

        One that has lost another has nothing of its own to tell: the launcher ends it. Where memory
        runs out, the launcher starts all again.
        """
        try:
            yield
        except InputError:
            if self.notes and self.notes.add("mistakes", 1) > 1:
                raise SystemExit(1) from None
            raise
        except OutOfMemory:
            request_restart()
        except RuntimeError as error:
            if self.world_size == 1 or not _is_peer_loss(error):
                raise
            time.sleep(END_GRACE_SECONDS)
            raise InputError(
                f"process {self.rank} no longer hears from the others ({error}); started again, "
                "the run goes on from its newest checkpoint"
            ) from None


def _abort_with(parent: int) -> None:
    """End this process soon after its launcher, which cannot end it when it is killed itself.

    Else it would go on, and write where the run that is started again writes too.
    """
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _is_peer_loss(error: RuntimeError) -> bool:
    """Has a process waited in vain for another? Gloo tells it in a general error."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


SINGLE_PROCESS = ProcessGroup()


def split_by_tokens(lengths: Sequence[int], shares: int) -> list[list[int]]:
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


def shard_model(model: Model, process_group: ProcessGroup, precision: torch.dtype) -> Model:
    """Divide the weights of a model over the processes, block by block; adapters stay whole.

    Each process keeps its rows of every weight in float32, and so its part of the gradients and of
    the optimizer's state. For bfloat16 the matrices of a block are rounded before they are
    gathered, and their gradients are added up in float32. That is what autocast does with them,
    under which a forward pass runs as in one process, so that its numbers are the same: norms,
    embeddings and the sums between blocks are float32 there and here.
    """
    if process_group.world_size == 1:
        return model
    if isinstance(model, PeftModel):
        # Drawn alike, but PiSSA's are computed, and may differ by rounding.
        for parameter in model.parameters():
            if parameter.requires_grad:
                broadcast_tensor(parameter.data)
        return model
    mesh = init_device_mesh(model.device.type, (process_group.world_size,))
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(precision, torch.float32, cast_forward_inputs=False)
    for block in [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]:
        norms = [part for part in block.modules() if _has_only_vectors(part)]
        if precision != torch.float32 and norms:
            # So small that they may stay gathered until the backward pass.
            fully_shard(norms, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
        fully_shard(block, mesh=mesh, mp_policy=rounded if norms else exact)
    fully_shard(model, mesh=mesh, mp_policy=exact)
    for part in _shard_units(model):
        # Sums, not means: the loss is divided by the tokens of all processes already.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    return model


def _has_only_vectors(part: nn.Module) -> bool:
    own = list(part.parameters(recurse=False))
    return bool(own) and all(parameter.ndim < 2 for parameter in own)


def _shard_units(model: Model) -> list[FSDPModule]:
    return [part for part in model.modules() if isinstance(part, FSDPModule)]


def is_sharded(model: Model) -> bool:
    """Does each process hold a part of the weights?"""
    return isinstance(model, FSDPModule)


@contextmanager
def unsharded(model: Model) -> Iterator[None]:
    """All weights on every process, so that each can measure at its own pace."""
    parts = _shard_units(model)
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


def all_reduce_gradients(parameters: Iterable[nn.Parameter], process_group: ProcessGroup) -> None:
    """Sum over the processes what each has; the gradients of a sharded model are summed already."""
    if process_group.world_size == 1:
        return
    for parameter in parameters:
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def replica_count(model: Model) -> int:
    """How many processes add to the gradients of this model while they compute them."""
    return dist.get_world_size() if is_sharded(model) else 1


def broadcast_tensor(value: Tensor) -> Tensor:
    """The first process's value of what each has computed; parts of a sharded tensor stay."""
    if dist.is_initialized() and not isinstance(value, DTensor):
        dist.broadcast(value, src=0)
    return value


def full_tensor(value: Tensor) -> Tensor:
    """A plain tensor, the sum over the processes' parts if it is made of such."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def evaluate_distributed(
    measure: Callable[[Mapping[str, list[Row]]], pd.DataFrame],
    probes: Mapping[str, list[Row]],
    process_group: ProcessGroup,
) -> pd.DataFrame:
    """The items of all probes, of which each process measures every so manieth, in their order."""
    if process_group.world_size == 1:
        return measure(probes)
    rows = [(name, row) for name, probe in probes.items() for row in probe]
    places = range(process_group.rank, len(rows), process_group.world_size)
    own: dict[str, list[Row]] = {name: [] for name in probes}
    for place in places:
        name, row = rows[place]
        own[name].append(row)
    parts = process_group.all_gather(measure(own).set_axis(places) if places else pd.DataFrame())
    return pd.concat([part for part in parts if len(part)]).sort_index().reset_index(drop=True)
