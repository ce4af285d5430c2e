"""The models of one base, one after the other: adapters are put on it and taken off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from forgetting.models.loading import Model, load_base
from forgetting.models.tuned import ADAPTER, put_adapter_on


class Swapping:
    """Loads what is asked for, each as if it were the first: the base is read once at most.

    Attributes:
        folder: of the base.
        bases_read: how often the base was read from the disk.
    """

    def __init__(self, folder: Path, device: torch.device, parameters: int | None = None) -> None:
        self.folder, self.device, self.bases_read = folder, device, 0
        self._parameters = parameters
        self._base: PreTrainedModel | None = None

    @contextmanager
    def load(self, checkpoint: Path | None) -> Iterator[Model]:
        """The base, the base with an adapter, or a whole model: for the length of the block.

        A whole model needs the room of the base, which is therefore given up.
        """
        if checkpoint is not None and not (checkpoint / ADAPTER).exists():
            self._base = None
            yield load_base(checkpoint, self.device)
            return
        if self._base is None:
            self._base = load_base(self.folder, self.device, self._parameters)
            self.bases_read += 1
        if checkpoint is None:
            yield self._base
            return
        before = _structure(self._base)
        try:
            yield put_adapter_on(self._base, checkpoint)
        finally:
            _put_back(self._base, before)


Structure = Mapping[nn.Module, tuple[dict[str, Any], dict[str, Any]]]
"""Of what each module is made: its modules and its weights, by name."""


def _structure(model: nn.Module) -> Structure:
    return {m: (dict(m._modules), dict(m._parameters)) for m in model.modules()}


def _put_back(model: PreTrainedModel, before: Structure) -> None:
    """Every module and every weight in its place again, whatever kind of adapter was there.

    peft's own `unload` does not know the trained copies of embeddings that stand in the place of
    its wrappers.
    """
    for module, (modules, weights) in before.items():
        module._modules = modules
        module._parameters = weights
    # Else peft would take the next adapter for a second one.
    vars(model).pop("peft_config", None)
