"""Load a base model, on the device and in the arithmetic that the machine has.

The record of the base, and whether the model's folder still is what was recorded.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from forgetting.digests import sha256_of_each
from forgetting.errors import InputError
from forgetting.inputs import model_files
from forgetting.io import damage_error, read_foreign_json, read_json, removal_command

Model: TypeAlias = PreTrainedModel | PeftModel
"""A model that can be measured: plain, or with an adapter."""


def unwrap_peft(model: Model) -> PreTrainedModel:
    """The model itself, without peft's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def text_config(model: Model) -> PreTrainedConfig:
    """Return the configuration of the language model, which multimodal types have as a section."""
    config: PreTrainedConfig = unwrap_peft(model).config.get_text_config(decoder=True)
    return config


def language_model(model: PreTrainedModel) -> nn.Module:
    """Return the part of a model that text reaches, its LM head aside; of a text model, all.

    In a multimodal type it is the module that holds the input embedding.
    """
    whole: nn.Module = model
    if text_config(model) is model.config:
        return whole
    embedding = model.get_input_embeddings()
    name = next(name for name, module in whole.named_modules() if module is embedding)
    return whole.get_submodule(name.rpartition(".")[0])


def freeze_unread(model: PreTrainedModel) -> None:
    """Freeze what no text reaches, such as a vision tower, which gets no gradient."""
    read = {*language_model(model).modules(), model.get_output_embeddings()}
    for module in model.modules():
        if module not in read:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def get_device() -> torch.device:
    """The first GPU where there is one, else the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(wanted: str, device: torch.device) -> torch.dtype:
    """The arithmetic of forward and backward passes, decided once per process and recorded.

    auto is bfloat16 where the GPU or the processor multiplies it in hardware, float32 elsewhere.
    Weights are float32 in any case.
    """
    if wanted == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Does the hardware multiply bfloat16 matrices (GPU, AVX-512 BF16 or AMX)?

    Where it does, autocast trains small models about twice as fast as float32 on a CPU; where it
    does not, bfloat16 is emulated and slower.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision for bfloat16, nothing for float32."""
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=precision)


def autocast_dtype(device: torch.device) -> torch.dtype:
    """The arithmetic of the `autocast` that this is called in."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32


def check_config(folder: Path) -> None:
    """Refuse a config.json that transformers cannot read, with what it says of the key."""
    try:
        AutoConfig.from_pretrained(folder)
    except Exception as error:
        # A value of a wrong type ends in an error of any type.
        told = " ".join(str(error).split())
        raise InputError(
            f"{folder / 'config.json'}: no configuration of a model can be read "
            f"({type(error).__name__}: {told}); copy config.json of the model again"
        ) from None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; it needs an end-of-sequence token, which also pads."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        # What a broken file ends in is of any type: the tokenizers' own is a bare Exception.
        raise InputError(
            f"{folder}: no tokenizer can be read there ({type(error).__name__}: {error}); copy "
            "tokenizer.json and tokenizer_config.json of the model into it again"
        ) from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"{folder}: its tokenizer has no end-of-sequence token (eos_token)")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(folder: Path, device: torch.device, parameters: int | None = None) -> PreTrainedModel:
    """A causal language model in Hugging Face form, with float32 weights, in evaluation mode.

    Only safetensors are read and no code of the model's author is run. A weight that the files
    lack, or have in another shape, would be drawn at random, anew at every loading.

    Args:
        parameters: how many the model has; another number is refused.

    Raises:
        InputError: names the folder and what is wrong there.
    """
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are told, below
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: no causal language model can be read ({error})") from None
    lacking = [*sorted(found["missing_keys"]), *(str(key[0]) for key in found["mismatched_keys"])]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise InputError(
            f"{folder}: its safetensors lack the weight `{lacking[0]}`{more}, or have another "
            "shape than config.json asks for; take a complete model, with the config.json that "
            "belongs to it"
        )
    count = sum(parameter.numel() for parameter in model.parameters())
    if parameters is not None and count != parameters:
        raise InputError(
            f"{folder}: {count:,} parameters were loaded, and {parameters:,} are recorded; take "
            "out of the folder what does not belong to the model, such as an adapter"
        )
    loaded: PreTrainedModel = model.to(device).eval()
    stops = declared_stops(folder)
    loaded.generation_config.eos_token_id = stops if len(stops) > 1 else next(iter(stops), None)
    return loaded


PROBE_TOKENS = 16
LARGEST_CHANGE = 3e-5
"""Change of earlier logits, as a share of the largest logit, that rounding may make. Causal models
change nothing on a CPU; new encoders with small weights change 1e-4 and more."""


@torch.inference_mode()
def check_causal(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a model that sees the tokens which it should predict.

    The last token of a row is changed: nothing before it may be predicted otherwise.

    Args:
        folder: of the model, for the message.
    """
    config = text_config(model)
    room = getattr(config, "max_position_embeddings", None) or PROBE_TOKENS
    length, generator = min(PROBE_TOKENS, room), torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, length), generator=generator).repeat(4, 1)
    ids[:, -1] = (ids[:, -1] + torch.arange(4)) % config.vocab_size
    ids = ids.to(model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    earlier = logits[:, :-1].float()
    change, largest = (earlier - earlier[:1]).abs().max(), earlier.abs().max()
    if change > LARGEST_CHANGE * largest:
        raise InputError(
            f"{folder}: the model sees the tokens that it should predict: another last token "
            f"changes what it predicts before it (by {change:.2g}, of logits up to {largest:.2g}); "
            "take a causal model, such as Llama or Qwen"
        )


def declared_stops(folder: Path) -> list[int]:
    """Return the tokens that end an answer by generation_config.json and config.json of a folder.

    Only what the files say counts: some classes of transformers have a number as their default,
    which is any token of another tokenizer.
    """
    found: set[int] = set()
    for path in (folder / "generation_config.json", folder / "config.json"):
        try:
            whole = read_foreign_json(path) if path.is_file() else {}
            for section in (whole, whole.get("text_config") or {}):
                found.update(eos_tokens(section.get("eos_token_id")))
        except (ValueError, TypeError, RecursionError, AttributeError):
            raise InputError(
                f"{path}: expected a JSON object in which `eos_token_id` is the id of a token, a "
                "list of them, or null"
            ) from None
    return sorted(found)


def eos_tokens(value: Any) -> list[int]:
    """Return the ids of an `eos_token_id`, which is one, a list or nothing."""
    several = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(one) is int for one in several):
        raise TypeError(value)
    return several


def check_stops(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model whose files name ordinary text as the end of an answer.

    Raises:
        InputError: names the token.
    """
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    for token in declared_stops(folder):
        # Beyond the tokenizer's tokens the embedding has rows that no text has.
        if token not in special and 0 <= token < len(tokenizer):
            raise InputError(
                f"{folder}: eos_token_id {token} of generation_config.json or config.json is the "
                f"text {tokenizer.convert_ids_to_tokens(token)!r} to the tokenizer, so that "
                "answers would be cut there; let both files name the token that ends an answer "
                f"({tokenizer.eos_token_id} is {tokenizer.eos_token})"
            )


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep only what enters each block, and compute the rest again in the backward pass.

    Saves most of the memory that grows with the tokens of a pass, for a third more arithmetic; the
    gradients are the same bit by bit, dropout included.
    """
    try:
        model.activation_checkpointing_enable()
    except ValueError as error:
        raise InputError(f"training.activation_checkpointing: {error}") from None


def silence_libraries() -> None:
    """Keep progress bars and advice of the libraries out of the logs."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # peft looks for AdaLoRA's ranks under names of another form, and finds them later.
    warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


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
            remedy, then = removal_command(folder, record), "the model is downloaded again"
        elif base["origin"] == PRETRAINED:
            remedy, then = removal_command(record), "the base is trained again"
        else:
            raise InputError(
                f"{path} {what}; put the recorded file back, or run `{removal_command(record)}` "
                "to take the model as it is now, then repeat the command"
            )
        raise damage_error(path, what, remedy, then)
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
