"""Loss and gradients of a training step, which do not depend on how its batch is split."""

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
    """Loss of a step in nats: the mean over its target tokens, and the sum of all penalties."""

    tokens: float
    penalty: float

    @property
    def is_finite(self) -> bool:
        """Return whether both numbers are finite."""
        return math.isfinite(self.tokens) and math.isfinite(self.penalty)


def compute_gradients(
    model: Model,
    config: RunConfig,
    groups: Sequence[LossGroup],
    state: TrainState,
    optimizer: torch.optim.Optimizer | BatchedAdapters,
) -> list[StepLoss]:
    """Accumulate the gradients of a step and return the loss of each run.

    Out of memory, the step is repeated with half the examples in a forward pass. The run keeps the
    smaller number. Without dropout, whose masks are drawn per forward pass, the result does not
    depend on the number, up to the order of summation.

    Args:
        groups: loss groups of the step, which are those of every run.
        state: of the first run; `halve_micro_batch` changes it.
        optimizer: holds the gradients: that of a single run, or the batched adapters of several.

    Raises:
        OutOfMemory: out of memory in one of several processes. The others are blocked in a
            collective call, so all processes must be restarted.
        InputError: out of memory with a single example.
    """
    batched = optimizer if isinstance(optimizer, BatchedAdapters) else None
    runs = batched.size if batched else 1
    examples = [members for members, _ in groups]
    allowed, process_group = config.training.micro_batch_size, config.process_group
    while True:
        limit = min(state.micro_batch_size or allowed, allowed)
        micro_batches = split_batch(model, examples, runs, process_group, limit, config.precision)
        torch.manual_seed(process_group.rank_seed(config.seed * 1_000_003 + state.step))
        optimizer.zero_grad()
        try:
            with batched.active() if batched else nullcontext():
                return _accumulate_gradients(model, config, groups, micro_batches, runs)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler, where the error no longer keeps the tensors of its frames alive.
        largest = max(len(micro.examples) for group in micro_batches for micro in group)
        if largest == 1:
            raise InputError(_oom_advice(config, batched))
        if process_group.world_size > 1:
            raise OutOfMemory(largest)
        state.halve_micro_batch(largest)
        release_memory(model.device)


def _oom_advice(config: RunConfig, batched: BatchedAdapters | None) -> str:
    """Return the message for a step that does not fit into memory even with a single example."""
    several = f" of each of {batched.size} runs" if batched else ""
    processes = config.process_group.world_size
    where = f" of one of {processes} processes" if processes > 1 else ""
    remedies = ["set training.batched_lora to never"] if batched else []
    if not config.training.activation_checkpointing:
        remedies += ["set training.activation_checkpointing"]
    if where:
        remedies += ["set a larger number of processes"]
    remedies += ["use a machine with more"]
    return (
        f"memory runs out with a single example{several} in a forward pass{where}: "
        f"{', '.join(remedies)}, or make training.max_length smaller"
    )


def _accumulate_gradients(
    model: Model,
    config: RunConfig,
    groups: Sequence[LossGroup],
    micro_batches: Sequence[Sequence[MicroBatch]],
    runs: int,
) -> list[StepLoss]:
    """Run all forward and backward passes of a step, then those of the weight penalties.

    With several processes, each passes its share of the examples; all return the same losses.

    Args:
        groups: loss groups of the step.
        micro_batches: micro-batches of each loss group.
        runs: number of runs that share each pass.
    """
    device, process_group = model.device, config.process_group
    # A tensor, because a GPU divides by a Python number with another rounding.
    targets = torch.tensor(sum(e.targets for members, _ in groups for e in members), device=device)
    penalized = sum(e.targets for members, penalty in groups if penalty for e in members)
    total, extra = torch.zeros(2, runs, dtype=torch.float64, device=device)
    for (_, token_penalty), group in zip(groups, micro_batches, strict=True):
        for micro in group:
            padded = micro.to_batch(config.pad, device)
            with attention_for(model, padded, config.precision) as batch:
                with autocast(device, config.precision):
                    logits = target_logits(model, batch)
                    losses = -micro.loss_sums(logprobs_of(logits, batch)) / targets
                    total += losses.detach().double()
                    if token_penalty:
                        penalty = token_penalty(model, batch, logits) / penalized
                        extra += penalty.detach().double()
                        losses = losses + penalty
                losses.sum().backward()  # type: ignore[no-untyped-call]
    all_reduce_gradients(model.parameters(), process_group)
    total, extra = process_group.all_reduce_sum(total), process_group.all_reduce_sum(extra)
    for weight_penalty in config.mitigations.weight_penalties:
        loss = weight_penalty(model)
        loss.backward()  # type: ignore[no-untyped-call]
        extra += full_tensor(loss.detach()).double()
    return [StepLoss(*pair) for pair in zip(total.tolist(), extra.tolist(), strict=True)]
