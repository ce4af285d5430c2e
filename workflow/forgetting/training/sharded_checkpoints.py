"""Checkpoints of which every process writes its part, and whole models made of them.

The parts are safetensors (torch.distributed.checkpoint in Hugging Face's form): no pickles. Each
file says which rows of which weight it holds, so that any number of processes can read them.
"""

from __future__ import annotations

import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from forgetting.digests import folder_damage
from forgetting.errors import InputError
from forgetting.io import atomic_write, damage_error, removal_command, write_json
from forgetting.models.loading import Model
from forgetting.models.tuned import WEIGHTS, save_tensors
from forgetting.training.distributed import ProcessGroup

SHARD_FOLDER = "shards"
"""Folder in a checkpoint with the parts of its weights and of the optimizer's state."""

FILE_BYTES = 5 * 10**9
"""Largest file of a whole model; as much memory is needed to make it."""


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All of the optimizer's state, by number of the parameter and name: `3.exp_avg`."""
    return {
        # Adafactor counts its steps in a plain int.
        f"{index}.{name}": torch.as_tensor(value).detach()
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the state back that `optimizer_tensors` gave."""
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def save_sharded(
    model: Model, optimizer: torch.optim.Optimizer, checkpoint: Path, process_group: ProcessGroup
) -> None:
    """Write this process's part of weights and optimizer; the first adds the configuration."""
    if process_group.is_main:
        model.config.save_pretrained(checkpoint)
        if model.can_generate():
            model.generation_config.save_pretrained(checkpoint)
    tensors = {**_weight_tensors(model), **optimizer_tensors(optimizer)}
    writer = HuggingFaceStorageWriter(str(checkpoint / SHARD_FOLDER), save_distributed=True)
    try:
        save(tensors, storage_writer=writer)
    except CheckpointException as error:
        rank, (reason, _) = min(error.failures.items())
        raise InputError(f"{checkpoint}: not written by process {rank}: {reason}") from None


def load_sharded(model: Model, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Read what is this process's of a checkpoint, whatever number of processes wrote it."""
    folder = checkpoint / SHARD_FOLDER if (checkpoint / SHARD_FOLDER).exists() else checkpoint
    reader = HuggingFaceStorageReader(str(folder))
    weights = _weight_tensors(model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {}
    for name, stored in _stored_tensors(reader).items():
        if name not in weights:
            parameter = parameters[int(name.split(".", 1)[0])].detach()
            of_weights = stored.size == parameter.size()  # else a number, such as the step
            moments[name] = (
                torch.zeros_like(parameter)
                if of_weights
                else torch.zeros(stored.size, dtype=stored.properties.dtype)
            )
    load({**weights, **moments}, storage_reader=reader, no_dist=not dist.is_initialized())
    restore_optimizer(optimizer, moments)


def _stored_tensors(reader: HuggingFaceStorageReader) -> dict[str, TensorStorageMetadata]:
    """Sizes and types of all tensors of a folder, by name."""
    found = reader.read_metadata().state_dict_metadata
    return {
        name: value for name, value in found.items() if isinstance(value, TensorStorageMetadata)
    }


def _weight_tensors(model: Model) -> dict[str, Tensor]:
    """What a model's file holds: tied weights once, under their first name."""
    state = model.state_dict()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in reversed(parameters.items())}
    return {
        name: tensor.detach()
        for name, tensor in state.items()
        if name not in parameters or first[id(parameters[name])] == name
    }


def consolidate_shards(checkpoint: Path) -> None:
    """Make a whole model of the parts, as `load_checkpoint` reads it, and remove them.

    Done anew when it was interrupted: the parts go last, and all at once.
    """
    removed = checkpoint / f".{SHARD_FOLDER}"
    shutil.rmtree(removed, ignore_errors=True)
    if not (checkpoint / SHARD_FOLDER).exists():
        return
    if wrong := folder_damage(checkpoint / SHARD_FOLDER):
        raise damage_error(*wrong, removal_command(checkpoint.parent), "the run is trained again")
    reader = HuggingFaceStorageReader(str(checkpoint / SHARD_FOLDER))
    stored = {
        name: tensor
        for name, tensor in _stored_tensors(reader).items()
        if not name.split(".", 1)[0].isdigit()
    }
    names = sorted(stored)
    sizes = [stored[name].size.numel() * stored[name].properties.dtype.itemsize for name in names]
    # Whole tensors in a file, which begins anew where they would be too many.
    begun = [sum(sizes[:place]) // FILE_BYTES for place in range(len(names))]
    files = [
        [name for name, _ in group]
        for _, group in groupby(zip(names, begun, strict=True), key=lambda pair: pair[1])
    ]
    index: dict[str, str] = {}
    for number, held in enumerate(files, start=1):
        file = WEIGHTS if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {
            name: torch.zeros(stored[name].size, dtype=stored[name].properties.dtype)
            for name in held
        }
        load(tensors, storage_reader=reader, no_dist=True)
        with atomic_write(checkpoint / file) as temporary:
            save_tensors(tensors, temporary)
        index |= dict.fromkeys(held, file)
    if len(files) > 1:
        about = {"metadata": {"total_size": sum(sizes)}, "weight_map": index}
        write_json(checkpoint / f"{WEIGHTS}.index.json", about)
    (checkpoint / SHARD_FOLDER).rename(removed)
    shutil.rmtree(removed)
