"""A tuned model on disk: an adapter in peft's format, or a whole model in Hugging Face's.

The models of one base, one after the other: adapters are put on it and taken off.

An adapter added into the matrices that it stands beside, for the length of a measurement.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from forgetting.digests import folder_damage
from forgetting.errors import InputError
from forgetting.io import (
    disk_errors_as_input_errors,
)
from forgetting.models.adapters import (
    adapted_weight,
    adapter_layers,
    is_adalora,
    is_tied,
    pissa_as_lora,
    pruned_state_dict,
    trainable_half,
)
from forgetting.models.loading import Model, load_base


@contextmanager
def merged_adapter(model: Model, precision: torch.dtype) -> Iterator[None]:
    """Measure with W + s B A in the place of W, then put every W back, bit for bit.

    A token is then multiplied once per layer instead of three times: without this, measuring an
    adapter costs up to twice what measuring its base costs. In bfloat16 a small update would be
    lost in the rounding of the sum, so there the adapter stays beside its matrix. While it lasts,
    the matrices that have an adapter are in memory twice.
    """
    layers: list[Any] = []
    if precision == torch.float32 and isinstance(model, PeftModel):
        # The update of a tied head would change the input embedding as well.
        layers = [layer for layer in adapter_layers(model) if not is_tied(model, layer)]
    weights = [adapted_weight(layer) for layer in layers]
    kept = [weight.detach().clone() for weight in weights]
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer in layers:
            layer.unmerge()
        with torch.no_grad():
            # Taking the update off again would leave the rounding of the sum.
            for weight, original in zip(weights, kept, strict=True):
                weight.copy_(original)


class AdapterSwapper:
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
        before = _module_structure(self._base)
        try:
            yield load_adapter(self._base, checkpoint)
        finally:
            _restore_modules(self._base, before)


ModuleStructure = Mapping[nn.Module, tuple[dict[str, Any], dict[str, Any]]]
"""Of what each module is made: its modules and its weights, by name."""


def _module_structure(model: nn.Module) -> ModuleStructure:
    return {m: (dict(m._modules), dict(m._parameters)) for m in model.modules()}


def _restore_modules(model: PreTrainedModel, before: ModuleStructure) -> None:
    """Every module and every weight in its place again, whatever kind of adapter was there.

    peft's own `unload` does not know the trained copies of embeddings that stand in the place of
    its wrappers.
    """
    for module, (modules, weights) in before.items():
        module._modules = modules
        module._parameters = weights
    # Else peft would take the next adapter for a second one.
    vars(model).pop("peft_config", None)


ADAPTER = "adapter_model.safetensors"
WEIGHTS = "model.safetensors"


def trained_state(model: Model) -> dict[str, torch.Tensor]:
    """What training changes: the adapter in peft's names, or all weights."""
    if is_adalora(model):
        return pruned_state_dict(model)[0]
    if isinstance(model, PeftModel):
        return dict(get_peft_model_state_dict(model))
    return dict(model.state_dict())


def save_weights(model: Model, folder: Path) -> None:
    """Write an adapter in peft's format, or a whole model in Hugging Face's."""
    if isinstance(model, PeftModel):
        folder.mkdir(parents=True, exist_ok=True)
        state, config = trained_state(model), model.peft_config["default"]
        if is_adalora(model):
            state, config = pruned_state_dict(model)
        elif config.init_lora_weights == "pissa":
            state = pissa_as_lora(model.start, state)
            double = {"r": 2 * config.r, "lora_alpha": 2 * config.lora_alpha}
            config = replace(config, **double, init_lora_weights=True)
        # Copies, since a trained embedding and its tied head are one, and a file wants two.
        form = {"memory_format": torch.contiguous_format}
        tensors = {name: tensor.detach().cpu().clone(**form) for name, tensor in state.items()}
        save_tensors(tensors, folder / ADAPTER)
        config.save_pretrained(str(folder))
    else:
        model.save_pretrained(folder)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors as safetensors; a full disk is told in one sentence."""
    with disk_errors_as_input_errors(path):
        save_file(tensors, path, metadata={"format": "pt"})


def restore_weights(model: Model, folder: Path) -> None:
    """Put the weights of a checkpoint back into the model that they came from."""
    if isinstance(model, PeftModel):
        state = load_file(folder / ADAPTER)
        if model.peft_config["default"].init_lora_weights == "pissa":
            state = {name: trainable_half(name, tensor) for name, tensor in state.items()}
        set_peft_model_state_dict(model, state)
        return
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(shard)
    # Tied weights are stored once, so some names may be missing; none may be unknown.
    unknown = model.load_state_dict(tensors, strict=False).unexpected_keys
    if unknown:
        raise InputError(f"{folder}: not a checkpoint of this model ({unknown[0]})")


def load_tuned(
    base: Path, checkpoint: Path, device: torch.device, parameters: int | None = None
) -> Model:
    """A tuned model from disk, for measuring: the base with an adapter, or the full weights."""
    if not (checkpoint / ADAPTER).exists():
        return load_base(checkpoint, device)
    return load_adapter(load_base(base, device, parameters), checkpoint)


def load_adapter(base: PreTrainedModel, checkpoint: Path) -> PeftModel:
    """An adapter from disk on its base, which is changed in place."""
    model = PeftModel.from_pretrained(base, checkpoint).eval()
    for name, module in list(model.named_modules()):
        # In the place of peft's wrapper of them, through which transformers cannot tie weights.
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.modules_to_save["default"])
    return model


OPTIMIZER_FILE = "optimizer.safetensors"


METHOD_FILE = "method.safetensors"
"""What a run goes on from beside its weights: its optimizer's state, and the method's own."""


def checkpoint_damage(checkpoint: Path) -> tuple[Path, str] | None:
    """Return what is wrong with the weights of a checkpoint, and with what a run goes on from."""
    if not (checkpoint / "progress.json").exists():
        return checkpoint / "progress.json", "is missing"
    return folder_damage(checkpoint, optional=(OPTIMIZER_FILE, METHOD_FILE))
