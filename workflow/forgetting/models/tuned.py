"""Save, load, merge and swap tuned models: adapters in peft's format, or whole models."""

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
from forgetting.io import disk_errors_as_input_errors
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
    """Replace W by W + s B A within this context, and restore every W bit by bit at its end.

    Each layer then needs one matrix product instead of three: without merging, evaluating an
    adapter takes up to twice as long as evaluating its base. In bfloat16 the rounding of the sum
    would remove a small update, so the adapter is not merged there. Within this context the adapted
    matrices take twice their memory.
    """
    layers: list[Any] = []
    if precision == torch.float32 and isinstance(model, PeftModel):
        # Merging into a tied head would also change the input embedding.
        layers = [layer for layer in adapter_layers(model) if not is_tied(model, layer)]
    weights = [adapted_weight(layer) for layer in layers]
    originals = [weight.detach().clone() for weight in weights]
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer in layers:
            layer.unmerge()
        with torch.no_grad():
            # Unmerging alone would leave rounding errors of the sum.
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)


class AdapterSwapper:
    """Load the tuned models of one base in turn, and read the base from disk as rarely as possible.

    Every model is bit-identical to one that is loaded in a process of its own.

    Attributes:
        folder: of the base.
        device: to which models are moved.
        bases_read: how often the base was read from disk.
    """

    def __init__(self, folder: Path, device: torch.device, parameters: int | None = None) -> None:
        self.folder, self.device, self.bases_read = folder, device, 0
        self._parameters = parameters
        self._base: PreTrainedModel | None = None

    @contextmanager
    def load(self, checkpoint: Path | None) -> Iterator[Model]:
        """Yield the base (for None), the base with an adapter, or a whole model.

        Loading a whole model releases the base first, to free its memory.
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
        structure = _module_structure(self._base)
        try:
            yield load_adapter(self._base, checkpoint)
        finally:
            _restore_modules(self._base, structure)


ModuleStructure = Mapping[nn.Module, tuple[dict[str, Any], dict[str, Any]]]
"""The submodules and the weights of each module, by name."""


def _module_structure(model: nn.Module) -> ModuleStructure:
    return {m: (dict(m._modules), dict(m._parameters)) for m in model.modules()}


def _restore_modules(model: PreTrainedModel, structure: ModuleStructure) -> None:
    """Remove an adapter of any kind by restoring the submodules and weights of every module.

    peft's own `unload` does not handle the trained copies of embeddings, which `load_adapter` puts
    in place of peft's wrappers.
    """
    for module, (modules, weights) in structure.items():
        module._modules = modules
        module._parameters = weights
    # Otherwise peft treats the next adapter as a second one.
    vars(model).pop("peft_config", None)


ADAPTER = "adapter_model.safetensors"
WEIGHTS = "model.safetensors"


def trained_state(model: Model) -> dict[str, torch.Tensor]:
    """Return what training changes: the adapter in peft's names, or all weights."""
    if is_adalora(model):
        return pruned_state_dict(model)[0]
    if isinstance(model, PeftModel):
        return dict(get_peft_model_state_dict(model))
    return dict(model.state_dict())


def save_weights(model: Model, folder: Path) -> None:
    """Write an adapter in peft's format, or a whole model in Hugging Face format."""
    if isinstance(model, PeftModel):
        folder.mkdir(parents=True, exist_ok=True)
        state, config = trained_state(model), model.peft_config["default"]
        if is_adalora(model):
            state, config = pruned_state_dict(model)
        elif config.init_lora_weights == "pissa":
            state = pissa_as_lora(model.pissa_init, state)
            double = {"r": 2 * config.r, "lora_alpha": 2 * config.lora_alpha}
            config = replace(config, **double, init_lora_weights=True)
        # Copies, because safetensors rejects tied weights, which share their memory.
        contiguous = {"memory_format": torch.contiguous_format}
        tensors = {name: t.detach().cpu().clone(**contiguous) for name, t in state.items()}
        save_tensors(tensors, folder / ADAPTER)
        config.save_pretrained(str(folder))
    else:
        model.save_pretrained(folder)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors as safetensors; disk errors are raised as `InputError`."""
    with disk_errors_as_input_errors(path):
        save_file(tensors, path, metadata={"format": "pt"})


def restore_weights(model: Model, folder: Path) -> None:
    """Load the weights of a checkpoint into the model that wrote them.

    Raises:
        InputError: the checkpoint holds a weight that the model lacks.
    """
    if isinstance(model, PeftModel):
        state = load_file(folder / ADAPTER)
        if model.peft_config["default"].init_lora_weights == "pissa":
            state = {name: trainable_half(name, tensor) for name, tensor in state.items()}
        set_peft_model_state_dict(model, state)
        return
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(shard)
    # Tied weights are stored once, so names may be missing; unknown names are an error.
    unknown = model.load_state_dict(tensors, strict=False).unexpected_keys
    if unknown:
        raise InputError(f"{folder}: not a checkpoint of this model ({unknown[0]})")


def load_tuned(
    base: Path, checkpoint: Path, device: torch.device, parameters: int | None = None
) -> Model:
    """Return a tuned model from disk: the base with an adapter, or a whole model.

    Args:
        base: folder of the base model.
        checkpoint: folder of the tuned model.
        device: to which the model is moved.
        parameters: expected number of parameters of the base, if known.
    """
    if not (checkpoint / ADAPTER).exists():
        return load_base(checkpoint, device)
    return load_adapter(load_base(base, device, parameters), checkpoint)


def load_adapter(base: PreTrainedModel, checkpoint: Path) -> PeftModel:
    """Attach an adapter from disk to its base, in place, and return the model."""
    model = PeftModel.from_pretrained(base, checkpoint).eval()
    for name, module in list(model.named_modules()):
        # transformers cannot tie weights through peft's wrapper of trained embeddings.
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.modules_to_save["default"])
    return model


STATE_FILE = "progress.json"
"""File of a checkpoint with the state of its run; it is written last."""

OPTIMIZER_FILE = "optimizer.safetensors"
METHOD_FILE = "method.safetensors"
"""Files of a checkpoint with the state of the optimizer and of the method, for resuming."""


def checkpoint_damage(checkpoint: Path) -> tuple[Path, str] | None:
    """Return a damaged file of a checkpoint and its fault, or None."""
    if not (checkpoint / STATE_FILE).exists():
        return checkpoint / STATE_FILE, "is missing"
    return folder_damage(checkpoint, optional=(OPTIMIZER_FILE, METHOD_FILE))
