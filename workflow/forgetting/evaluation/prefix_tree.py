"""Log-probabilities of several answers to one question, with shared prefixes read once.

The question and its answers form a tree of tokens in one row. Each token attends to its ancestors
only, and its position is its depth. So every log-probability equals that of separate reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature

import numpy as np
import torch
from torch import Tensor, nn

from forgetting.data.tokenize import Example
from forgetting.models.forward import length_batches
from forgetting.models.loading import Model, text_config, unwrap_peft


@dataclass(frozen=True)
class PrefixTreeBatch:
    """A batch of prefix trees, one per row.

    Attributes:
        ids, positions: (rows, length).
        mask: which index (third) attends to which (fourth): (rows, 1, length, length).
        columns: indices at which a token is predicted in some row, (width,).
        rows, column_indices, targets: the row of each predicted token, its index into `columns`,
            and its id, (tokens,).
        owners: number of the example that each predicted token belongs to, (tokens,).
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    columns: Tensor
    rows: Tensor
    column_indices: Tensor
    targets: Tensor
    owners: Tensor


UNSUPPORTED_PREFIXES = (
    "bert",
    "camembert",
    "data2vec",
    "doge",
    "electra",
    "roberta",
    "xlm",
    "xmod",
)
"""Prefixes of model types that ignore given positions, build masks themselves, or may attend to
later tokens."""


def supports_custom_mask(model: Model) -> bool:
    """Return whether the given mask and positions alone decide what a token attends to.

    This holds for PyTorch's own attention in every layer. Sliding windows, convolutions, recurrent
    states and distance biases use the index in the row, where another answer may be. So do models
    that take no positions, such as Bart. Multimodal types are excluded because they are untested.
    """
    config = text_config(model)
    takes_positions = "position_ids" in signature(type(unwrap_peft(model)).forward).parameters
    return (
        config is unwrap_peft(model).config
        and getattr(config, "_attn_implementation", "") == "sdpa"
        and takes_positions
        and not config.model_type.startswith(UNSUPPORTED_PREFIXES)
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and not getattr(config, "alibi", False)
        and not getattr(model, "_is_stateful", False)
    )


def answer_logprobs(
    model: nn.Module, questions: Sequence[Sequence[Example]], pad: int, batch_size: int
) -> list[list[float]]:
    """Return the mean log-probability per target token of every answer to every question, in nats.

    Args:
        model: the model.
        questions: the examples of each question, which all begin with the same prompt.
        pad: id of the padding token.
        batch_size: approximate number of answers per forward pass.
    """
    trees = [build_prefix_tree(examples) for examples in questions]
    max_answers = max(map(len, questions), default=1)
    rows = max(1, batch_size // max_answers)
    means: list[list[float]] = [[] for _ in questions]
    for indices in length_batches([len(tree.ids) for tree in trees], rows):
        group = [trees[index] for index in indices]
        batch, logits = forward_trees(model, group, pad)
        logprobs = -nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        count = sum(len(tree.paths) for tree in group)
        totals = torch.zeros(count, dtype=torch.float64, device=logprobs.device)
        totals.index_add_(0, batch.owners, logprobs.double())
        values = iter(totals.tolist())
        for index, tree in zip(indices, group, strict=True):
            means[index] = [next(values) / len(targets) for targets in tree.targets]
    return means


def forward_trees(
    model: nn.Module, trees: Sequence[PrefixTree], pad: int
) -> tuple[PrefixTreeBatch, Tensor]:
    """Return the batch of the trees and the logits that predict its targets, (tokens, vocabulary).

    The logits have at least the precision of float32.
    """
    batch = collate_trees(trees, pad, next(model.parameters()).device)
    logits: Tensor = model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        logits_to_keep=batch.columns,
        use_cache=False,
    ).logits
    predictions = logits[batch.rows, batch.column_indices]
    return batch, predictions.to(torch.promote_types(predictions.dtype, torch.float32))


@dataclass(frozen=True)
class PrefixTree:
    """The tokens of a question and of its answers.

    Attributes:
        ids: token ids of the question, followed by those of the answers with shared prefixes once.
        parents: index of the token before each token; -1 for the first.
        paths: indices at which the tokens of each answer are predicted.
        targets: the tokens of each answer.
    """

    ids: list[int]
    parents: list[int]
    paths: list[list[int]]
    targets: list[list[int]]


def build_prefix_tree(examples: Sequence[Example]) -> PrefixTree:
    """Return the tree of examples that all begin with the same prompt."""
    prompt = examples[0].prompt_length
    ids, parents = list(examples[0].ids[:prompt]), list(range(-1, prompt - 1))
    children: dict[tuple[int, int], int] = {}
    paths = []
    for example in examples:
        # The prompt's last token predicts the first target; the last target is not fed in.
        path = [prompt - 1]
        for token in example.ids[prompt:-1]:
            node = children.setdefault((path[-1], token), len(ids))
            if node == len(ids):
                ids.append(token)
                parents.append(path[-1])
            path.append(node)
        paths.append(path)
    return PrefixTree(ids, parents, paths, [example.ids[prompt:] for example in examples])


def collate_trees(
    trees: Sequence[PrefixTree], pad: int, device: torch.device | str = "cpu"
) -> PrefixTreeBatch:
    """Return a batch of the trees, padded on the right."""
    length = max(len(tree.ids) for tree in trees)
    ids = np.full((len(trees), length), pad)
    # Padding attends to itself, so that its softmax is finite.
    mask = np.repeat(np.eye(length, dtype=bool)[None], len(trees), axis=0)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for row, tree in enumerate(trees):
        ids[row, : len(tree.ids)] = tree.ids
        for node, parent in enumerate(tree.parents[1:], start=1):
            mask[row, node] |= mask[row, parent]
        for path, tokens in zip(tree.paths, tree.targets, strict=True):
            columns += path
            targets += tokens
            rows += [row] * len(path)
            owners += [owners[-1] + 1 if owners else 0] * len(path)
    unique_columns, column_indices = torch.unique(torch.tensor(columns), return_inverse=True)
    return PrefixTreeBatch(
        ids=torch.from_numpy(ids).to(device),
        positions=torch.from_numpy(mask.sum(axis=2) - 1).to(device),
        mask=torch.from_numpy(mask[:, None]).to(device),
        columns=unique_columns.to(device),
        rows=torch.tensor(rows).to(device),
        column_indices=column_indices.to(device),
        targets=torch.tensor(targets).to(device),
        owners=torch.tensor(owners).to(device),
    )
