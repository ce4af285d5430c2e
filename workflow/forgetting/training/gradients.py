"""The gradients of a step: the mean loss over all its target tokens, however they are split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch

from forgetting.encoding.encode import Example
from forgetting.memory import release_memory
from forgetting.models.loading import Model, autocast
from forgetting.records import InputError, is_out_of_memory
from forgetting.scoring.forward import logprobs_of, micro_batches, target_logits
from forgetting.training.checkpoints import Progress
from forgetting.training.fused import Stack
from forgetting.training.parallel import add_gradients, whole
from forgetting.training.passes import attending, lay_out, needs_no_padding
from forgetting.training.recipe import Group, Recipe
from forgetting.training.team import Team

FORWARD_OVERHEAD = {"cpu": 256, "cuda": 8192}
"""What a forward and backward pass costs beside its tokens, in tokens: on a CPU, splitting a batch
in two pays for a small model; a GPU waits for launches rather than for padding."""


UNSPLIT = 2**30
"""Where nothing is padded, a batch is split for the sake of memory alone."""


class StepLoss(NamedTuple):
    """What a step has minimized, in nats: the mean over its target tokens, and all penalties."""

    tokens: float
    penalty: float

    @property
    def is_finite(self) -> bool:
        """Are both numbers?"""
        return math.isfinite(self.tokens) and math.isfinite(self.penalty)


def gradients_that_fit(
    model: Model,
    recipe: Recipe,
    batches: Sequence[Sequence[Group]],
    progress: Progress,
    optimizer: torch.optim.Optimizer | Stack,
) -> list[StepLoss]:
    """Gradients and losses of a step; where memory runs out, again with half the rows at once.

    There is one loss for each run of a stack, and one without; `batches` are the groups of each.
    The smaller number stays for the rest of the run. Without dropout, whose masks are drawn per
    forward pass, the result is the same up to the order of sums.
    """
    stack = optimizer if isinstance(optimizer, Stack) else None
    rows = progress.micro_batch_size or recipe.training.micro_batch_size
    while True:
        torch.manual_seed(recipe.team.own_seed(recipe.seed * 1_000_003 + progress.step))
        optimizer.zero_grad()
        try:
            with stack.active() if stack else nullcontext():
                return _gradients(model, recipe, batches, rows, stack)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if recipe.team.size > 1:
                # The others wait in the middle of a pass, and cannot be told to begin again.
                raise InputError(
                    f"memory runs out with {rows} examples in a forward pass of one of "
                    f"{recipe.team.size} processes: make training.micro_batch_size smaller, set "
                    "training.activation_checkpointing, or ask for more processes"
                ) from None
            if rows == 1:
                several = f" of each of {stack.size} runs" if stack else ""
                remedy = "set training.fused to never, " if stack else ""
                raise InputError(
                    f"memory runs out with a single example{several} in a forward pass: {remedy}"
                    "use a machine with more, or make training.max_length smaller"
                ) from None
        # Outside the handler, where the error no longer keeps the tensors of its frames alive.
        rows = progress.micro_batch_size = rows // 2
        release_memory(model.device)


def _gradients(
    model: Model,
    recipe: Recipe,
    batches: Sequence[Sequence[Group]],
    most_rows: int,
    stack: Stack | None,
) -> list[StepLoss]:
    """Accumulate the gradients of a step in passes of at most so many rows; returns the losses.

    With a stack, each of its runs passes that many rows. Of several processes, each passes its
    share of the rows; all return the same.
    """
    device, team, runs = model.device, recipe.team, len(batches)
    # Dropout is drawn per pass: with it, a run is split as it would be alone.
    split = FORWARD_OVERHEAD[device.type] // (1 if stack and stack.has_dropout else runs)
    targets = torch.tensor(
        [sum(example.targets for rows, _ in groups for example in rows) for groups in batches],
        device=device,
    )
    penalized = sum(example.targets for rows, penalty in batches[0] if penalty for example in rows)
    total, extra = torch.zeros(2, runs, dtype=torch.float64, device=device)
    # Long texts are no reason to pad short answers, so the groups never share a forward pass.
    for of_runs in zip(*batches, strict=True):
        own, on_tokens = of_runs[0]
        # Of runs that share a pass, each has as many tokens of it.
        alike = all(rows == own for rows, _ in of_runs)
        padded = not (alike and needs_no_padding(model, own))
        overhead = split if padded else UNSPLIT
        for passed in _passes([rows for rows, _ in of_runs], team, most_rows, overhead):
            laid = lay_out(passed, recipe.pad, padded, device)
            with attending(model, laid, recipe.precision) as part:
                with autocast(device, recipe.precision):
                    logits = target_logits(model, part)
                    losses = -logprobs_of(logits, part).view(runs, -1).sum(1) / targets
                    total += losses.detach().double()
                    if on_tokens:
                        penalty = on_tokens(model, part, logits) / penalized
                        extra += penalty.detach().double()
                        losses = losses + penalty
                losses.sum().backward()  # type: ignore[no-untyped-call]
    add_gradients(model.parameters(), team)
    total, extra = team.total(total), team.total(extra)
    for on_weights in recipe.safeguards.on_weights:
        loss = on_weights(model)
        loss.backward()  # type: ignore[no-untyped-call]
        extra += whole(loss.detach()).double()
    return [StepLoss(*pair) for pair in zip(total.tolist(), extra.tolist(), strict=True)]


def _passes(
    rows: Sequence[list[Example]], team: Team, most: int, overhead: int
) -> list[list[Example]]:
    """The examples of each forward pass: of one run, or as many of each, run after run.

    Each run passes its longest examples first, so that those of a pass are of about one length.
    """
    if len(rows) == 1:
        return team.passes(rows[0], most, overhead)
    ordered = [sorted(own, key=lambda example: -len(example.ids)) for own in rows]
    longest = [max(len(example.ids) for example in beside) for beside in zip(*ordered, strict=True)]
    parts = micro_batches(longest, most, overhead)
    return [[own[index] for own in ordered for index in part] for part in parts]
