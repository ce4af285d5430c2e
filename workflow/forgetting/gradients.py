"""The gradients of a step: the mean loss over all its target tokens, however they are split."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from forgetting.checkpoints import Progress
from forgetting.forward import collate, logprobs_of, target_logits
from forgetting.memory import is_out_of_memory, release_memory
from forgetting.models import Model, autocast
from forgetting.parallel import add_gradients, whole
from forgetting.recipe import Group, Recipe
from forgetting.records import InputError

FORWARD_OVERHEAD = {"cpu": 256, "cuda": 8192}
"""What a forward and backward pass costs beside its tokens, in tokens: on a CPU, splitting a batch
in two pays for a small model; a GPU waits for launches rather than for padding."""


def gradients_that_fit(
    model: Model,
    recipe: Recipe,
    groups: Sequence[Group],
    progress: Progress,
    optimizer: torch.optim.Optimizer,
) -> float:
    """Gradients and loss of a step; where memory runs out, again with half the rows at once.

    The smaller number stays for the rest of the run. Without dropout, whose masks are drawn per
    forward pass, the result is the same up to the order of sums.
    """
    rows = progress.micro_batch_size or recipe.training.micro_batch_size
    while True:
        torch.manual_seed(recipe.team.own_seed(recipe.seed * 1_000_003 + progress.step))
        optimizer.zero_grad(set_to_none=True)
        try:
            return _gradients(model, recipe, groups, rows)
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
                raise InputError(
                    "memory runs out with a single example in a forward pass: use a machine with "
                    "more, or make training.max_length smaller"
                ) from None
        # Outside the handler, where the error no longer keeps the tensors of its frames alive.
        rows = progress.micro_batch_size = rows // 2
        release_memory(model.device)


def _gradients(model: Model, recipe: Recipe, groups: Sequence[Group], most_rows: int) -> float:
    """Accumulate the gradients of a step in passes of at most so many rows; returns the loss.

    Of several processes, each passes its share of the rows; all return the same.
    """
    device, team = model.device, recipe.team
    targets = sum(example.targets for rows, _ in groups for example in rows)
    penalized = sum(example.targets for rows, penalty in groups if penalty for example in rows)
    total = torch.zeros((), dtype=torch.float64, device=device)
    # Long texts are no reason to pad short answers, so the groups never share a forward pass.
    for rows, on_tokens in groups:
        for passed in team.passes(rows, most_rows, FORWARD_OVERHEAD[device.type]):
            part = collate(passed, recipe.pad, device)
            with autocast(device, recipe.precision):
                logits = target_logits(model, part)
                loss = -logprobs_of(logits, part).sum() / targets
                if on_tokens:
                    loss = loss + on_tokens(model, part, logits) / penalized
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach().double()
    add_gradients(model.parameters(), team)
    total = team.total(total)
    for on_weights in recipe.safeguards.on_weights:
        loss = on_weights(model)
        loss.backward()  # type: ignore[no-untyped-call]
        total += whole(loss.detach()).double()
    return float(total)
