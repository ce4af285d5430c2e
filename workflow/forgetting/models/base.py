"""The record of the base, and whether the model's folder still is what was recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from forgetting.digests import sha256_of_each
from forgetting.inputs import model_files
from forgetting.records import InputError, damaged, read_json, removal

PRETRAINED = "trained from scratch for this study"
"""Origin of a base that a job of this study has trained."""


def read_base(record: Path) -> dict[str, Any]:
    """Return the record of the base, once every file of the model has the digest recorded there.

    Raises:
        InputError: a file is damaged, missing or new; it names the command that heals it.
    """
    base: dict[str, Any] = read_json(record)
    folder = Path(base["path"])
    if wrong := _difference(folder, base["files"]):
        path, what = wrong
        if base.get("downloaded"):
            remedy, then = removal(folder, record), "the model is downloaded again"
        elif base["origin"] == PRETRAINED:
            remedy, then = removal(record), "the base is trained again"
        else:
            raise InputError(
                f"{path} {what}; put the recorded file back, or run `{removal(record)}` to take "
                "the model as it is now, then repeat the command"
            )
        raise damaged(path, what, remedy, then)
    return base


def _difference(folder: Path, recorded: Mapping[str, str]) -> tuple[Path, str] | None:
    """Return the first file of a model that is not as recorded, and what is wrong with it."""
    present = {path.relative_to(folder).as_posix() for path in model_files(folder)}
    if missing := sorted(set(recorded) - present):
        return folder / missing[0], "is missing"
    if new := sorted(present - set(recorded)):
        return folder / new[0], "was not there when the base was recorded"
    for path, digest in sha256_of_each(folder / name for name in recorded).items():
        if digest != recorded[path.relative_to(folder).as_posix()]:
            return path, "differs from what was recorded of the base (sha256)"
    return None


def model_parameters(folder: Path) -> int:
    """Return how many parameters the model of a folder has once it is loaded.

    Its files may have more, such as buffers and the second name of a tied weight, or fewer.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no causal language model can be read ({error})") from None
    return sum(parameter.numel() for parameter in model.parameters())
