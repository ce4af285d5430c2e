"""A tuned model on disk: an adapter in peft's format, or a whole model in Hugging Face's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from forgetting.models.adalora import is_adalora, without_pruned
from forgetting.models.adapters import convert_pissa, trained_half
from forgetting.models.loading import Model, load_base
from forgetting.records import InputError, writing

ADAPTER = "adapter_model.safetensors"
WEIGHTS = "model.safetensors"


def trained_state(model: Model) -> dict[str, torch.Tensor]:
    """What training changes: the adapter in peft's names, or all weights."""
    if is_adalora(model):
        return without_pruned(model)[0]
    if isinstance(model, PeftModel):
        return dict(get_peft_model_state_dict(model))
    return dict(model.state_dict())


def save_checkpoint(model: Model, folder: Path) -> None:
    """Write an adapter in peft's format, or a whole model in Hugging Face's."""
    if isinstance(model, PeftModel):
        folder.mkdir(parents=True, exist_ok=True)
        state, config = trained_state(model), model.peft_config["default"]
        if is_adalora(model):
            state, config = without_pruned(model)
        elif config.init_lora_weights == "pissa":
            state = convert_pissa(model.start, state)
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
    with writing(path):
        save_file(tensors, path, metadata={"format": "pt"})


def restore_checkpoint(model: Model, folder: Path) -> None:
    """Put the weights of a checkpoint back into the model that they came from."""
    if isinstance(model, PeftModel):
        state = load_file(folder / ADAPTER)
        if model.peft_config["default"].init_lora_weights == "pissa":
            state = {name: trained_half(name, tensor) for name, tensor in state.items()}
        set_peft_model_state_dict(model, state)
        return
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(shard)
    # Tied weights are stored once, so some names may be missing; none may be unknown.
    unknown = model.load_state_dict(tensors, strict=False).unexpected_keys
    if unknown:
        raise InputError(f"{folder}: not a checkpoint of this model ({unknown[0]})")


def load_checkpoint(
    base: Path, checkpoint: Path, device: torch.device, parameters: int | None = None
) -> Model:
    """A tuned model from disk, for measuring: the base with an adapter, or the full weights."""
    if not (checkpoint / ADAPTER).exists():
        return load_base(checkpoint, device)
    return put_adapter_on(load_base(base, device, parameters), checkpoint)


def put_adapter_on(base: PreTrainedModel, checkpoint: Path) -> PeftModel:
    """An adapter from disk on its base, which is changed in place."""
    model = PeftModel.from_pretrained(base, checkpoint).eval()
    for name, module in list(model.named_modules()):
        # In the place of peft's wrapper of them, through which transformers cannot tie weights.
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.modules_to_save["default"])
    return model
