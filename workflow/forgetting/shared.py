"""Log-probabilities of several answers to one question, the question being read once.

The answers of a question stand behind it in one row. Each sees the question and itself, and counts
its positions from the question's end, so that every log-probability is what it would be alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from forgetting.encode import Example
from forgetting.forward import by_length


@dataclass(frozen=True)
class SharedBatch:
    """Rows of a question with its answers.

    Attributes:
        ids, positions: (rows, length).
        mask: which position (third) sees which (fourth): (rows, 1, length, length).
        columns: positions at which something is predicted in some row: (width,).
        rows, places, targets: of each predicted token its row, its place among the columns and its
            id: (tokens,).
        owners: number of the example that each predicted token belongs to: (tokens,).
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    columns: Tensor
    rows: Tensor
    places: Tensor
    targets: Tensor
    owners: Tensor


def can_share(model: nn.Module) -> bool:
    """Does the mask alone decide what a token sees?

    So it is with PyTorch's own attention in every layer. Sliding windows, convolutions, recurrent
    states and biases by distance go by the places in the row, where another answer may stand.
    """
    config = model.config
    return (
        getattr(config, "_attn_implementation", "") == "sdpa"
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and not getattr(config, "alibi", False)
        and not getattr(model, "_is_stateful", False)
    )


def answer_logprobs(
    model: nn.Module, questions: Sequence[Sequence[Example]], pad: int, batch_size: int
) -> list[list[float]]:
    """Mean log-probability per target token of every answer to every question, in nats.

    Args:
        questions: per question its examples, which all begin with the same prompt.
        batch_size: answers per forward pass, about.
    """
    lengths = [_row_length(examples) for examples in questions]
    most = max(map(len, questions), default=1)
    means: list[list[float]] = [[] for _ in questions]
    for indices in by_length(lengths, max(1, batch_size // most)):
        group = [questions[index] for index in indices]
        batch = collate_shared(group, pad, next(model.parameters()).device)
        logits = model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            logits_to_keep=batch.columns,
            use_cache=False,
        ).logits
        scored = logits[batch.rows, batch.places].float()
        logprobs = -nn.functional.cross_entropy(scored, batch.targets, reduction="none")
        count = sum(map(len, group))
        totals = torch.zeros(count, dtype=torch.float64, device=logprobs.device)
        totals.index_add_(0, batch.owners, logprobs.double())
        values = iter(totals.tolist())
        for index, examples in zip(indices, group, strict=True):
            means[index] = [next(values) / example.targets for example in examples]
    return means


def _row_length(examples: Sequence[Example]) -> int:
    """The prompt once, then what each answer feeds in: all its tokens but the last."""
    return examples[0].prompt + sum(example.targets - 1 for example in examples)


def collate_shared(
    questions: Sequence[Sequence[Example]], pad: int, device: torch.device | str = "cpu"
) -> SharedBatch:
    """Lay out the questions of a batch, padded on the right."""
    length = max(_row_length(examples) for examples in questions)
    shape = (len(questions), length)
    ids, positions = torch.full(shape, pad), torch.zeros(shape, dtype=torch.long)
    # 0: the question; 1, 2, ...: its answers; -1: padding.
    parts = torch.full(shape, -1)
    rows, columns, targets, owners = [], [], [], []
    owner = 0
    for row, examples in enumerate(questions):
        prompt = examples[0].prompt
        ids[row, :prompt] = torch.tensor(examples[0].ids[:prompt])
        positions[row, :prompt] = torch.arange(prompt)
        parts[row, :prompt] = 0
        start = prompt
        for number, example in enumerate(examples, start=1):
            fed = example.ids[prompt:-1]
            end = start + len(fed)
            ids[row, start:end] = torch.tensor(fed, dtype=torch.long)
            positions[row, start:end] = torch.arange(prompt, prompt + len(fed))
            parts[row, start:end] = number
            # The answer's first token is predicted at the question's end.
            columns += [prompt - 1, *range(start, end)]
            targets += example.ids[prompt:]
            rows += [row] * example.targets
            owners += [owner] * example.targets
            start, owner = end, owner + 1
    kept, places = torch.unique(torch.tensor(columns), return_inverse=True)
    return SharedBatch(
        ids=ids.to(device),
        positions=positions.to(device),
        mask=_mask(parts).to(device),
        columns=kept.to(device),
        rows=torch.tensor(rows).to(device),
        places=places.to(device),
        targets=torch.tensor(targets).to(device),
        owners=torch.tensor(owners).to(device),
    )


def _mask(parts: Tensor) -> Tensor:
    """Backwards within the own part, and to the question; padding sees itself, to stay finite."""
    length = parts.shape[1]
    query, key = parts[:, :, None], parts[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return (((query == key) | (key == 0)) & causal)[:, None]
