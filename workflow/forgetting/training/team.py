"""Several processes that train one run together: who does what, and how they agree.

A step's examples are dealt out over the processes; each computes the share of the loss, and of its
gradients, that is its own, divided by the target tokens of all. The sums over the processes are
then the loss and the gradients of the whole step, whatever the number of processes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from forgetting.encoding.encode import Example
from forgetting.records import InputError
from forgetting.scoring.forward import micro_batches
from forgetting.training.launch import end_to_begin_again

T = TypeVar("T")

PATIENCE = timedelta(hours=6)
"""How long a process waits for the others: longer than one of them takes to tokenize all tables."""

GRACE = 5.0
"""Seconds in which the launcher has noticed that a process has ended, and ended the others."""


class NoRoom(Exception):
    """Memory has run out in one of several processes, with so many rows in a forward pass."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.rows = rows


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
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
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

        One that has lost another has nothing of its own to tell: the launcher ends it. Where memory
        runs out, the launcher starts all again.
        """
        try:
            yield
        except InputError:
            if self.notes and self.notes.add("mistakes", 1) > 1:
                raise SystemExit(1) from None
            raise
        except NoRoom:
            end_to_begin_again()
        except RuntimeError as error:
            if self.size == 1 or not _is_loss(error):
                raise
            time.sleep(GRACE)
            raise InputError(
                f"process {self.rank} no longer hears from the others ({error}); started again, "
                "the run goes on from its newest checkpoint"
            ) from None


def _end_with(parent: int) -> None:
    """End this process soon after its launcher, which cannot end it when it is killed itself.

    Else it would go on, and write where the run that is started again writes too.
    """
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


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
