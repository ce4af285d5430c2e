"""Make a base model trainable as a method says: all of it, or an adapter on it."""

from __future__ import annotations

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import PreTrainedModel

from forgetting.models.loading import Model
from forgetting.records import InputError
from forgetting.settings.plan import Tuning


def attach(model: PreTrainedModel, tuning: Tuning, seed: int) -> Model:
    """Make `model` trainable as the method says: all of it, or a new adapter on it.

    The adapter's random half depends on the seed alone, so that the learning rates of a sweep start
    from the same point.
    """
    if tuning.kind == "full":
        model.requires_grad_(True)
        for embedding in _embeddings(model).values():
            embedding.requires_grad_(tuning.trains_embeddings)
        return model
    torch.manual_seed(seed)
    try:
        adapted = get_peft_model(model, _config(model, tuning))
    except (TypeError, ValueError) as error:
        raise InputError(f"methods: {tuning.name}: target_modules: {error}") from None
    _check_rank(adapted, tuning)
    if tuning.variant == "pissa":
        adapted.start = {
            name: tensor.clone()
            for name, tensor in get_peft_model_state_dict(adapted).items()
            if ".lora_" in name
        }
    return adapted


def _config(model: PreTrainedModel, tuning: Tuning) -> LoraConfig:
    embeddings = list(_embeddings(model)) if tuning.trains_embeddings else None
    shared = {
        "task_type": "CAUSAL_LM",
        "lora_alpha": tuning.alpha,
        "lora_dropout": tuning.dropout,
        "target_modules": _target_modules(model, tuning),
        "modules_to_save": embeddings,
        # Else peft would train one copy for the input and another for the head.
        "ensure_weight_tying": embeddings is not None and _is_tied(model),
        "bias": "none",
    }
    if tuning.budget:
        # The steps are known later, when `plan_budget` lays the budget over them.
        return AdaLoraConfig(
            target_r=tuning.rank,
            init_r=tuning.initial_rank,
            total_step=1,
            orth_reg_weight=tuning.budget.orthogonality,
            **shared,
        )
    return LoraConfig(
        r=tuning.rank,
        init_lora_weights="pissa" if tuning.variant == "pissa" else True,
        use_rslora=tuning.variant == "rslora",
        use_dora=tuning.variant == "dora",
        **shared,
    )


def _embeddings(model: Model) -> dict[str, nn.Module]:
    """The input embedding and the LM head, by name."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: m for name, m in model.named_modules() if any(m is end for end in ends)}


def _is_tied(model: Model) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def embedding_weights(model: Model) -> set[str]:
    """Names of the weights of the input embedding and of the LM head, trained copies of them."""
    weights = [module.weight for module in _embeddings(model).values()]
    return {name for name, p in model.named_parameters() if any(p is weight for weight in weights)}


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
        elif ".lora_B." in name:
            converted[name] = torch.cat([tensor, -start[name]], dim=1)
        else:
            converted[name] = tensor
    return converted


def trained_half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Of a converted tensor of PiSSA's, the half that was trained."""
    if ".lora_" not in name:
        return tensor
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
        plain = type(module) is LoraLinear and not any(module.use_dora.values())
        if plain or type(module) is SVDLinear:
            module.cast_input_dtype_enabled = False
            base = module.get_base_layer()
            base.weight.data = base.weight.data.to(precision)


def _check_rank(model: PeftModel, tuning: Tuning) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_A." in name and tuning.largest_rank is not None:
            inner = parameter.shape[1]
            outer = model.get_parameter(name.replace(".lora_A.", ".lora_B.")).shape[0]
            if tuning.largest_rank > min(inner, outer):
                what = "initial rank" if tuning.budget else "rank"
                raise InputError(
                    f"methods: {tuning.name}: {what} {tuning.largest_rank} is larger than the "
                    f"matrix of {name.split('.lora_A.')[0]}, {outer} x {inner}"
                )
