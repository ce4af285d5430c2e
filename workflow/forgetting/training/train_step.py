"""The gradients of a step: the mean loss over all its target tokens, however they are split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch

from forgetting.errors import InputError, is_out_of_memory
from forgetting.models.forward import logprobs_of, target_logits
from forgetting.models.loading import Model, autocast
from forgetting.system import release_memory
from forgetting.training.batched_lora import BatchedAdapters
from forgetting.training.checkpoints import TrainState
from forgetting.training.distributed import OutOfMemory, all_reduce_gradients, full_tensor
from forgetting.training.microbatches import MicroBatch, attention_for, split_batch
from forgetting.training.run_config import LossGroup, RunConfig


class StepLoss(NamedTuple):
    """What a step has minimized, in nats: the mean over its target tokens, and all penalties."""

    tokens: float
    penalty: float

    @property
    def is_finite(self) -> bool:
        """Are both numbers?"""
        return math.isfinite(self.tokens) and math.isfinite(self.penalty)


def compute_gradients(
    model: Model,
    recipe: RunConfig,
    batches: Sequence[Sequence[LossGroup]],
    progress: TrainState,
    optimizer: torch.optim.Optimizer | BatchedAdapters,
) -> list[StepLoss]:
    """Gradients and losses of a step; where memory runs out, again with half the rows at once.

    There is one loss for each run of a stack, and one without; `batches` are the groups of each.
    The smaller number stays for the rest of the run. Without dropout, whose masks are drawn per
    forward pass, the result is the same up to the order of sums.

    Raises:
        NoRoom: memory has run out in this one of several processes. The others wait in the middle
            of a pass, and cannot be told to begin again: all have to be started anew.
        InputError: it does so with a single row.
    """
    stack = optimizer if isinstance(optimizer, BatchedAdapters) else None
    allowed, process_group = recipe.training.micro_batch_size, recipe.process_group
    while True:
        most = min(progress.micro_batch_size or allowed, allowed)
        rows = [[rows for rows, _ in groups] for groups in batches]
        passes = split_batch(model, rows, process_group, most, recipe.precision)
        torch.manual_seed(process_group.rank_seed(recipe.seed * 1_000_003 + progress.step))
        optimizer.zero_grad()
        try:
            with stack.active() if stack else nullcontext():
                return _accumulate_gradients(model, recipe, batches, passes)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler, where the error no longer keeps the tensors of its frames alive.
        largest = max(one.collate for of_group in passes for one in of_group)
        if largest == 1:
            raise InputError(_oom_advice(recipe, stack))
        if process_group.world_size > 1:
            raise OutOfMemory(largest)
        progress.halve_micro_batch(largest)
        release_memory(model.device)


def _oom_advice(recipe: RunConfig, stack: BatchedAdapters | None) -> str:
    """What is told where memory runs out with the least that a pass can hold."""
    several = f" of each of {stack.size} runs" if stack else ""
    where = (
        f" of one of {recipe.process_group.world_size} processes"
        if recipe.process_group.world_size > 1
        else ""
    )
    remedies = ["set training.batched_lora to never"] if stack else []
    if not recipe.training.activation_checkpointing:
        remedies += ["set training.activation_checkpointing"]
    if where:
        remedies += ["ask for more processes"]
    remedies += ["use a machine with more"]
    return (
        f"memory runs out with a single example{several} in a forward pass{where}: "
        f"{', '.join(remedies)}, or make training.max_length smaller"
    )


def _accumulate_gradients(
    model: Model,
    recipe: RunConfig,
    batches: Sequence[Sequence[LossGroup]],
    passes: Sequence[Sequence[MicroBatch]],
) -> list[StepLoss]:
    """Accumulate the gradients of a step, of every group in its passes; returns the losses.

    Of several processes, each passes its share of the rows; all return the same.
    """
    device, process_group = model.device, recipe.process_group
    targets = torch.tensor(
        [sum(example.targets for rows, _ in groups for example in rows) for groups in batches],
        device=device,
    )
    penalized = sum(example.targets for rows, penalty in batches[0] if penalty for example in rows)
    total, extra = torch.zeros(2, len(batches), dtype=torch.float64, device=device)
    for (_, on_tokens), of_group in zip(batches[0], passes, strict=True):
        for one in of_group:
            with attention_for(
                model, one.is_padding_free(recipe.pad, device), recipe.precision
            ) as part:
                with autocast(device, recipe.precision):
                    logits = target_logits(model, part)
                    losses = -one.loss_sums(logprobs_of(logits, part)) / targets
                    total += losses.detach().double()
                    if on_tokens:
                        penalty = on_tokens(model, part, logits) / penalized
                        extra += penalty.detach().double()
                        losses = losses + penalty
                losses.sum().backward()  # type: ignore[no-untyped-call]
    all_reduce_gradients(model.parameters(), process_group)
    total, extra = process_group.all_reduce_sum(total), process_group.all_reduce_sum(extra)
    for on_weights in recipe.mitigations.weight_penalties:
        loss = on_weights(model)
        loss.backward()  # type: ignore[no-untyped-call]
        extra += full_tensor(loss.detach()).double()
    return [StepLoss(*pair) for pair in zip(total.tolist(), extra.tolist(), strict=True)]
