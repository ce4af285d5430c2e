"""How far a model's predictions have moved from the base's, on a general text.

The forgetting of *Scaling Laws for Forgetting* (Kalajdzievski 2024, arXiv 2401.05605, section 3):
cross-entropy of the tuned model where the target of each position is what the base predicts there,
both reading the same text. It sees no transfer between tasks and no ignorance of the base's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from forgetting.config.evaluation import TEXT_PROBE
from forgetting.errors import InputError
from forgetting.io import atomic_write, check_file
from forgetting.models.loading import Model
from forgetting.models.tuned import save_tensors


@dataclass(frozen=True)
class BasePredictions:
    """A text in blocks, and all that the base predicts on it.

    The base's distributions are kept as what its LM head made them of: exact, and smaller than
    the distributions by the ratio of the model's width to its vocabulary.

    Attributes:
        blocks: token ids, (blocks, length).
        hidden: what goes into the base's LM head at each position, (blocks, length, width).
        weight, bias: the base's LM head, (vocabulary, width) and (vocabulary,) or None.
        batch_size: blocks per forward pass; the same for every model, so that equal models have
            equal logits bit for bit.
    """

    blocks: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    batch_size: int

    def logits(self, rows: slice, device: torch.device) -> Tensor:
        """The base's logits on some blocks, (rows, length, vocabulary)."""
        bias = None if self.bias is None else self.bias.to(device)
        return nn.functional.linear(self.hidden[rows].to(device), self.weight.to(device), bias)


def cut_blocks(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, most: int | None = None
) -> Tensor:
    """Token ids of the texts, joined as they are and cut into blocks: (blocks, length).

    What is left at the end is dropped, so that every block weighs the same, and no special token is
    added: WikiText-103's test split has 661 blocks of 512 under Llama-2's tokenizer. With `most`,
    so many blocks evenly spaced over the text.
    """
    ids = tokenizer("".join(texts), add_special_tokens=False)["input_ids"]
    count = len(ids) // length
    if count == 0:
        raise InputError(
            f"general_text: the text has {len(ids)} tokens, fewer than one block of {length}; "
            "give a longer text, or make general_text.block smaller"
        )
    blocks = torch.tensor(ids[: count * length]).view(count, length)
    if most is not None and most < count:
        blocks = blocks[[index * count // most for index in range(most)]]
    return blocks


@torch.inference_mode()
def compute_base_predictions(model: Model, blocks: Tensor, batch_size: int) -> BasePredictions:
    """Read the text with the base, and keep what its LM head is given.

    Raises:
        InputError: the architecture does more to its logits than the LM head does.
    """
    head = model.get_output_embeddings()
    kept: list[Tensor] = []
    for rows in _batches(len(blocks), batch_size):
        with _hidden_states(head) as entered:
            logits = _logits(model, blocks[rows])
        kept.append(entered[-1].cpu())
        if not torch.equal(head(entered[-1]), logits):
            raise InputError(
                "general_text: this architecture scales or caps the logits of its LM head, so that "
                "the base's predictions cannot be kept; leave general_text out"
            )
    return BasePredictions(
        blocks=blocks,
        hidden=torch.cat(kept),
        weight=head.weight.detach().cpu().clone(),
        bias=None if head.bias is None else head.bias.detach().cpu().clone(),
        batch_size=batch_size,
    )


def append_divergence(
    items: pd.DataFrame, model: Model, targets: BasePredictions | None
) -> pd.DataFrame:
    """The items of the probes, and of the text if the study has one."""
    if targets is None:
        return items
    return pd.concat([items, divergence_items(model, targets)], ignore_index=True)


@torch.inference_mode()
def divergence_items(model: Model, targets: BasePredictions) -> pd.DataFrame:
    """Score a model on the text: one row per block, with probe, item and the columns of
    `divergence_metrics`.

    The last position of a block is left out: the block has no next token there.
    """
    was_training = model.training
    model.eval()
    rows: list[dict[str, Any]] = []
    for batch in _batches(len(targets.blocks), targets.batch_size):
        logits = _logits(model, targets.blocks[batch])
        base = targets.logits(batch, logits.device)
        for block, mine, theirs in zip(targets.blocks[batch], logits, base, strict=True):
            next_tokens = block[1:].to(logits.device)
            scores = divergence_metrics(theirs[:-1].float(), mine[:-1].float(), next_tokens)
            rows.append({"probe": TEXT_PROBE, "item": f"{TEXT_PROBE}/{len(rows)}", **scores})
    model.train(was_training)
    return pd.DataFrame(rows)


def divergence_metrics(base: Tensor, logits: Tensor, next_tokens: Tensor) -> dict[str, float]:
    """Means over the positions of a text, in nats, of a model q against the base p.

    - forgetting_ce_hard: -log q(argmax_v p(v)), the target being the token that the base predicts
    - forgetting_ce_soft: -sum_v p(v) log q(v) = H(p) + KL(p || q)
    - forgetting_kl: KL(p || q) = sum_v p(v) (log p(v) - log q(v)), 0 for the base itself
    - base_agreement: share of positions at which both deem the same token most likely
    - text_loss: -log q(x), x being the token that the text has

    The paper's target is the token, or the distribution: its text can be read either way, so that
    both stand here (the hard target is the literal reading).

    Args:
        base: logits of the base, (positions, vocabulary).
        logits: logits of the model, (positions, vocabulary).
        next_tokens: the text's next token at each position, (positions,).
    """
    p, q = base.double().log_softmax(-1), logits.double().log_softmax(-1)
    likeliest = base.argmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)
    entropy = -(p.exp() * p).sum(-1)
    means = {
        "forgetting_ce_hard": -q.gather(-1, likeliest[:, None]).mean(),
        "forgetting_ce_soft": (entropy + divergence).mean(),
        "forgetting_kl": divergence.mean(),
        "base_agreement": (logits.argmax(-1) == likeliest).double().mean(),
        "text_loss": -q.gather(-1, next_tokens[:, None]).mean(),
    }
    return {name: float(value) for name, value in means.items()}


def save_base_predictions(targets: BasePredictions, path: Path) -> None:
    """Write the targets as safetensors."""
    tensors = {"blocks": targets.blocks, "hidden": targets.hidden, "weight": targets.weight}
    if targets.bias is not None:
        tensors["bias"] = targets.bias
    tensors["batch_size"] = torch.tensor(targets.batch_size)
    with atomic_write(path) as temporary:
        save_tensors(tensors, temporary)


def load_base_predictions(path: Path) -> BasePredictions:
    """Read what `save_base_predictions` wrote."""
    check_file(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return BasePredictions(
        blocks=tensors["blocks"],
        hidden=tensors["hidden"],
        weight=tensors["weight"],
        bias=tensors.get("bias"),
        batch_size=int(tensors["batch_size"]),
    )


def _batches(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _logits(model: Model, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits


@contextmanager
def _hidden_states(module: nn.Module) -> Iterator[list[Tensor]]:
    entered: list[Tensor] = []

    def note(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        entered.append(arguments[0])

    handle = module.register_forward_pre_hook(note)
    try:
        yield entered
    finally:
        handle.remove()
