"""Several processes that train one run: the process group, sharded models and shared gradients.

The examples of a step are divided among the processes. Each computes the gradients of its part of
the loss, divided by the number of target tokens of the whole step. Their sum over all processes is
the gradient of the step, whatever the number of processes.

Full fine-tuning shards the model (FSDP2, torch.distributed.fsdp): each process holds a part of
every weight, gradient and moment, and the weights of a block are gathered while it computes.
Adapters are small: each process holds the whole model, and the adapters' gradients are summed.
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
"""How long a process waits for the others; tokenizing all tables takes less time."""

END_GRACE_SECONDS = 5.0
"""Seconds within which the launcher notices that a process has ended, and ends the others."""


class OutOfMemory(Exception):
    """Memory ran out in one of several processes; `examples` is the number in a forward pass."""

    def __init__(self, examples: int) -> None:
        super().__init__(examples)
        self.examples = examples


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train one run; with a single process, every method is local."""

    rank: int = 0
    world_size: int = 1
    store: Store | None = None
    """Key-value store, which the processes can use even when collective calls fail."""

    @classmethod
    def init(cls) -> ProcessGroup:
        """Join the processes that torchrun started; without torchrun, return a single process."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls()
        threading.Thread(target=abort_with, args=(os.getppid(),), daemon=True).start()
        backend, device = "gloo", None
        if torch.cuda.is_available():
            index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if index >= count:
                raise InputError(
                    f"methods: processes: {world_size} processes need a GPU each, and this machine "
                    f"has {count}; ask for fewer, or run the job where there are more"
                )
            backend, device = "nccl", torch.device("cuda", index)
            torch.cuda.set_device(device)
        store, rank, _ = next(rendezvous("env://"))
        dist.init_process_group(
            backend,
            timeout=INIT_TIMEOUT,
            store=store,
            rank=rank,
            world_size=world_size,
            device_id=device,
        )
        return cls(rank, world_size, store)

    def destroy(self) -> None:
        """Leave the process group; call it once all work is done."""
        if self.world_size > 1:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Return whether this process writes files and messages."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all processes have called this method."""
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, value: T) -> T:
        """Return the value of the main process on all processes."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks, on all processes."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """Return the sum over the processes, computed in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def rank_seed(self, seed: int) -> int:
        """Return a seed for this process, so that dropout masks differ between processes."""
        return seed + self.rank * 2**40

    def microbatches(
        self, examples: Sequence[Example], limit: int, overhead: int
    ) -> list[list[Example]]:
        """Return the examples of each forward pass of this process.

        All processes make equally many passes, since gathering a block's weights is a collective
        call. A process without examples left passes one without targets, whose gradients are 0.

        Args:
            examples: of all processes.
            limit: examples of the largest pass.
            overhead: fixed cost of a pass, in tokens.
        """
        lengths = [len(example.ids) for example in examples]
        passes_by_rank = [
            [
                [share[index] for index in part]
                for part in micro_batches([lengths[index] for index in share], limit, overhead)
            ]
            for share in split_by_tokens(lengths, self.world_size)
        ]
        passes = [[examples[index] for index in part] for part in passes_by_rank[self.rank]]
        missing = max(map(len, passes_by_rank)) - len(passes)
        if missing:
            passes += [[Example(ids=examples[0].ids[:1], prompt_length=1)]] * missing
        return passes

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process first, then in the others, which read what it wrote."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    @contextmanager
    def report_once(self) -> Iterator[None]:
        """Print each error once: only the first failing process reports it.

        A process that merely lost its peers waits for the launcher, which ends it. Out of memory,
        the launcher restarts all processes.
        """
        try:
            yield
        except InputError:
            if self.store and self.store.add("mistakes", 1) > 1:
                raise SystemExit(1) from None
            raise
        except OutOfMemory:
            request_restart()
        except RuntimeError as error:
            if self.world_size == 1 or not _is_peer_loss(error):
                raise
            time.sleep(END_GRACE_SECONDS)
            raise InputError(
                f"process {self.rank} lost the connection to the other processes ({error}); "
                "start the job again: the run resumes from its newest checkpoint"
            ) from None


def abort_with(parent: int) -> None:
    """End this process when its launcher has ended.

    A killed launcher cannot end its processes. They would write to the folder of the restarted run.
    """
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _is_peer_loss(error: RuntimeError) -> bool:
    """Return whether an error means that another process ended; Gloo raises a general error."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


SINGLE_PROCESS = ProcessGroup()


def split_by_tokens(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Divide examples into shares of about equally many tokens.

    The examples are assigned by decreasing length, each to the share with the fewest tokens.

    Returns:
        The indices of the examples of each share, in rising order.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        smallest = tokens.index(min(tokens))
        shares[smallest].append(index)
        tokens[smallest] += lengths[index]
    return [sorted(share) for share in shares]


def shard_model(model: Model, process_group: ProcessGroup, precision: torch.dtype) -> Model:
    """Shard the weights of a model over the processes, block by block; adapters stay whole.

    Each process holds its rows of every weight in float32, and so its part of the gradients and of
    the optimizer's state. With bfloat16, the matrices of a block are rounded before they are
    gathered, and their gradients are summed in float32. Autocast rounds the same tensors in a
    single process, so the numbers agree: norms, embeddings and the residual stream stay float32.
    """
    if process_group.world_size == 1:
        return model
    if isinstance(model, PeftModel):
        # PiSSA computes its adapters, which may differ between processes by rounding.
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
            # They are small enough to stay gathered until the backward pass.
            fully_shard(norms, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
        fully_shard(block, mesh=mesh, mp_policy=rounded if norms else exact)
    fully_shard(model, mesh=mesh, mp_policy=exact)
    for part in _shard_units(model):
        # Sums, not means: the loss is already divided by the targets of all processes.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    return model


def _has_only_vectors(part: nn.Module) -> bool:
    parameters = list(part.parameters(recurse=False))
    return bool(parameters) and all(parameter.ndim < 2 for parameter in parameters)


def _shard_units(model: Model) -> list[FSDPModule]:
    return [part for part in model.modules() if isinstance(part, FSDPModule)]


def is_sharded(model: Model) -> bool:
    """Return whether each process holds a part of the weights."""
    return isinstance(model, FSDPModule)


@contextmanager
def unsharded(model: Model) -> Iterator[None]:
    """Gather all weights on every process, so that each can evaluate independently."""
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
    """Sum gradients over the processes; those of a sharded model are summed already."""
    if process_group.world_size == 1:
        return
    for parameter in parameters:
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def replica_count(model: Model) -> int:
    """Return the number of processes whose backward passes are summed into one gradient."""
    return dist.get_world_size() if is_sharded(model) else 1


def broadcast_tensor(value: Tensor) -> Tensor:
    """Return the main process's value on all processes; a sharded tensor is returned as it is."""
    if dist.is_initialized() and not isinstance(value, DTensor):
        dist.broadcast(value, src=0)
    return value


def full_tensor(value: Tensor) -> Tensor:
    """Return a plain tensor, gathered or summed over the processes if `value` is distributed."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def evaluate_distributed(
    evaluate: Callable[[Mapping[str, list[Row]]], pd.DataFrame],
    probes: Mapping[str, list[Row]],
    process_group: ProcessGroup,
) -> pd.DataFrame:
    """Evaluate all probes and return the items in their original order, on all processes.

    Process r evaluates the rows r, r + world_size, and so on.
    """
    if process_group.world_size == 1:
        return evaluate(probes)
    rows = [(name, row) for name, probe in probes.items() for row in probe]
    indices = range(process_group.rank, len(rows), process_group.world_size)
    share: dict[str, list[Row]] = {name: [] for name in probes}
    for index in indices:
        name, row = rows[index]
        share[name].append(row)
    items = evaluate(share).set_axis(indices) if indices else pd.DataFrame()
    parts = process_group.all_gather(items)
    return pd.concat([part for part in parts if len(part)]).sort_index().reset_index(drop=True)
