"""Micro-batches: how the batch of a step is split into forward and backward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain

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
from forgetting.models.forward import Batch, collate, concatenate_examples, micro_batches
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
        examples: by run; equally many of each run that shares the pass.
        padded: whether each example is a padded row. Otherwise one row holds all, without padding.
    """

    examples: list[list[Example]]
    padded: bool

    @property
    def examples_per_run(self) -> int:
        """Return the number of examples of each run."""
        return len(self.examples[0])

    def to_batch(self, pad: int, device: torch.device) -> Batch:
        """Return the batch, run after run; padding-free, all runs have equally many tokens."""
        if self.padded:
            return collate(list(chain(*self.examples)), pad, device)
        return concatenate_examples(list(chain(*pad_runs_to_equal_tokens(self.examples, pad))))

    def loss_sums(self, logprobs: Tensor) -> Tensor:
        """Return the sum over target tokens for each run, given the log-probabilities of a pass."""
        if self.padded or len(self.examples) == 1:
            return logprobs.view(len(self.examples), -1).sum(1)
        counts = [sum(example.targets for example in run) for run in self.examples]
        return torch.stack([part.sum() for part in torch.split(logprobs.flatten(), counts)])


def pad_runs_to_equal_tokens(runs: Sequence[list[Example]], pad: int) -> list[list[Example]]:
    """Return the examples of several runs, filled up by documents without targets.

    Batched adapters need equally many tokens of each run.
    """
    tokens = [sum(len(example.ids) for example in run) for run in runs]
    longest = max(len(example.ids) for example in chain(*runs))

    def fill(missing: int) -> list[Example]:
        sizes = [longest] * (missing // longest) + [missing % longest] * (missing % longest > 0)
        return [Example([pad] * size, size) for size in sizes]

    target = max(tokens)
    return [run + fill(target - count) for run, count in zip(runs, tokens, strict=True)]


def split_batch(
    model: Model,
    batches: Sequence[Sequence[list[Example]]],
    process_group: ProcessGroup,
    limit: int,
    precision: torch.dtype,
) -> list[list[MicroBatch]]:
    """Return the micro-batches of this process for each loss group of a step.

    Groups never share a pass: short answers would be padded to the length of long texts.

    Args:
        batches: for every run, the examples of each loss group.
        limit: examples of each run in a pass.
    """
    kind, runs = model.device.type, len(batches)
    # Dropout masks are drawn per pass: with dropout, a run is split as it would be without others.
    shared = runs > 1 and not has_dropout(model)
    split = []
    for by_run in zip(*batches, strict=True):
        examples = list(chain(*by_run))
        padded, size = not use_padding_free(model, examples, precision), limit
        if shared and examples:
            longest = max(len(example.ids) for example in examples)
            size = rows_per_pass(limit, runs, longest, kind)
        overhead = FORWARD_OVERHEAD_TOKENS[kind] // (runs if shared else 1) if padded else NO_SPLIT
        parts = _split_by_length(by_run, process_group, size, overhead)
        split.append([MicroBatch(part, padded) for part in parts])
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


def _split_by_length(
    by_run: Sequence[list[Example]], process_group: ProcessGroup, limit: int, overhead: int
) -> list[list[list[Example]]]:
    """Return the examples of each pass, by run.

    Every run passes its longest examples first, so that a pass has examples of similar length.
    """
    if len(by_run) == 1:
        return [[part] for part in process_group.microbatches(by_run[0], limit, overhead)]
    ordered = [sorted(run, key=lambda example: -len(example.ids)) for run in by_run]
    longest = [max(len(example.ids) for example in ranked) for ranked in zip(*ordered, strict=True)]
    parts = micro_batches(longest, limit, overhead)
    return [[[run[index] for index in part] for run in ordered] for part in parts]


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
