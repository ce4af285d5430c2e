"""Which runs of a cohort may be trained in one pass, as far as the settings tell.

Only runs whose loss is that of their own rows, and whose update is s B A on frozen matrices. And
only where it is faster: where a step is so small that starting its many operations, not their
arithmetic, takes the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from forgetting.sections.training import Training
from forgetting.settings.plan import Tuning

TOKENS = {"cpu": 256, "cuda": 8192}
"""A step of more tokens than this keeps the cores busy by itself: `make bench-train` measures it on
a CPU; of a GPU it is what a pass costs beside its tokens (`gradients`), not measured."""

FEWEST = 4
"""So many runs must a sweep have: two in a pass were not faster than one after the other."""

CPU_BYTES = 2 * 2**30
"""So much memory may the weights, gradients and moments of a group take on a CPU."""


def asks_for_plain_adapters(tuning: Tuning) -> bool:
    """Is the method's loss that of its batch, and its update s B A on a frozen matrix?

    Replay only adds rows. What penalizes predictions or weights is a sum over a single run.
    """
    penalties = tuning.mitigation and (
        tuning.mitigation.kl or tuning.mitigation.ewc or tuning.mitigation.l2_sp
    )
    return (
        tuning.kind == "lora"
        and tuning.variant in ("lora", "rslora", "pissa")
        and not tuning.trains_embeddings
        and not penalties
    )


def allows_fusing(tuning: Tuning, training: Training) -> bool:
    """May runs of a method share a pass, as far as its settings tell, if there are enough of them?

    Trunks may not, so that a branch has the bits of its run alone.
    """
    return training.fused != "never" and not training.budgets and asks_for_plain_adapters(tuning)


def may_fuse(tunings: Sequence[Tuning], training: Training) -> bool:
    """Could a cohort of these methods be fused, as far as its settings tell?"""
    return sum(len(tuning.settings) for tuning in tunings) >= FEWEST and all(
        allows_fusing(tuning, training) for tuning in tunings
    )


def most_runs(training: Training, trained: int, room: int) -> int:
    """How many runs fit in a pass, if at least `FEWEST` do, else 1.

    A pass over one example of each run takes no more memory than what a run alone may take.

    Args:
        trained: weights that one run trains, in numbers.
        room: bytes that weights, gradients and moments of all may take.
    """
    # float32: the weight, its gradient, two moments of the optimizer.
    most = min(training.micro_batch_size, room // (16 * trained))
    return most if most >= FEWEST else 1


def evenly(items: Sequence[Any], most: int) -> list[list[Any]]:
    """Consecutive parts of at most so many items, whose sizes differ by one at most."""
    count = math.ceil(len(items) / most)
    size, more = divmod(len(items), max(1, count))
    ends = [(number + 1) * size + min(number + 1, more) for number in range(count)]
    return [list(items[begin:end]) for begin, end in pairwise([0, *ends])]
