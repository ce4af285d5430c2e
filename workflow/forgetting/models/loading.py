"""Load a base model and its tokenizer, and choose device and precision.

The record of the base lists a digest for every file of the model; `read_base` verifies them.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
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
from forgetting.errors import InputError, is_out_of_memory
from forgetting.inputs import model_files
from forgetting.io import damage_error, read_foreign_json, read_json, removal_command
from forgetting.models.architecture import weight_files

Model: TypeAlias = PreTrainedModel | PeftModel
"""A model that can be evaluated: plain, or with an adapter."""


def unwrap_peft(model: Model) -> PreTrainedModel:
    """Return the model itself, without peft's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def text_config(model: Model) -> PreTrainedConfig:
    """Return the configuration of the language model, a section of it in multimodal types."""
    config: PreTrainedConfig = unwrap_peft(model).config.get_text_config(decoder=True)
    return config


def language_model(model: PreTrainedModel) -> nn.Module:
    """Return the language model without its LM head; of a text model, the whole model.

    In a multimodal model it is the module that holds the input embedding.
    """
    root: nn.Module = model
    if text_config(model) is model.config:
        return root
    embedding = model.get_input_embeddings()
    name = next(name for name, module in root.named_modules() if module is embedding)
    return root.get_submodule(name.rpartition(".")[0])


def text_modules(model: PreTrainedModel) -> set[nn.Module | None]:
    """Return the modules that text reaches: those of the language model and the LM head."""
    return {*language_model(model).modules(), model.get_output_embeddings()}


def freeze_non_text(model: PreTrainedModel) -> None:
    """Freeze modules that no text reaches, such as a vision tower, since they get no gradient."""
    reachable = text_modules(model)
    for module in model.modules():
        if module not in reachable:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def get_device() -> torch.device:
    """Return the first GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """Return the data type of matrix products in forward and backward passes.

    Args:
        precision: float32, bfloat16 or auto, which is bfloat16 on hardware that multiplies it and
            float32 on other hardware. Weights are float32 in any case.
        device: where the products are computed.
    """
    if precision == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware multiplies bfloat16 matrices (GPU, AVX-512 BF16 or AMX).

    On a CPU with such hardware, autocast trains small models about twice as fast as float32. On
    other CPUs bfloat16 is emulated and slower.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Return a context of mixed precision for bfloat16, and an empty one for float32."""
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=precision)


def autocast_dtype(device: torch.device) -> torch.dtype:
    """Return the data type of the enclosing `autocast`, or float32 without one."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32


def check_config(folder: Path) -> None:
    """Raise `InputError` if transformers cannot read the config.json of a folder."""
    try:
        AutoConfig.from_pretrained(folder)
    except Exception as error:
        # A value of a wrong type can cause an error of any type.
        message = " ".join(str(error).split())
        raise InputError(
            f"{folder / 'config.json'}: no configuration of a model can be read "
            f"({type(error).__name__}: {message}); copy config.json of the model again"
        ) from None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder, which pads with its end-of-sequence token.

    Raises:
        InputError: the tokenizer cannot be read, or has no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        # A broken file can cause an error of any type: the tokenizers library raises Exception.
        raise InputError(
            f"{folder}: no tokenizer can be read there ({type(error).__name__}: {error}); copy "
            "tokenizer.json and tokenizer_config.json of the model into it again"
        ) from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"{folder}: its tokenizer has no end-of-sequence token (eos_token)")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(folder: Path, device: torch.device, parameters: int | None = None) -> PreTrainedModel:
    """Return a causal language model in Hugging Face format, in float32 and evaluation mode.

    Only safetensors are read, and no code of the model's author is run.

    Args:
        folder: holds the model.
        device: to which the model is moved.
        parameters: expected number of parameters, if known.

    Raises:
        InputError: names the folder and the fault.
    """
    model = _from_pretrained(folder)
    count = model.num_parameters()
    if parameters is not None and count != parameters:
        raise InputError(
            f"{folder}: {count:,} parameters were loaded, and {parameters:,} are recorded; take "
            "out of the folder what does not belong to the model, such as an adapter"
        )
    loaded: PreTrainedModel = model.to(device).eval()
    stops = declared_stops(folder)
    loaded.generation_config.eos_token_id = stops if len(stops) > 1 else next(iter(stops), None)
    return loaded


def load_meta_model(folder: Path) -> PreTrainedModel:
    """Return the model of a folder on the meta device: all of its weights, without their values.

    transformers renames, merges and ties the weights as it does when it loads their values.

    Raises:
        InputError: the weights do not belong to config.json; names the folder and the fault.
    """
    model = _from_pretrained(folder, device_map="meta")
    for names in model.all_tied_weights_keys.items():
        # transformers ties two weights that are both in the files only if they are equal.
        tensors = _read_tensors(folder, names)
        if len(tensors) == 2 and not torch.equal(*tensors):
            raise InputError(
                f"{folder / 'config.json'}: tie_word_embeddings is true, but {' and '.join(names)} "
                "differ in the safetensors; set it to false, or copy config.json of the model again"
            )
    model.tie_weights()
    return model


def _read_tensors(folder: Path, names: Iterable[str]) -> list[torch.Tensor]:
    """Return those of the named weights that the files of a model have."""
    tensors: list[torch.Tensor] = []
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            tensors += [file.get_tensor(name) for name in set(names) & set(file.keys())]
    return tensors


def _from_pretrained(folder: Path, **options: Any) -> PreTrainedModel:
    """Return a model in float32, after checking that its weights belong to config.json.

    transformers would initialize missing weights at random and ignore additional ones.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # They are reported below.
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        message = " ".join(str(error).split())
        raise InputError(
            f"{folder}: no causal language model can be read ({message}); {COMPLETE_MODEL}"
        ) from None
    config = folder / "config.json"
    if info["mismatched_keys"]:
        (name, actual, expected), *others = sorted(info["mismatched_keys"])
        raise InputError(
            f"{config}: asks for the weight {name} of shape {_product(expected)}, but it has "
            f"{_product(actual)} in the safetensors{_more(others)}; {COMPLETE_MODEL}"
        )
    if info["missing_keys"]:
        name, *others = sorted(info["missing_keys"])
        raise InputError(
            f"{config}: asks for the weight {name}, which the safetensors lack{_more(others)}; "
            f"{COMPLETE_MODEL}"
        )
    if unused := _unused_block_weights(model, info["unexpected_keys"]):
        raise InputError(
            f"{config}: has no place for the weight {unused[0]} of the safetensors"
            f"{_more(unused[1:])}, so that another model would be loaded; {COMPLETE_MODEL}"
        )
    return model


BUFFER = re.compile(r"(inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)$")
"""Constants of the attention, which old files hold and models compute."""


def _unused_block_weights(model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """Return the weights of transformer blocks that the files hold and the model lacks.

    Other additional weights, such as a pooler or a vision tower, change no text.
    """
    numbered = (re.match(r"(.*?\.)\d+\.", name) for name, _ in model.named_parameters())
    stacks = {match[1] for match in numbered if match}
    # Files of a model without a head omit the prefix of the model.
    stacks |= {stack.removeprefix(f"{model.base_model_prefix}.") for stack in stacks}
    return sorted(
        key for key in unexpected if key.startswith(tuple(stacks)) and not BUFFER.search(key)
    )


COMPLETE_MODEL = "copy config.json and all safetensors from the same model"


def _product(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _more(names: Sequence[object]) -> str:
    return f" (and {len(names)} more)" if names else ""


CAUSALITY_CHECK_TOKENS = 16
MAX_RELATIVE_CHANGE = 3e-5
"""Largest change of earlier logits, relative to the largest logit, that is attributed to rounding.

The logits of causal models do not change on a CPU. Those of untrained encoders with small weights
change by 1e-4 and more.
"""


def check_finite(model: PreTrainedModel, folder: Path) -> None:
    """Raise `InputError` if a weight is not finite: every answer would be nonsense.

    Args:
        model: the model.
        folder: of the model, for the message.
    """
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise InputError(
                f"{folder}: the weight `{name}` has values that are not finite (NaN or infinite); "
                "fetch or export the model again"
            )


@torch.inference_mode()
def check_causal(model: PreTrainedModel, folder: Path) -> None:
    """Raise `InputError` if a model sees the tokens that it should predict.

    The check changes the last token of a row, which must not change the logits before it.

    Args:
        model: the model.
        folder: of the model, for the message.
    """
    config = text_config(model)
    context = getattr(config, "max_position_embeddings", None) or CAUSALITY_CHECK_TOKENS
    length, generator = min(CAUSALITY_CHECK_TOKENS, context), torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, length), generator=generator).repeat(4, 1)
    ids[:, -1] = (ids[:, -1] + torch.arange(4)) % config.vocab_size
    ids = ids.to(model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    earlier = logits[:, :-1].float()
    change, largest = (earlier - earlier[:1]).abs().max(), earlier.abs().max()
    if change > MAX_RELATIVE_CHANGE * largest:
        raise InputError(
            f"{folder}: the model sees the tokens that it should predict: another last token "
            f"changes what it predicts before it (by {change:.2g}, of logits up to {largest:.2g}); "
            "take a causal model, such as Llama or Qwen"
        )


def declared_stops(folder: Path) -> list[int]:
    """Return the tokens that end an answer by generation_config.json and config.json of a folder.

    The defaults of transformers' classes are ignored: they are ids of another tokenizer.
    """
    tokens: set[int] = set()
    for path in (folder / "generation_config.json", folder / "config.json"):
        try:
            config = read_foreign_json(path) if path.is_file() else {}
            for section in (config, config.get("text_config") or {}):
                tokens.update(eos_tokens(section.get("eos_token_id")))
        except (ValueError, TypeError, RecursionError, AttributeError):
            raise InputError(
                f"{path}: expected a JSON object in which `eos_token_id` is the id of a token, a "
                "list of them, or null"
            ) from None
    return sorted(tokens)


def eos_tokens(value: Any) -> list[int]:
    """Return the ids of an `eos_token_id`, which is an id, a list of ids or None."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in ids):
        raise TypeError(value)
    return ids


def check_stops(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `InputError` if the files of a model name ordinary text as the end of an answer."""
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    for token in declared_stops(folder):
        # The embedding may have more rows than the tokenizer has tokens; no text uses them.
        if token not in special and 0 <= token < len(tokenizer):
            raise InputError(
                f"{folder}: eos_token_id {token} of generation_config.json or config.json is the "
                f"text {tokenizer.convert_ids_to_tokens(token)!r} to the tokenizer, so that "
                "answers would be cut there; let both files name the token that ends an answer "
                f"({tokenizer.eos_token_id} is {tokenizer.eos_token})"
            )


def recompute_activations(model: PreTrainedModel) -> None:
    """Enable activation checkpointing: store each block's input and recompute the rest.

    It saves most of the memory that grows with the tokens of a micro-batch, for a third more
    arithmetic. The gradients are bit-identical, including with dropout.
    """
    try:
        model.activation_checkpointing_enable()
    except ValueError as error:
        raise InputError(f"training.activation_checkpointing: {error}") from None


def silence_libraries() -> None:
    """Keep progress bars and warnings of the libraries out of the logs."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # peft warns about patterns for AdaLoRA's ranks and for experts, whose names it resolves later.
    warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
    warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


PRETRAINED = "trained from scratch for this study"
"""Origin of a base model that a job of this study has trained."""


def read_base(record: Path) -> dict[str, Any]:
    """Return the record of the base model after verifying the digest of every file of the model.

    Raises:
        InputError: a file is damaged, missing or new; names the command that repairs it.
    """
    base: dict[str, Any] = read_json(record)
    folder = Path(base["path"])
    if difference := _first_difference(folder, base["files"]):
        path, fault = difference
        if base.get("downloaded"):
            remedy, effect = removal_command(folder, record), "the model is downloaded again"
        elif base["origin"] == PRETRAINED:
            remedy, effect = removal_command(record), "the base is trained again"
        else:
            raise InputError(
                f"{path} {fault}; put the recorded file back, or run `{removal_command(record)}` "
                "to take the model as it is now, then repeat the command"
            )
        raise damage_error(path, fault, remedy, effect)
    return base


def _first_difference(folder: Path, recorded: Mapping[str, str]) -> tuple[Path, str] | None:
    """Return the first file that differs from the record and its fault, or None."""
    present = {path.relative_to(folder).as_posix() for path in model_files(folder)}
    if missing := sorted(set(recorded) - present):
        return folder / missing[0], "is missing"
    if new := sorted(present - set(recorded)):
        return folder / new[0], "was not there when the base was recorded"
    for path, digest in sha256_of_each(folder / name for name in recorded).items():
        if digest != recorded[path.relative_to(folder).as_posix()]:
            return path, "differs from what was recorded of the base (sha256)"
    return None
