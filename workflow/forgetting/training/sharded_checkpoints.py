"""Sharded checkpoints, to which every process writes its shard, and their consolidation.

The shards are safetensors files of torch.distributed.checkpoint, so no pickles are read. Each file
records the rows of each weight that it holds, so any number of processes can load them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
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
"""Folder of a checkpoint with the shards of the weights and of the optimizer's state."""

FILE_BYTES = 5 * 10**9
"""Largest file of a consolidated model, and so the memory that consolidation needs."""


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of the optimizer, by index of the parameter and name: `3.exp_avg`."""
    return {
        # Adafactor counts its steps in a Python int.
        f"{index}.{name}": torch.as_tensor(value).detach()
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load the state that `optimizer_tensors` returned."""
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
    """Write this process's shard of weights and optimizer; the main process adds the config.

    Raises:
        InputError: a process could not write its shard.
    """
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
    """Load this process's shard of a checkpoint that any number of processes wrote."""
    folder = checkpoint / SHARD_FOLDER if (checkpoint / SHARD_FOLDER).exists() else checkpoint
    reader = HuggingFaceStorageReader(str(folder))
    weights = _weight_tensors(model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {}
    for name, stored in _stored_tensors(reader).items():
        if name not in weights:
            parameter = parameters[int(name.split(".", 1)[0])].detach()
            is_moment = stored.size == parameter.size()  # the others are numbers, such as the step
            moments[name] = (
                torch.zeros_like(parameter)
                if is_moment
                else torch.zeros(stored.size, dtype=stored.properties.dtype)
            )
    load({**weights, **moments}, storage_reader=reader, no_dist=not dist.is_initialized())
    restore_optimizer(optimizer, moments)


def _stored_tensors(reader: HuggingFaceStorageReader) -> dict[str, TensorStorageMetadata]:
    """Return the sizes and types of all tensors of a folder, by name."""
    metadata = reader.read_metadata().state_dict_metadata
    return {
        name: value for name, value in metadata.items() if isinstance(value, TensorStorageMetadata)
    }


def _weight_tensors(model: Model) -> dict[str, Tensor]:
    """Return the tensors of a model's file: tied weights appear once, under their first name."""
    state = model.state_dict()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in reversed(parameters.items())}
    return {
        name: tensor.detach()
        for name, tensor in state.items()
        if name not in parameters or first[id(parameters[name])] == name
    }


def consolidate_shards(checkpoint: Path) -> None:
    """Replace the shards of a checkpoint by a whole model, as `load_checkpoint` reads it.

    An interrupted consolidation can be repeated: all shards are removed at once, at the end.

    Raises:
        InputError: a shard is damaged.
    """
    removed = checkpoint / f".{SHARD_FOLDER}"
    shutil.rmtree(removed, ignore_errors=True)
    if not (checkpoint / SHARD_FOLDER).exists():
        return
    if damage := folder_damage(checkpoint / SHARD_FOLDER):
        raise damage_error(*damage, removal_command(checkpoint.parent), "the run is trained again")
    reader = HuggingFaceStorageReader(str(checkpoint / SHARD_FOLDER))
    stored = {
        name: tensor
        for name, tensor in _stored_tensors(reader).items()
        if not name.split(".", 1)[0].isdigit()
    }
    files, total_size = _split_into_files(stored)
    index: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = WEIGHTS if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {
            name: torch.zeros(stored[name].size, dtype=stored[name].properties.dtype)
            for name in names
        }
        load(tensors, storage_reader=reader, no_dist=True)
        with atomic_write(checkpoint / file) as temporary:
            save_tensors(tensors, temporary)
        index |= dict.fromkeys(names, file)
    if len(files) > 1:
        content = {"metadata": {"total_size": total_size}, "weight_map": index}
        write_json(checkpoint / f"{WEIGHTS}.index.json", content)
    (checkpoint / SHARD_FOLDER).rename(removed)
    shutil.rmtree(removed)


def _split_into_files(stored: Mapping[str, TensorStorageMetadata]) -> tuple[list[list[str]], int]:
    """Return the names of the tensors of each file, and the bytes of all tensors.

    A new file starts whenever the tensors before it exceed another `FILE_BYTES`.
    """
    files: dict[int, list[str]] = {}
    total = 0
    for name in sorted(stored):
        files.setdefault(total // FILE_BYTES, []).append(name)
        total += stored[name].size.numel() * stored[name].properties.dtype.itemsize
    return list(files.values()), total
