"""Which runs of a cohort share a pass: one rule, for those that train and those that forecast.

Only runs whose loss is that of their own rows, and whose update is s B A on frozen matrices. And
only where it is faster: where a step is so small that starting its many operations, not their
arithmetic, takes the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

from forgetting.sections.training import Training
from forgetting.settings.architecture import drops_out
from forgetting.settings.plan import Tuning

T = TypeVar("T")

TOKENS = {"cpu": 1024, "cuda": 8192}
"""A step of more tokens than this keeps the cores busy by itself. On a CPU eight runs were still
1.4 times as fast at 934 tokens (bench/RECORD.md), and more were not tried; of a GPU it is what a
pass costs beside its tokens (`gradients`), not measured."""

FEWEST = 4
"""So many runs must share a pass: two were not faster than one after the other."""

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


def rows_are_apart(config: Mapping[str, Any]) -> bool:
    """Does each row of a batch go its own way through a model, as its config.json tells?

    Not with dropout of the base's own, whose masks would be other ones, nor with experts, to which
    rows are sent in another order.
    """
    return not drops_out(config) and not any("expert" in name for name in config)


def room(parameters: int, memory: float | None) -> int:
    """Bytes that the weights, gradients and moments of the runs in a pass may take.

    Args:
        parameters: of the base, in numbers; they take 4 bytes each.
        memory: bytes of a GPU, half of whose rest may be taken; None on a CPU.
    """
    return CPU_BYTES if memory is None else max(0, int(memory - 4 * parameters) // 2)


def packed(runs: Sequence[int], sizes: Sequence[int], most: int, room: int) -> list[list[int]]:
    """Which loads of runs share a pass, by their numbers: every load is in one of the parts.

    Small ones are packed with small ones, into as few parts as hold them and evenly, if each part
    has `FEWEST` runs then. What is too large for `FEWEST` of it to share a pass stands alone, and
    so do those that are left with fewer.

    Args:
        runs: that come with each load, and stay together.
        sizes: weights that each of these trains, in numbers.
        most: runs of a pass: one over an example of each takes no more memory than the examples
            that a run alone may pass at once.
        room: bytes that weights, gradients and moments of a part may take: 16 a weight, all of
            them in float32.
    """

    def fits(part: Sequence[int]) -> bool:
        taken = sum(16 * runs[load] * sizes[load] for load in part)
        return sum(runs[load] for load in part) <= most and taken <= room

    def is_worth_it(part: Sequence[int]) -> bool:
        return sum(runs[load] for load in part) >= FEWEST

    small = [load for load, size in enumerate(sizes) if FEWEST * 16 * size <= room]
    parts: list[list[int]] = []
    for load in sorted(small, key=lambda load: sizes[load]):
        if parts and fits([*parts[-1], load]):
            parts[-1].append(load)
        else:
            parts.append([load])
    even = evenly([load for part in parts for load in part], len(parts))
    if all(fits(part) and is_worth_it(part) for part in even):
        parts = even
    shared = [sorted(part) for part in parts if fits(part) and is_worth_it(part)]
    alone = set(range(len(sizes))).difference(*shared)
    return sorted([*shared, *([load] for load in alone)])


def evenly(items: Sequence[T], count: int) -> list[list[T]]:
    """So many consecutive parts, whose sizes differ by one at most."""
    size, more = divmod(len(items), max(1, count))
    ends = [(number + 1) * size + min(number + 1, more) for number in range(count)]
    return [list(items[begin:end]) for begin, end in pairwise([0, *ends])]
