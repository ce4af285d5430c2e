"""The forward and backward passes of a step: which examples each reads, padded or side by side."""

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
"""What a forward and backward pass costs beside its tokens, in tokens: on a CPU, splitting a batch
in two pays for a small model; a GPU waits for launches rather than for padding."""

MAX_PADDING_FREE_TOKENS = {torch.bfloat16: 512, torch.float32: 128}
"""Tokens of the longest document that is quicker by products of matrices: in float32 PyTorch's
kernel takes its place sooner (of equal lengths, 0.96 times as fast at 120 tokens, 0.85 at 250)."""

NO_SPLIT = 2**30
"""Where nothing is padded, a batch is split for the sake of memory alone."""


@dataclass(frozen=True)
class MicroBatch:
    """What a forward and backward pass reads.

    Attributes:
        examples: of every run that shares it, as many of each.
        padded: is each a row of its own? Else all stand side by side in one.
    """

    examples: list[list[Example]]
    padded: bool

    @property
    def collate(self) -> int:
        """Examples of each run."""
        return len(self.examples[0])

    def is_padding_free(self, pad: int, device: torch.device) -> Batch:
        """The batch, run after run; side by side, the runs have equally many tokens each."""
        if self.padded:
            return collate(list(chain(*self.examples)), pad, device)
        return concatenate_examples(list(chain(*pad_runs_to_equal_tokens(self.examples, pad))))

    def loss_sums(self, logprobs: Tensor) -> Tensor:
        """Of each run the sum over its target tokens, of log-probabilities as they are laid out."""
        if self.padded or len(self.examples) == 1:
            return logprobs.view(len(self.examples), -1).sum(1)
        counts = [sum(example.targets for example in own) for own in self.examples]
        return torch.stack([part.sum() for part in torch.split(logprobs.flatten(), counts)])


def pad_runs_to_equal_tokens(runs: Sequence[list[Example]], pad: int) -> list[list[Example]]:
    """Examples of several runs, with documents without targets after those of the shorter ones.

    An adapter multiplies the rows of its run, which are as many in every run of a stack.
    """
    tokens = [sum(len(example.ids) for example in own) for own in runs]
    longest = max(len(example.ids) for example in chain(*runs))

    def fill(missing: int) -> list[Example]:
        sizes = [longest] * (missing // longest) + [missing % longest] * (missing % longest > 0)
        return [Example([pad] * size, size) for size in sizes]

    most = max(tokens)
    return [own + fill(most - count) for own, count in zip(runs, tokens, strict=True)]


def split_batch(
    model: Model,
    batches: Sequence[Sequence[list[Example]]],
    process_group: ProcessGroup,
    most: int,
    precision: torch.dtype,
) -> list[list[MicroBatch]]:
    """This process's passes over each group of a step.

    Long texts are no reason to pad short answers, so the groups never share a forward pass.

    Args:
        batches: of every run the examples of each group.
        most: examples of a pass, of each run.
    """
    kind, runs = model.device.type, len(batches)
    split = FORWARD_OVERHEAD_TOKENS[kind]
    # Dropout is drawn per pass: with it, a run is split as it would be alone.
    shares = runs > 1 and not has_dropout(model)
    found = []
    for rows in zip(*batches, strict=True):
        every = list(chain(*rows))
        padded, limit = not use_padding_free(model, every, precision), most
        if shares and every:
            longest = max(len(example.ids) for example in every)
            limit = rows_per_pass(most, runs, longest, kind)
        overhead = split // (runs if shares else 1) if padded else NO_SPLIT
        parts = _split_by_tokens(rows, process_group, limit, overhead)
        found.append([MicroBatch(part, padded) for part in parts])
    return found


def use_padding_free(model: Model, examples: Sequence[Example], precision: torch.dtype) -> bool:
    """May these examples stand side by side in the row of a pass, and is that quicker?

    It is on a CPU, where of TOFU's pairs, 32 to a step in passes of like length, a fifth of the
    tokens would be padding, and a third of the places at which something is predicted; unless a
    document is so long that its scores are better never held. A GPU was not measured.
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


def _split_by_tokens(
    rows: Sequence[list[Example]], process_group: ProcessGroup, most: int, overhead: int
) -> list[list[list[Example]]]:
    """The examples of each pass, by run: of one run, or as many of each.

    Each run passes its longest examples first, so that those of a pass are of about one length.
    """
    if len(rows) == 1:
        return [[part] for part in process_group.microbatches(rows[0], most, overhead)]
    ordered = [sorted(own, key=lambda example: -len(example.ids)) for own in rows]
    longest = [max(len(example.ids) for example in beside) for beside in zip(*ordered, strict=True)]
    parts = micro_batches(longest, most, overhead)
    return [[[own[index] for index in part] for own in ordered] for part in parts]


@contextmanager
def attention_for(model: Model, batch: Batch, precision: torch.dtype) -> Iterator[Batch]:
    """Within, `model` attends as the batch is laid out; yields the batch to give it.

    The backward pass has to be within as well.
    """
    if batch.layout:
        with padding_free_attention(model, batch.layout):
            yield batch
    else:
        with eager_if_faster(model, batch.mask, precision) as mask:
            yield replace(batch, mask=mask)
