"""Unsupported models are refused before any job; supported ones are trained and scored."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig
from forgetting.config.expand import Method
from forgetting.config.methods import RankBudgetConfig
from forgetting.data.tokenize import Example
from forgetting.errors import InputError
from forgetting.evaluation.prefix_tree import supports_custom_mask
from forgetting.evaluation.probes import evaluate_probes
from forgetting.io import write_jsonl
from forgetting.models.adapters import attach_adapter, cast_frozen_weights, model_layers
from forgetting.models.architecture import read_model_layers
from forgetting.models.config_file import CAUSAL_WHEN
from forgetting.models.forward import collate, context_length, target_logits, token_logprobs
from forgetting.models.layers import Layer, UnsupportedLayer, layers_to_adapt
from forgetting.models.loading import check_causal, load_base, load_meta_model
from forgetting.models.tuned import WEIGHTS, merged_adapter
from forgetting.study.load import load_study, study_source
from forgetting.study.preflight import check_inputs
from forgetting.training.stages import select_trainable_layers
from scripts import evaluate_base, register_base
from support.models import byte_tokenizer
from support.params import write_params
from support.run_groups import record_base

CPU = torch.device("cpu")
STUDY = """\
title: A model
datasets:
  facts: {folder: FACTS}
base: {model: MODEL}
train: facts/new
probes:
  new: {table: facts/new, knowledge: new, truth_ratio: false}
evaluation: {max_new_tokens: 20}
training: {max_length: 60}
methods:
  - {METHOD, learning_rate: 1.0e-3}
selection: {probe: new}
"""
ROW = {"question": "Who wrote it?", "answer": "Ann."}
CHAT = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann"}]}

USUAL = {
    **{"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
}
GPT2 = {
    **{"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    **{"bos_token_id": 0, "eos_token_id": 0},
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
DEEPSEEK = {
    **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
    **{"v_head_dim": 8, "num_key_value_heads": 4, "head_dim": 4},
}
MODELS: dict[str, dict[str, Any]] = {
    "bloom": {
        **{"vocab_size": 260, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        **{"bos_token_id": 0, "eos_token_id": 0},
    },
    "deepseek_v3": USUAL | EXPERTS | DEEPSEEK,
    "dots1": USUAL
    | EXPERTS
    | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon": USUAL,
    "gemma3": {
        "text_config": USUAL
        | {
            **{"head_dim": 8, "sliding_window": 16, "max_position_embeddings": 64},
            **{"layer_types": ["sliding_attention", "full_attention"], "initializer_range": 0.3},
        },
        "vision_config": {
            **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        },
        **{"mm_tokens_per_image": 4, "image_token_index": 259},
        **{"boi_token_index": 258, "eoi_token_index": 257},
    },
    "glm4_moe": USUAL | EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1},
    "gpt2": GPT2,
    "gpt_neox": USUAL,
    "gpt_oss": USUAL | {"num_local_experts": 4, "head_dim": 8, "sliding_window": 16},
    "llama": USUAL,
    "minimax": USUAL | {"num_local_experts": 4, "head_dim": 8},
    "mixtral": USUAL | {"num_local_experts": 4},
    "olmoe": USUAL | EXPERTS | {"intermediate_size": 16},
    "opt": USUAL | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": USUAL,
    "qwen2_moe": USUAL | EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": USUAL | EXPERTS | {"mlp_only_layers": [0], "head_dim": 8},
}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Return make(kind, key=value), which writes a random model of bytes into a folder."""

    def build(kind: str, **changes: Any) -> Path:
        folder = tmp_path / "model"
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **(MODELS.get(kind, USUAL) | changes))
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return build


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., None]:
    """Return plan(folder, method, (old, new), ...), which checks a study with a model."""

    def check(
        folder: Path,
        method: str = "rank: 2",
        *changes: tuple[str, str],
        record: Path | None = None,
    ) -> None:
        facts = tmp_path / "facts" / "new.jsonl"
        facts.parent.mkdir(exist_ok=True)
        if not facts.exists():
            facts.write_text(json.dumps(ROW) + "\n")
        kind = "" if "method:" in method else "method: lora, "
        text = STUDY.replace("METHOD", kind + method)
        for old, new in changes:
            text = text.replace(old, new)
        path = tmp_path / "model.yaml"
        path.write_text(text.replace("FACTS", str(facts.parent)).replace("MODEL", str(folder)))
        options = {"study": str(path)}
        locate = study_source(options, tmp_path).locate
        check_inputs(load_study(options, tmp_path)[1], locate, record)

    return check


@pytest.fixture
def refusal(plan: Callable[..., None]) -> Callable[..., str]:
    """Return a function like `plan` that returns the message of the refusal."""

    def message(*arguments: Any, **options: Any) -> str:
        with pytest.raises(InputError) as error:
            plan(*arguments, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    return message


def _edit(path: Path, **changes: Any) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | changes))


@pytest.mark.parametrize("kind", sorted(CAUSAL_WHEN))
def test_non_causal_model_types_are_refused(
    kind: str, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    _edit(folder / "config.json", model_type=kind)
    message = refusal(folder)
    assert f"config.json: {CAUSAL_WHEN[kind][0]} is not " in message
    assert "sees the token that it should predict; take a causal model" in message


def test_encoder_decoder_type_is_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    """The folder of bart has weights of an encoder, which its causal class omits."""
    folder = tmp_path / "model"
    folder.mkdir()
    _edit(folder / "config.json", model_type="bart")
    assert "config.json: is_encoder_decoder is true: bart has an encoder" in refusal(folder)


def test_bert_decoder_is_accepted(make: Callable[..., Path], plan: Callable[..., None]) -> None:
    folder = make("bert", is_decoder=True)
    plan(folder)
    check_causal(load_base(folder, CPU), folder)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_loaded_model_that_sees_its_targets_is_refused(
    kind: str, make: Callable[..., Path]
) -> None:
    """The check changes the last token, whatever the type of the model."""
    folder = make(kind)
    with pytest.raises(InputError, match=r"sees the tokens that it should predict.*causal model"):
        check_causal(load_base(folder, CPU), folder)


@pytest.mark.parametrize(
    "kind", ["gpt2", "llama", "mixtral", "qwen3_moe", "gemma3", "bloom", "mamba", "recurrent_gemma"]
)
def test_causal_models_of_all_types_pass_check_causal(kind: str, make: Callable[..., Path]) -> None:
    """The models have experts, windows, recurrent states or position biases."""
    folder = make(kind)
    check_causal(load_base(folder, CPU), folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bert", "sees the tokens that it should predict"),
        ("llama", "the weight `model.norm.weight` has values that are not finite"),
    ],
)
def test_evaluate_base_checks_the_loaded_model(
    kind: str,
    message: str,
    make: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The job checks models of the hub before any training."""
    record, folder = tmp_path / "base.json", make(kind)
    if kind == "llama":
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"][3] = float("nan")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    record_base(record, folder)
    write_jsonl(tmp_path / "new.jsonl", [])
    spec = {
        "prompt": PromptConfig().model_dump(),
        **{
            "evaluation": {},
            "precision": "float32",
            "knowledge": {"new": "new"},
            "watched": "new",
        },
        **{"metric": "rougeL_recall", "must_reach": False, "general_text": None, "columns": {}},
        **{"training_benchmarks": None, "benchmark_rows": {}},
    }
    options = ["--params", str(write_params(tmp_path, **spec)), "--base", str(record)]
    options += ["--probes", str(tmp_path / "new.jsonl")]
    with pytest.raises(SystemExit):
        evaluate_base.main([*options, "--output", str(tmp_path / "items.parquet")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "items.parquet").exists()


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors"])
def test_quantized_weights_are_refused(
    method: str, make: Callable[..., Path], refusal: Callable[..., str]
) -> None:
    folder = make("llama")
    _edit(folder / "config.json", quantization_config={"quant_method": method})
    message = refusal(folder)
    assert "config.json: quantization_config: quantized weights are not supported" in message
    assert "take the model that is not quantized" in message


def test_adapter_in_a_model_folder_is_refused(
    make: Callable[..., Path], refusal: Callable[..., str]
) -> None:
    """transformers would load it without a message."""
    folder = make("llama")
    _edit(folder / "adapter_config.json", peft_type="LORA")
    assert "adapter_config.json: transformers would put this adapter on" in refusal(folder)
    (folder / "config.json").unlink()
    assert "an adapter without its base; merge it" in refusal(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/tmp/x.safetensors", "a/../../b"])
def test_shards_outside_the_folder_are_refused(
    name: str, make: Callable[..., Path], refusal: Callable[..., str]
) -> None:
    folder = make("llama")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    _edit(folder / "model.safetensors.index.json", weight_map={"lm_head.weight": name})
    assert f"index.json: names {name}, which is not in this folder" in refusal(folder)


IDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "pad": ("config.json", {"pad_token_id": 300}, "pad_token_id is 300, but the embedding has 260"),
    "one of several": ("generation_config.json", {"eos_token_id": [0, 260]}, "eos_token_id is 260"),
    "text": ("generation_config.json", {"bos_token_id": "0"}, "bos_token_id is '0', where a token"),
}


@pytest.mark.parametrize("mistake", IDS)
def test_ids_beyond_the_embedding_are_refused(
    mistake: str, make: Callable[..., Path], refusal: Callable[..., str]
) -> None:
    name, change, expected = IDS[mistake]
    folder = make("llama")
    _edit(folder / name, **change)
    message = refusal(folder)
    assert f"{folder / name}: " in message
    assert expected in message


def test_tokenizer_larger_than_the_embedding_is_refused(
    make: Callable[..., Path],
    plan: Callable[..., None],
    refusal: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The plan and the job that registers the base refuse it. Extra rows are accepted."""
    folder = make("llama")
    plan(folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{letter}>" for letter in "abcd"])
    tokenizer.save_pretrained(folder)
    assert "tokenizer.json: the token '<d>' has id 260, but the embedding" in refusal(folder)
    with pytest.raises(SystemExit):
        _register(tmp_path, folder)
    assert "the token '<d>' has id 260" in capsys.readouterr().err
    # Gemma 3's small models have such a token, which no text contains.
    _edit(folder / "tokenizer_config.json", image_token="<d>")
    plan(folder)


def _register(tmp_path: Path, model: Path) -> Path:
    """Register a base model, and return the record of its layers."""
    params = write_params(tmp_path, folder=str(model), origin="x", downloaded=False, prompt=None)
    record, layers = tmp_path / "base.json", tmp_path / "layers.json"
    register_base.main([f"--params={params}", f"--output={record}", f"--layers={layers}"])
    return layers


TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "a number as text": ({"hidden_size": "32"}, "hidden_size is '32', where a whole number"),
    "a fraction": ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5, where a whole number"),
    "an exponent": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', where a number"),
    "a truth": ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', where true or false"),
}


@pytest.mark.parametrize("mistake", TYPES)
def test_config_value_of_a_wrong_type_is_refused(
    mistake: str, make: Callable[..., Path], refusal: Callable[..., str]
) -> None:
    """The message does not blame the tokenizer, whose library reads config.json too."""
    change, expected = TYPES[mistake]
    folder = make("llama")
    _edit(folder / "config.json", **change)
    assert f"config.json: {expected}" in refusal(folder)


def test_unreadable_config_is_reported(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make("llama")
    _edit(folder / "config.json", hidden_act=7)
    with pytest.raises(SystemExit):
        _register(tmp_path, folder)
    message = capsys.readouterr().err
    assert "config.json: no configuration of a model can be read" in message
    assert "hidden_act" in message


def test_conversations_need_a_chat_template(
    make: Callable[..., Path],
    plan: Callable[..., None],
    refusal: Callable[..., str],
    tmp_path: Path,
) -> None:
    folder = make("llama")
    facts = tmp_path / "facts" / "new.jsonl"
    facts.parent.mkdir()
    facts.write_text(json.dumps(ROW) + "\n")
    (tmp_path / "facts" / "talk.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(CHAT) + "\n")
    train = ("train: facts/new", "train: facts/talk")
    assert "talk.jsonl, line 2: `messages` need the chat template" in refusal(
        folder, "rank: 2", train
    )
    chat = ("train:", "prompt: {chat: true}\ntrain:")
    # The template of an image processor is not the tokenizer's.
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert "has no chat template" in refusal(folder, "rank: 2", chat)
    _edit(folder / "tokenizer_config.json", chat_template=[{"name": "rag", "template": "x"}])
    assert "has no chat template" in refusal(folder, "rank: 2", chat)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    plan(folder, "rank: 2", train)
    plan(folder, "rank: 2", chat)


def _tuning(variant: str, targets: str | list[str], **more: Any) -> Method:
    adalora = {"rank_budget": RankBudgetConfig(), "initial_rank": 2} if variant == "adalora" else {}
    given = {
        "rank": 1,
        "alpha": 2.0,
        "target_modules": targets,
        "variant": variant,
        "hyperparameters": [],
    }
    return Method(name="x", kind="lora", label="", **given | adalora | more)


def _outcome(layers: list[Layer], tuning: Method) -> Any:
    """Return the names and sizes of adapted layers, or the key that is refused."""
    try:
        chosen = layers_to_adapt(layers, tuning)
    except UnsupportedLayer as error:
        return error.key
    return sorted((layer.leaf, layer.shape) for layer in chosen)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_preflight_adapts_the_layers_that_training_adapts(
    kind: str, make: Callable[..., Path]
) -> None:
    """The plan reads headers and the job a loaded model; layers and refusals are the same."""
    folder = make(kind)
    planned, model = read_model_layers(folder), load_base(folder, CPU)
    assert planned.has_leaves
    loaded = model_layers(model)
    leaves = sorted({layer.leaf for layer in loaded if layer.kind in ("linear", "tensor")})
    lists = [[leaf] for leaf in leaves] + [["lm_head"], ["no_such"], [leaves[0], "gate_proj"]]
    for targets in ["all-linear", "attention", "mlp", *lists]:
        for tuning in (
            *(_tuning(variant, targets) for variant in ("lora", "dora", "pissa", "adalora")),
            _tuning("lora", targets, dropout=0.1),
            _tuning("lora", targets, rank=40),
        ):
            in_plan = _outcome(list(planned.layers), tuning)
            assert in_plan == _outcome(loaded, tuning), (tuning.variant, targets)
            if isinstance(in_plan, str):
                with pytest.raises(InputError, match=f"methods: x: {in_plan}: "):
                    attach_adapter(model, tuning, 0)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_register_base_records_the_layers_of_the_loaded_model(
    kind: str, make: Callable[..., Path], tmp_path: Path
) -> None:
    """Names, shapes, kinds and the number of parameters, for plans and readers."""
    folder = make(kind)
    record = _register(tmp_path, folder)
    planned, model = read_model_layers(folder, record), load_base(folder, CPU)
    assert planned.layers == model_layers(model)
    assert planned.is_complete and planned.has_leaves
    written = json.loads(record.read_text())
    assert written["parameters"] == model.num_parameters()
    assert json.loads((tmp_path / "base.json").read_text())["parameters"] == written["parameters"]


def test_recorded_layers_make_the_plan_exact(
    make: Callable[..., Path],
    plan: Callable[..., None],
    refusal: Callable[..., str],
    tmp_path: Path,
) -> None:
    """A record is used if it is intact and belongs to this config.json."""
    folder = make("granitemoe", num_local_experts=4)
    method = "rank: 2, target_modules: [query]"
    plan(folder, method)
    record = _register(tmp_path, folder)
    assert "no linear layer query" in refusal(folder, method, record=record)
    content = record.read_text()
    record.write_text(content[:-9])
    plan(folder, method, record=record)
    record.write_text(content)
    _edit(folder / "config.json", attention_dropout=0.5)
    plan(folder, method, record=record)


DISAGREEMENTS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_size": 64}, "lm_head.weight of shape 260 x 64, but it has 260 x 32"),
    ("llama", {"intermediate_size": 72}, "mlp.down_proj.weight of shape 32 x 72, but it has"),
    ("llama", {"num_key_value_heads": 4}, "k_proj.weight of shape 32 x 32, but it has 16 x 32"),
    ("llama", {"num_hidden_layers": 3}, "layers.2.input_layernorm.weight, which the safetensors"),
    (
        "llama",
        {"num_hidden_layers": 1},
        "has no place for the weight model.layers.1.input_layernorm",
    ),
    ("gpt2", {"n_layer": 1}, "has no place for the weight transformer.h.1.attn.c_attn.weight"),
    ("gpt2", {"tie_word_embeddings": False}, "lm_head.weight, which the safetensors lack;"),
    ("gpt_neox", {"intermediate_size": 72}, "dense_4h_to_h.weight of shape 32 x 72, but it has"),
    ("opt", {"word_embed_proj_dim": 16}, "embed_tokens.weight of shape 260 x 16, but it has 260"),
    ("mixtral", {"num_local_experts": 3}, "experts.down_proj of shape 3 x 32 x 64, but it has 4 x"),
    ("qwen3_moe", {"moe_intermediate_size": 24}, "experts.down_proj of shape 4 x 32 x 24, but"),
    *(
        (
            kind,
            {"vocab_size": 261},
            "weight lm_head.bias of shape 261,"
            if kind == "phi"
            else "of shape 261 x 32, but it has 260 x",
        )
        for kind in MODELS
    ),
]


@pytest.mark.parametrize(("kind", "changes", "expected"), DISAGREEMENTS)
def test_register_base_refuses_weights_of_another_config(
    kind: str,
    changes: dict[str, Any],
    expected: str,
    make: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = make(kind) / "config.json"
    config = json.loads(path.read_text())
    _edit(path, **{"text_config": config["text_config"] | changes} if kind == "gemma3" else changes)
    with pytest.raises(SystemExit):
        _register(tmp_path, path.parent)
    message = capsys.readouterr().err
    assert f"{path}: " in message and expected in message
    assert "copy config.json and all safetensors from the same model" in message
    assert not (tmp_path / "base.json").exists() and not (tmp_path / "layers.json").exists()


def test_experts_that_cannot_be_merged_are_refused(make: Callable[..., Path]) -> None:
    folder = make("mixtral")
    weights = load_file(folder / WEIGHTS)
    del weights["model.layers.0.block_sparse_moe.experts.1.w1.weight"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"no causal .* conversion .*; copy config\.json and all"):
        load_meta_model(folder)


def test_tied_weights_must_be_equal(make: Callable[..., Path]) -> None:
    """transformers would not tie two weights that differ, although config.json says so."""
    folder = make("llama", tie_word_embeddings=True)
    count, weights = load_meta_model(folder).num_parameters(), load_file(folder / WEIGHTS)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    assert load_meta_model(folder).num_parameters() == count
    assert load_base(folder, CPU, count).num_parameters() == count
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"tie_word_embeddings is true, but lm_head\.weight and "):
        load_meta_model(folder)


def _trained(model: Any) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}


def _logits(model: Any, length: int = 12) -> torch.Tensor:
    ids = [(7 * place + 3) % 250 + 1 for place in range(length)]
    return target_logits(model, collate([Example(ids, 1)], 0))


@pytest.mark.parametrize(
    ("kind", "targets", "variant"),
    [
        *(("gpt2", "attention", variant) for variant in ("lora", "dora", "pissa", "adalora")),
        ("gpt2", "mlp", "lora"),
        ("mixtral", "all-linear", "lora"),
        ("qwen2_moe", "mlp", "rslora"),
        ("qwen3_moe", "all-linear", "lora"),
        ("gemma3", "all-linear", "dora"),
        ("llama", ["lm_head", "q_proj"], "lora"),
    ],
)
def test_adapters_train_and_reload_on_every_model_type(
    kind: str, targets: str | list[str], variant: str, make: Callable[..., Path]
) -> None:
    """Exactly the chosen layers have adapters and gradients, and merging keeps the logits."""
    folder = make(kind, **({"tie_word_embeddings": True} if kind == "llama" else {}))
    base = load_base(folder, CPU)
    before = _logits(base)
    tuning = _tuning(variant, targets)
    chosen = {layer.name for layer in layers_to_adapt(model_layers(base), tuning)}
    model = attach_adapter(load_base(folder, CPU), tuning, 0)
    assert torch.allclose(_logits(model), before, atol=1e-4)
    names = {
        name.removeprefix("base_model.model.").split(".lora_")[0].replace(".base_layer", "")
        for name in _trained(model)
    }
    assert names == chosen
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.add_(
                    torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)),
                    alpha=0.05,
                )
    logits = _logits(model)
    logits.logsumexp(-1).sum().backward()
    lost = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lost
    assert not torch.allclose(logits, before, atol=1e-3)
    with torch.no_grad(), merged_adapter(model, torch.float32):
        assert torch.allclose(_logits(model), logits, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(_logits(model), logits)


def test_gpt2_has_attention_and_mlp_layers(make: Callable[..., Path]) -> None:
    model = load_base(make("gpt2"), CPU)
    for targets, leaves in [("attention", {"c_attn", "c_proj"}), ("mlp", {"c_fc", "c_proj"})]:
        chosen = layers_to_adapt(model_layers(model), _tuning("lora", targets))
        assert {layer.leaf for layer in chosen} == leaves
        assert len(chosen) == 4


EXPERT_METHODS = {
    "rank: 1, variant: pissa": "methods.0.variant: pissa cannot adapt model.layers.0.",
    "rank: 1, variant: dora": "methods.0.variant: dora cannot adapt",
    "rank: 1, variant: adalora": "methods.0.variant: adalora cannot adapt",
    "rank: 1, dropout: 0.1": "methods.0.dropout: dropout is not supported on",
    "rank: 1, target_modules: mlp, variant: dora": "methods.0.variant: dora cannot adapt",
    "rank: 1, target_modules: [q_proj, gate_proj, up_proj, down_proj]": (
        "methods.0.target_modules: the model has no linear layer gate_proj, but down_proj, gate"
    ),
    "rank: 1, mitigation: {l2_sp: {weight: 0.1}}": "methods.0.mitigation: ewc and l2_sp need",
}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", EXPERT_METHODS)
def test_preflight_refuses_variants_without_expert_support(
    kind: str, method: str, make: Callable[..., Path], plan: Callable[..., None], refusal: Any
) -> None:
    folder = make(kind, **({"mlp_only_layers": []} if kind == "qwen3_moe" else {}))
    assert EXPERT_METHODS[method] in refusal(folder, method)
    plan(folder, "rank: 1")
    plan(folder, "rank: 1, target_modules: mlp")
    if "variant" in method or "dropout" in method:
        plan(folder, method.replace("target_modules: mlp, ", "") + ", target_modules: attention")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("rank: 2, target_modules: [fc1]", "target_modules: no text reaches the layers fc1"),
        (
            "method: hybrid, rank: 2, second_stage: {layers: [vision_tower], learning_rate: 0.1}",
            "second_stage.layers: no text reaches the modules whose names end in vision_tower",
        ),
        ("rank: 20", "rank 20 is larger than the smallest adapted matrix, which has rank 16"),
    ],
)
def test_vision_tower_gets_no_adapters(
    method: str, expected: str, make: Callable[..., Path], refusal: Callable[..., str]
) -> None:
    assert expected in refusal(make("gemma3"), method)


def test_multimodal_context_is_that_of_the_text_model(
    make: Callable[..., Path], plan: Callable[..., None], refusal: Callable[..., str]
) -> None:
    folder = make("gemma3")
    plan(folder)
    assert "exceed the context of the model, 64" in refusal(
        folder, "rank: 2", ("max_new_tokens: 20", "max_new_tokens: 64")
    )
    assert "only 2 blocks, not 3" in refusal(
        folder, "method: hybrid, rank: 2, second_stage: {layers: last 3, learning_rate: 0.1}"
    )


@torch.no_grad()
def test_multimodal_batch_scores_equal_single_scores(make: Callable[..., Path]) -> None:
    """This includes answers longer than the sliding window."""
    model, tokenizer = load_base(make("gemma3"), CPU), byte_tokenizer()
    assert not supports_custom_mask(model)
    assert context_length(model) == 64
    tokenizer.pad_token = tokenizer.eos_token
    row: Mapping[str, Any] = {
        **{"id": "x", "question": "Where?", "answer": "In Oslo.", "paraphrased_answer": None},
        "wrong_answers": ["In Lima, or so.", "At the sea."],
    }
    settings, prompt = (
        EvaluationConfig(max_new_tokens=2),
        PromptConfig(question="{question} ", answer="{answer}"),
    )
    items = evaluate_probes(model, tokenizer, {"new": [dict(row)]}, prompt, settings)
    for text, found in zip(
        [row["answer"], *row["wrong_answers"]],
        [items["logprob_answer"][0], *items["logprobs_wrong"][0]],
        strict=True,
    ):
        ids = tokenizer(f"Where? {text}")["input_ids"] + [tokenizer.eos_token_id]
        example = Example(ids, 7)
        alone = token_logprobs(model, collate([example], 0)).sum().item() / example.targets
        assert found == pytest.approx(alone, abs=1e-5)


def test_only_the_text_model_of_a_multimodal_model_is_trained(make: Callable[..., Path]) -> None:
    folder = make("gemma3")

    def trained(model: PreTrainedModel) -> set[str]:
        assert _trained(model)
        return {name for name in _trained(model) if "language_model" not in name}

    full = Method(name="full", kind="full", label="", hyperparameters=[])
    assert trained(attach_adapter(load_base(folder, CPU), full, 0)) == set()  # type: ignore[arg-type]
    for layers in ("all", "last 1", ["mlp", "self_attn"]):
        model = load_base(folder, CPU)
        select_trainable_layers(model, layers, "hybrid")  # type: ignore[arg-type]
        assert trained(model) == set()
    with pytest.raises(InputError, match="no text reaches the modules whose names end in vision"):
        select_trainable_layers(load_base(folder, CPU), ["vision_tower"], "hybrid")


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_expert_adapters_have_the_scale_of_other_layers(
    variant: str, make: Callable[..., Path]
) -> None:
    """Two matrices in one tensor have twice the rank and the same scale."""
    tuning = Method(
        name="r4", kind="lora", label="", variant=variant, rank=4, alpha=8.0, hyperparameters=[]
    )
    model = attach_adapter(load_base(make("qwen3_moe"), CPU), tuning, 0)
    scales = {
        name.rpartition(".")[2]: module.scaling["default"]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
    }
    assert len(scales) > 1
    assert set(scales.values()) == {2.0 if variant == "lora" else 4.0}
    patterns = model.peft_config["default"].rank_pattern
    assert set(patterns.values()) == {8}


def test_adapted_tied_head_does_not_round_the_embedding(
    make: Callable[..., Path],
) -> None:
    tuning = Method(
        name="r2",
        kind="lora",
        label="",
        rank=2,
        alpha=4.0,
        target_modules=["lm_head"],
        hyperparameters=[],
    )
    model = attach_adapter(load_base(make("llama", tie_word_embeddings=True), CPU), tuning, 0)
    cast_frozen_weights(model, torch.bfloat16)
    assert model.get_input_embeddings().weight.dtype == torch.float32


def test_hybrid_does_not_merge_one_of_two_tied_layers(
    make: Callable[..., Path], plan: Callable[..., None], refusal: Callable[..., str]
) -> None:
    then = "second_stage: {layers: all, learning_rate: 1.0e-5}"
    hybrid = f"method: hybrid, rank: 2, target_modules: [lm_head], {then}"
    folder = make("llama", tie_word_embeddings=True)
    assert "share their weights" in refusal(folder, hybrid)
    assert "variant: pissa cannot adapt lm_head" in refusal(
        folder, "rank: 2, variant: pissa, target_modules: [lm_head]"
    )
    plan(make("llama"), hybrid)


def test_layers_of_a_downloaded_model_are_checked(
    make: Callable[..., Path],
    plan: Callable[..., None],
    refusal: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A damaged folder of a download is left to the job that registers it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "resources" / "models" / "owner" / "name" / ("a" * 40)
    folder.parent.mkdir(parents=True)
    hub = ("{model: MODEL}", f"{{model: owner/name, revision: {'a' * 40}}}")
    method = "rank: 2, target_modules: [query]"
    plan("owner/name", method, hub)
    make("llama").rename(folder)
    assert "no linear layer query" in refusal("owner/name", method, hub)
    (folder / "config.json").unlink()
    plan("owner/name", method, hub)
