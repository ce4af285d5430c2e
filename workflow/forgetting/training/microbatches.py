"""Micro-batches: how the batch of a step is split into forward and backward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from forgetting.data.tokenize import Example
from forgetting.evaluation.prefix_tree import supports_custom_mask
from forgetting.models.attention import (
    SUPPORTED_MODEL_TYPES,
    eager_if_faster,
    has_dropout,
    padding_free_attention,
)
from forgetting.models.forward import Batch, collate, concatenate_examples
from forgetting.models.loading import Model
from forgetting.study.run_groups import rows_per_pass
from forgetting.training.distributed import ProcessGroup

FORWARD_OVERHEAD_TOKENS = {"cpu": 256, "cuda": 8192}
"""Fixed cost of a forward and backward pass, in tokens. On a CPU, splitting the batch of a small
model saves time; a GPU spends more on kernel launches than on padding."""

MAX_PADDING_FREE_TOKENS = {torch.bfloat16: 512, torch.float32: 128}
"""Longest document for which the padding-free attention by matrix products is faster. In float32
PyTorch's kernel is faster sooner: the ratio is 0.96 at 120 tokens and 0.85 at 250."""

NO_SPLIT = 2**30
"""Overhead of padding-free batches, which are split only where memory requires it."""


@dataclass(frozen=True)
class MicroBatch:
    """The examples of a forward and backward pass.

    Attributes:
        examples: examples that each run reads.
        runs: number of runs that share the pass.
        padded: whether each example is a padded row. Otherwise one row holds all, without padding.
    """

    examples: list[Example]
    runs: int
    padded: bool

    def to_batch(self, pad: int, device: torch.device) -> Batch:
        """Return the batch: the examples once for each run."""
        rows = self.examples * self.runs
        return collate(rows, pad, device) if self.padded else concatenate_examples(rows)

    def loss_sums(self, logprobs: Tensor) -> Tensor:
        """Return the sum over target tokens for each run, given the log-probabilities of a pass."""
        return logprobs.view(self.runs, -1).sum(1)


def split_batch(
    model: Model,
    groups: Sequence[list[Example]],
    runs: int,
    process_group: ProcessGroup,
    limit: int,
    precision: torch.dtype,
) -> list[list[MicroBatch]]:
    """Return the micro-batches of this process for each loss group of a step.

    Groups never share a pass: short answers would be padded to the length of long texts.

    Args:
        groups: examples of each loss group.
        runs: number of runs that share each pass.
        limit: examples in a pass, which each run reads.
    """
    kind = model.device.type
    # Dropout masks are drawn per pass: with dropout, a run is split as it would be without others.
    shared = runs > 1 and not has_dropout(model)
    split = []
    for examples in groups:
        padded, size = not use_padding_free(model, examples, precision), limit
        if shared and examples:
            longest = max(len(example.ids) for example in examples)
            size = rows_per_pass(limit, runs, longest, kind)
        overhead = FORWARD_OVERHEAD_TOKENS[kind] // (runs if shared else 1) if padded else NO_SPLIT
        parts = process_group.microbatches(examples, size, overhead)
        split.append([MicroBatch(part, runs, padded) for part in parts])
    return split


def use_padding_free(model: Model, examples: Sequence[Example], precision: torch.dtype) -> bool:
    """Return whether to concatenate the examples without padding.

    On a CPU this is faster unless a document is very long: with TOFU's pairs and batches of 32, one
    fifth of the tokens and one third of the targets would be padding. GPUs were not measured.
    """
    return (
        model.device.type == "cpu"
        and model.config.model_type in SUPPORTED_MODEL_TYPES
        and supports_custom_mask(model)
        and not has_dropout(model)
        and all(
            size <= MAX_PADDING_FREE_TOKENS[precision]
            for example in examples
            for size in example.document_lengths
        )
    )


@contextmanager
def attention_for(model: Model, batch: Batch, precision: torch.dtype) -> Iterator[Batch]:
    """Make `model` attend as `batch` requires; yield the batch to pass to it.

    The backward pass has to run within the context as well.
    """
    if batch.layout:
        with padding_free_attention(model, batch.layout):
            yield batch
    else:
        with eager_if_faster(model, batch.mask, precision) as mask:
            yield replace(batch, mask=mask)
