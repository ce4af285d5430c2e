"""The gradients of a step: the mean loss over all its target tokens, however they are split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch

from forgetting.memory import is_out_of_memory, release_memory
from forgetting.models.attention import quick_attention
from forgetting.models.loading import Model, autocast
from forgetting.records import InputError
from forgetting.scoring.forward import collate, logprobs_of, target_logits
from forgetting.training.checkpoints import Progress
from forgetting.training.fused import Stack, repeated
from forgetting.training.parallel import add_gradients, whole
from forgetting.training.recipe import Group, Recipe

FORWARD_OVERHEAD = {"cpu": 256, "cuda": 8192}
"""What a forward and backward pass costs beside its tokens, in tokens: on a CPU, splitting a batch
in two pays for a small model; a GPU waits for launches rather than for padding."""


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
    groups: Sequence[Group],
    progress: Progress,
    optimizer: torch.optim.Optimizer | Stack,
) -> list[StepLoss]:
    """Gradients and losses of a step; where memory runs out, again with half the rows at once.

    There is one loss for each run of a stack, and one without. The smaller number stays for the
    rest of the run. Without dropout, whose masks are drawn per forward pass, the result is the same
    up to the order of sums.
    """
    stack = optimizer if isinstance(optimizer, Stack) else None
    rows = progress.micro_batch_size or recipe.training.micro_batch_size
    while True:
        torch.manual_seed(recipe.team.own_seed(recipe.seed * 1_000_003 + progress.step))
        optimizer.zero_grad()
        try:
            with stack.active() if stack else nullcontext():
                return _gradients(model, recipe, groups, rows, stack)
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
    model: Model, recipe: Recipe, groups: Sequence[Group], most_rows: int, stack: Stack | None
) -> list[StepLoss]:
    """Accumulate the gradients of a step in passes of at most so many rows; returns the losses.

    With a stack, each of its runs passes that many rows. Of several processes, each passes its
    share of the rows; all return the same.
    """
    device, team, runs = model.device, recipe.team, stack.size if stack else 1
    # Dropout is drawn per pass: with it, a run is split as it would be alone.
    overhead = FORWARD_OVERHEAD[device.type] // (1 if stack and stack.has_dropout else runs)
    targets = sum(example.targets for rows, _ in groups for example in rows)
    penalized = sum(example.targets for rows, penalty in groups if penalty for example in rows)
    total, extra = torch.zeros(2, runs, dtype=torch.float64, device=device)
    # Long texts are no reason to pad short answers, so the groups never share a forward pass.
    for rows, on_tokens in groups:
        for passed in team.passes(rows, most_rows, overhead):
            part = repeated(collate(passed, recipe.pad, device), runs)
            with quick_attention(model, part.mask, recipe.precision) as mask:
                part = replace(part, mask=mask)
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
