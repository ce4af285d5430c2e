"""Make a base model trainable as a method says: all of it, or an adapter on it."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import PreTrainedModel

from forgetting.models import Model
from forgetting.plan import Tuning
from forgetting.records import InputError


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
        adapted.start = {name: t.clone() for name, t in get_peft_model_state_dict(adapted).items()}
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


def trained_half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Of a converted tensor of PiSSA's, the half that was trained."""
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
