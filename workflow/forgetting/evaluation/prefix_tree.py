"""Log-probabilities of several answers to one question, the question being read once.

The question and its answers stand in one row as a tree of tokens: what several answers begin with
is read once, too. Each token sees what leads to it from the root and counts its positions along
that way, so that every log-probability is what it would be alone.
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
"""Beginnings of the types that count places otherwise than they are told, mask by themselves, or
may look ahead."""


def supports_custom_mask(model: Model) -> bool:
    """Do the mask and the positions that a model is given alone decide what a token sees?

    So it is with PyTorch's own attention in every layer. Sliding windows, convolutions, recurrent
    states and biases by distance go by the places in the row, where another answer may stand, and
    so do models that take no positions (Bart's). Multimodal types are not proved to.
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
    """Mean log-probability per target token of every answer to every question, in nats.

    Args:
        questions: per question its examples, which all begin with the same prompt.
        batch_size: answers per forward pass, about.
    """
    trees = [build_prefix_tree(examples) for examples in questions]
    most = max(map(len, questions), default=1)
    means: list[list[float]] = [[] for _ in questions]
    for indices in length_batches([len(tree.ids) for tree in trees], max(1, batch_size // most)):
        group = [trees[index] for index in indices]
        batch, scored = forward_trees(model, group, pad)
        logprobs = -nn.functional.cross_entropy(scored, batch.targets, reduction="none")
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
    """Questions as a batch, and the logits before each of its targets, in float32 at least."""
    batch = collate_trees(trees, pad, next(model.parameters()).device)
    logits: Tensor = model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        logits_to_keep=batch.columns,
        use_cache=False,
    ).logits
    before = logits[batch.rows, batch.places]
    return batch, before.to(torch.promote_types(before.dtype, torch.float32))


@dataclass(frozen=True)
class PrefixTree:
    """The tokens of a question and of its answers.

    Attributes:
        ids: token ids; the question first, then what the answers feed in, each beginning once.
        parents: the place of the token before each; of the first, -1.
        paths: per answer the places at which its tokens are predicted.
        targets: per answer those tokens.
    """

    ids: list[int]
    parents: list[int]
    paths: list[list[int]]
    targets: list[list[int]]


def build_prefix_tree(examples: Sequence[Example]) -> PrefixTree:
    """The tree of examples that all begin with the same question."""
    prompt = examples[0].prompt_length
    ids, parents = list(examples[0].ids[:prompt]), list(range(-1, prompt - 1))
    places: dict[tuple[int, int], int] = {}
    paths = []
    for example in examples:
        # The first token is predicted at the question's end, and the last one is not fed in.
        path = [prompt - 1]
        for token in example.ids[prompt:-1]:
            place = places.setdefault((path[-1], token), len(ids))
            if place == len(ids):
                ids.append(token)
                parents.append(path[-1])
            path.append(place)
        paths.append(path)
    return PrefixTree(ids, parents, paths, [example.ids[prompt:] for example in examples])


def collate_trees(
    trees: Sequence[PrefixTree], pad: int, device: torch.device | str = "cpu"
) -> PrefixTreeBatch:
    """Lay out the questions of a batch, padded on the right."""
    length = max(len(tree.ids) for tree in trees)
    ids = np.full((len(trees), length), pad)
    # What is padding sees itself alone, to stay finite.
    sees = np.repeat(np.eye(length, dtype=bool)[None], len(trees), axis=0)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for row, tree in enumerate(trees):
        ids[row, : len(tree.ids)] = tree.ids
        for place, parent in enumerate(tree.parents[1:], start=1):
            sees[row, place] |= sees[row, parent]
        for path, tokens in zip(tree.paths, tree.targets, strict=True):
            columns += path
            targets += tokens
            rows += [row] * len(path)
            owners += [owners[-1] + 1 if owners else 0] * len(path)
    kept, places = torch.unique(torch.tensor(columns), return_inverse=True)
    return PrefixTreeBatch(
        ids=torch.from_numpy(ids).to(device),
        positions=torch.from_numpy(sees.sum(axis=2) - 1).to(device),
        mask=torch.from_numpy(sees[:, None]).to(device),
        columns=kept.to(device),
        rows=torch.tensor(rows).to(device),
        places=places.to(device),
        targets=torch.tensor(targets).to(device),
        owners=torch.tensor(owners).to(device),
    )
