"""Load a base model, attach an adapter, save and restore what is trained."""

from __future__ import annotations

import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import Linear as LoraLinear
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from forgetting.plan import Tuning
from forgetting.records import InputError

Model: TypeAlias = PreTrainedModel | PeftModel
"""A model that can be measured: plain, or with an adapter."""

ADAPTER = "adapter_model.safetensors"
WEIGHTS = "model.safetensors"


def pick_device() -> torch.device:
    """The first GPU where there is one, else the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_precision(wanted: str, device: torch.device) -> torch.dtype:
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


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; it needs an end-of-sequence token, which also pads."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no tokenizer can be read there ({error})") from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"{folder}: its tokenizer has no end-of-sequence token (eos_token)")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(folder: Path, device: torch.device) -> PreTrainedModel:
    """A causal language model in Hugging Face form, with float32 weights, in evaluation mode.

    Only safetensors are read and no code of the model's author is run.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no causal language model can be read ({error})") from None
    return model.to(device).eval()


def attach(model: PreTrainedModel, tuning: Tuning, seed: int) -> Model:
    """Make `model` trainable as the method says: all of it, or a new adapter on it.

    The adapter's random half depends on the seed alone, so that the learning rates of a sweep start
    from the same point.
    """
    if tuning.kind == "full":
        return model.requires_grad_(True)
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=_target_modules(model, tuning),
        init_lora_weights="pissa" if tuning.variant == "pissa" else True,
        use_rslora=tuning.variant == "rslora",
        use_dora=tuning.variant == "dora",
        bias="none",
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"methods: {tuning.name}: target_modules: {error}") from None
    _check_rank(adapted, tuning)
    if tuning.variant == "pissa":
        adapted.start = {name: t.clone() for name, t in trained_state(adapted).items()}
    return adapted


def _target_modules(model: PreTrainedModel, tuning: Tuning) -> str | list[str]:
    """Names for peft; `attention` and `mlp` are the linear layers in modules so called."""
    parts = {"attention": {"self_attn", "attn", "attention"}, "mlp": {"mlp", "feed_forward"}}
    if isinstance(tuning.target_modules, list) or tuning.target_modules not in parts:
        return tuning.target_modules
    wanted = parts[tuning.target_modules]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [name for name in linear if wanted & set(name.split("."))]
    if not found:
        ends = sorted({name.split(".")[-1] for name in linear})
        raise InputError(
            f"methods: {tuning.name}: target_modules: this architecture has no part called "
            f"{tuning.target_modules}; name its linear layers, of {', '.join(ends)}"
        )
    return found


def convert_pissa(
    start: dict[str, torch.Tensor], trained: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The adapter of twice the rank that does to the base what PiSSA's has done.

    PiSSA (Meng et al. 2024, arXiv 2404.02948) puts W - s B0 A0 in the place of W, so that the
    update of W is s (B A - B0 A0) = s [B, -B0] [A; A0]. The first half of the rank is the trained
    one, from which a run goes on.
    """
    converted = {}
    for name, tensor in trained.items():
        if ".lora_A." in name:
            converted[name] = torch.cat([tensor, start[name]], dim=0)
        else:
            converted[name] = torch.cat([tensor, -start[name]], dim=1)
    return converted


def _trained_half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.chunk(2, dim=0 if ".lora_A." in name else 1)[0].contiguous()


def round_frozen(model: Model, precision: torch.dtype) -> None:
    """Store the frozen matrices under LoRA in the arithmetic's precision, once and for all.

    Autocast would round them to bfloat16 at every forward pass, and peft would widen every input to
    the adapter's float32 first: the numbers are the same bit by bit, without the copies and with
    half the memory. Trained weights, embeddings (also as a tied LM head) and norms stay float32;
    DoRA, which takes norms of the frozen weights, is left alone.
    """
    if precision == torch.float32 or not isinstance(model, PeftModel):
        return
    for module in model.modules():
        if type(module) is LoraLinear and not any(module.use_dora.values()):
            module.cast_input_dtype_enabled = False
            base = module.get_base_layer()
            base.weight.data = base.weight.data.to(precision)


def recompute_activations(model: Model) -> None:
    """Keep only what enters each block, and compute the rest again in the backward pass.

    Saves most of the memory that grows with the tokens of a pass, for a third more arithmetic; the
    gradients are the same bit by bit, dropout included.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        inner.activation_checkpointing_enable()
    except ValueError as error:
        raise InputError(f"training.activation_checkpointing: {error}") from None


def _check_rank(model: PeftModel, tuning: Tuning) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_A." in name and tuning.rank is not None:
            inner = parameter.shape[1]
            outer = model.get_parameter(name.replace(".lora_A.", ".lora_B.")).shape[0]
            if tuning.rank > min(inner, outer):
                raise InputError(
                    f"methods: {tuning.name}: rank {tuning.rank} is larger than the matrix of "
                    f"{name.split('.lora_A.')[0]}, {outer} x {inner}"
                )


def trained_state(model: Model) -> dict[str, torch.Tensor]:
    """What training changes: the adapter in peft's names, or all weights."""
    if isinstance(model, PeftModel):
        return dict(get_peft_model_state_dict(model))
    return dict(model.state_dict())


def save_checkpoint(model: Model, folder: Path) -> None:
    """Write an adapter in peft's format, or a whole model in Hugging Face's."""
    if isinstance(model, PeftModel):
        folder.mkdir(parents=True, exist_ok=True)
        state, config = trained_state(model), model.peft_config["default"]
        if config.init_lora_weights == "pissa":
            state = convert_pissa(model.start, state)
            double = {"r": 2 * config.r, "lora_alpha": 2 * config.lora_alpha}
            config = replace(config, **double, init_lora_weights=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_tensors(tensors, folder / ADAPTER)
        config.save_pretrained(str(folder))
    else:
        model.save_pretrained(folder)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors as safetensors; a full disk is told in one sentence."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise InputError(f"{path}: not written: {error}") from None


def restore_checkpoint(model: Model, folder: Path) -> None:
    """Put the weights of a checkpoint back into the model that they came from."""
    if isinstance(model, PeftModel):
        state = load_file(folder / ADAPTER)
        if model.peft_config["default"].init_lora_weights == "pissa":
            state = {name: _trained_half(name, tensor) for name, tensor in state.items()}
        set_peft_model_state_dict(model, state)
        return
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(shard)
    # Tied weights are stored once, so some names may be missing; none may be unknown.
    unknown = model.load_state_dict(tensors, strict=False).unexpected_keys
    if unknown:
        raise InputError(f"{folder}: not a checkpoint of this model ({unknown[0]})")


def load_checkpoint(base: Path, checkpoint: Path, device: torch.device) -> Model:
    """A tuned model from disk, for measuring: the base with an adapter, or the full weights."""
    if not (checkpoint / ADAPTER).exists():
        return load_base(checkpoint, device)
    model = load_base(base, device)
    return PeftModel.from_pretrained(model, checkpoint).eval()


def quieten_libraries() -> None:
    """Keep progress bars and advice of the libraries out of the logs."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
