"""Which runs of a run group share a pass: one rule, for those that train and those that forecast.

Only runs whose loss is that of their own rows, and whose update is s B A on frozen matrices. And
only where it is faster: where a step is so small that starting its many operations, not their
arithmetic, takes the time.
"""

from __future__ import annotations

from collections.abc import Sequence

from forgetting.config.expand import Method
from forgetting.config.training import TrainingConfig
from forgetting.config.variants import VARIANTS

MAX_BATCHED_TOKENS = {"cpu": 1024, "cuda": 8192}
"""A step of more tokens than this keeps the cores busy by itself. On a CPU eight runs were 1.1
times as fast at 844 tokens, whatever their ranks (bench/results/training.md), and more were not
tried; of a GPU this is what a pass costs beside its tokens (`passes`), not measured."""

MIN_RUNS = 4
"""So many runs must share a pass: two were not faster than one after the other."""

TOKENS_PER_PASS = 4096
"""On a CPU, tokens of a pass that runs share, as far as each passes an example at least: what the
pass keeps for its way back must not outgrow the memory, as nobody tells there that it runs out."""

CPU_BYTES = 2 * 2**30
"""So much memory may the weights, gradients and moments of a group take on a CPU."""


def is_plain_lora(tuning: Method) -> bool:
    """Is the method's loss that of its batch, and its update s B A on a frozen matrix?

    Replay only adds rows. What penalizes predictions or weights is a sum over a single run.
    """
    sections = tuning.mitigation.sections.values() if tuning.mitigation else ()
    return (
        tuning.kind == "lora"
        and VARIANTS[tuning.variant].batchable
        and not tuning.trains_embeddings
        and not any(section.is_penalty for section in sections)
    )


def may_batch(tuning: Method, training: TrainingConfig) -> bool:
    """May runs of a method share a pass, as far as its settings tell, if there are enough of them?

    Trunks may not, so that a branch has the bits of its run alone.
    """
    return training.batched_lora != "never" and not training.durations and is_plain_lora(tuning)


def rows_per_pass(rows: int, runs: int, tokens: float, kind: str) -> int:
    """How many of so many examples each run passes at once, where runs share a pass.

    On a GPU all of them, as far as memory holds them.

    Args:
        tokens: of an example.
        kind: of the device, cpu or cuda.
    """
    if runs == 1 or kind != "cpu":
        return rows
    return max(1, min(rows, int(TOKENS_PER_PASS / (runs * tokens))))


def memory_limit(parameters: int, memory: float | None) -> int:
    """Bytes that the weights, gradients and moments of the runs in a pass may take.

    Args:
        parameters: of the base, in numbers; they take 4 bytes each.
        memory: bytes of a GPU, half of whose rest may be taken; None on a CPU.
    """
    return CPU_BYTES if memory is None else max(0, int(memory - 4 * parameters) // 2)


def partition_runs(
    runs: Sequence[int], sizes: Sequence[int], most: int, room: int
) -> list[list[int]]:
    """Which loads of runs share a pass, by their numbers: every load is in one of the parts.

    In the order of their sizes, since a pass of like ranks is quicker, they are cut into as few
    parts as there can be, and these as even as they can be. A part has at least `MIN_RUNS` runs and
    keeps to both bounds, or it is a load alone.

    Args:
        runs: that come with each load, and stay together.
        sizes: weights that each of these trains, in numbers.
        most: runs of a part.
        room: bytes that weights, gradients and moments of a part may take: 16 a weight, all of
            them in float32.
    """
    order = sorted(range(len(sizes)), key=lambda load: sizes[load])
    # Of the loads before each place: fewest parts, least sum of squares, the last cut from behind.
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    for end in range(1, len(order) + 1):
        options, count, taken = [], 0, 0
        for begin in range(end - 1, -1, -1):
            load = order[begin]
            count, taken = count + runs[load], taken + 16 * runs[load] * sizes[load]
            fits = count <= most and taken <= room
            if begin == end - 1 or (fits and count >= MIN_RUNS):
                parts, squares, _ = best[begin]
                options.append((parts + 1, squares + count**2, -begin))
            if not fits:
                break
        best.append(min(options))
    found, end = [], len(order)
    while end:
        begin = -best[end][2]
        found.append(sorted(order[begin:end]))
        end = begin
    return sorted(found)
