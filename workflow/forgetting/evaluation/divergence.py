"""Measure how far a model's predictions on a general text are from the base's.

The metrics follow *Scaling Laws for Forgetting* (Kalajdzievski 2024, arXiv 2401.05605, section 3):
the cross-entropy of the tuned model with the base's prediction at each position as target. Unlike a
task score, it is affected neither by transfer between tasks nor by what the base does not know.
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
    """A text in blocks, and the base's predictions on it.

    The inputs of the LM head are stored instead of distributions. They are exact and smaller by the
    ratio of width to vocabulary.

    Attributes:
        blocks: token ids, (blocks, length).
        hidden: inputs of the base's LM head, (blocks, length, width).
        weight: weight of the base's LM head, (vocabulary, width).
        bias: bias of the base's LM head, (vocabulary,) or None.
        batch_size: blocks per forward pass. Every model uses the same, so that equal models have
            bit-identical logits.
    """

    blocks: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    batch_size: int

    def logits(self, rows: slice, device: torch.device) -> Tensor:
        """Return the base's logits on some blocks, (rows, length, vocabulary)."""
        bias = None if self.bias is None else self.bias.to(device)
        return nn.functional.linear(self.hidden[rows].to(device), self.weight.to(device), bias)


def cut_blocks(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    length: int,
    max_blocks: int | None = None,
) -> Tensor:
    """Return the token ids of the concatenated texts, cut into blocks: (blocks, length).

    The rest at the end is dropped, so that all blocks have equal weight. No special token is added.
    WikiText-103's test split has 661 blocks of 512 under Llama-2's tokenizer.

    Args:
        tokenizer: the model's tokenizer.
        texts: concatenated without separators.
        length: tokens per block.
        max_blocks: takes this number of blocks, evenly spaced over the text.

    Raises:
        InputError: the text is shorter than one block.
    """
    ids = tokenizer("".join(texts), add_special_tokens=False)["input_ids"]
    count = len(ids) // length
    if count == 0:
        raise InputError(
            f"general_text: the text has {len(ids)} tokens, fewer than one block of {length}; "
            "give a longer text, or make general_text.block smaller"
        )
    blocks = torch.tensor(ids[: count * length]).view(count, length)
    if max_blocks is not None and max_blocks < count:
        blocks = blocks[[index * count // max_blocks for index in range(max_blocks)]]
    return blocks


@torch.inference_mode()
def compute_base_predictions(model: Model, blocks: Tensor, batch_size: int) -> BasePredictions:
    """Run the base on the text and keep the inputs of its LM head.

    Raises:
        InputError: the architecture scales or caps the logits of its LM head.
    """
    head = model.get_output_embeddings()
    hidden: list[Tensor] = []
    for rows in _batches(len(blocks), batch_size):
        with _recorded_inputs(head) as inputs:
            logits = _logits(model, blocks[rows])
        hidden.append(inputs[-1].cpu())
        if not torch.equal(head(inputs[-1]), logits):
            raise InputError(
                "general_text: this architecture scales or caps the logits of its LM head, so that "
                "the base's predictions cannot be kept; leave general_text out"
            )
    return BasePredictions(
        blocks=blocks,
        hidden=torch.cat(hidden),
        weight=head.weight.detach().cpu().clone(),
        bias=None if head.bias is None else head.bias.detach().cpu().clone(),
        batch_size=batch_size,
    )


def append_divergence(
    items: pd.DataFrame, model: Model, base_predictions: BasePredictions | None
) -> pd.DataFrame:
    """Return the items of the probes followed by those of the general text, if there is one."""
    if base_predictions is None:
        return items
    return pd.concat([items, divergence_items(model, base_predictions)], ignore_index=True)


@torch.inference_mode()
def divergence_items(model: Model, base_predictions: BasePredictions) -> pd.DataFrame:
    """Return one row per block: probe, item and the metrics of `divergence_metrics`.

    The last position of a block is left out, because the block has no next token there.
    """
    was_training = model.training
    model.eval()
    rows: list[dict[str, Any]] = []
    for batch in _batches(len(base_predictions.blocks), base_predictions.batch_size):
        blocks = base_predictions.blocks[batch]
        logits = _logits(model, blocks)
        base_logits = base_predictions.logits(batch, logits.device)
        for block, p, q in zip(blocks, base_logits, logits, strict=True):
            next_tokens = block[1:].to(logits.device)
            scores = divergence_metrics(p[:-1].float(), q[:-1].float(), next_tokens)
            rows.append({"probe": TEXT_PROBE, "item": f"{TEXT_PROBE}/{len(rows)}", **scores})
    model.train(was_training)
    return pd.DataFrame(rows)


def divergence_metrics(base: Tensor, logits: Tensor, next_tokens: Tensor) -> dict[str, float]:
    """Return means over the positions of a text, in nats, for a model q and the base p.

    - forgetting_ce_hard: -log q(argmax_v p(v)); the target is the base's most probable token
    - forgetting_ce_soft: -sum_v p(v) log q(v) = H(p) + KL(p || q)
    - forgetting_kl: KL(p || q) = sum_v p(v) (log p(v) - log q(v)), 0 for the base itself
    - base_agreement: fraction of positions at which both have the same most probable token
    - text_loss: -log q(x), where x is the text's token

    The paper can be read with either target, the token or the distribution. Both are computed; the
    hard target is the literal reading.

    Args:
        base: logits of the base, (positions, vocabulary).
        logits: logits of the model, (positions, vocabulary).
        next_tokens: the text's next token at each position, (positions,).
    """
    p, q = base.double().log_softmax(-1), logits.double().log_softmax(-1)
    base_tokens = base.argmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)
    entropy = -(p.exp() * p).sum(-1)
    means = {
        "forgetting_ce_hard": -q.gather(-1, base_tokens[:, None]).mean(),
        "forgetting_ce_soft": (entropy + divergence).mean(),
        "forgetting_kl": divergence.mean(),
        "base_agreement": (logits.argmax(-1) == base_tokens).double().mean(),
        "text_loss": -q.gather(-1, next_tokens[:, None]).mean(),
    }
    return {name: float(value) for name, value in means.items()}


def save_base_predictions(predictions: BasePredictions, path: Path) -> None:
    """Write the base's predictions as safetensors."""
    tensors = {name: getattr(predictions, name) for name in ("blocks", "hidden", "weight")}
    if predictions.bias is not None:
        tensors["bias"] = predictions.bias
    tensors["batch_size"] = torch.tensor(predictions.batch_size)
    with atomic_write(path) as temporary:
        save_tensors(tensors, temporary)


def load_base_predictions(path: Path) -> BasePredictions:
    """Return what `save_base_predictions` wrote."""
    check_file(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return BasePredictions(**{"bias": None, **tensors, "batch_size": int(tensors["batch_size"])})


def _batches(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _logits(model: Model, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits


@contextmanager
def _recorded_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    inputs: list[Tensor] = []

    def record(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs.append(arguments[0])

    handle = module.register_forward_pre_hook(record)
    try:
        yield inputs
    finally:
        handle.remove()
