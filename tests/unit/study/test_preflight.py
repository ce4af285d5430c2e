"""What can be found before any job is found then: in tables, model folders, benchmarks, lengths."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from forgetting.config.base_model import SmallModelConfig
from forgetting.errors import InputError
from forgetting.models.architecture import read_model_layers, small_model
from forgetting.models.loading import load_base, model_parameters
from forgetting.study.load import load_study, study_source
from forgetting.study.preflight import check_inputs
from forgetting.training.pretrain import _new_model
from scripts import register_base
from support.params import write_params

STUDY = """\
title: A small study
datasets:
  facts: {folder: FACTS}
base: {model: MODEL}
train: facts/new
probes:
  new: {table: facts/new, knowledge: new}
  old: {table: facts/old, knowledge: old}
evaluation: {max_new_tokens: 20}
training: {max_length: 100}
methods:
  - method: lora
    rank: [2, 8]
    learning_rate: 1.0e-3
  - {method: full, learning_rate: 1.0e-4}
selection: {probe: new}
"""
ROW = {"question": "Who wrote it?", "answer": "Ann.", "perturbed_answer": ["Bob.", "Cid."]}
OLD = ROW | {"question": "Who sold it?", "answer": "Eve."}
Plan = Callable[..., None]
Told = Callable[..., str]


@pytest.fixture
def model(base_folder: Path, tmp_path: Path) -> Path:
    """A model folder of its own: width 32, keys and values of 16, 2 blocks, 256 tokens."""
    return Path(shutil.copytree(base_folder, tmp_path / "model"))


@pytest.fixture
def plan(model: Path, tmp_path: Path) -> Plan:
    """plan((old, new), ..., option=value): check the study with some of its text replaced."""
    _write(tmp_path / "facts" / "new.jsonl", ROW)
    _write(tmp_path / "facts" / "old.jsonl", OLD)

    def check(*changes: tuple[str, str], **config: Any) -> None:
        text = STUDY
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / "small.yaml"
        text = text.replace("FACTS", str(tmp_path / "facts")).replace("MODEL", str(model))
        path.write_text(text, encoding="utf-8")
        asked = {"study": str(path), **config}
        _, study = load_study(asked, tmp_path)
        check_inputs(study, study_source(asked, tmp_path).locate)

    return check


@pytest.fixture
def told(plan: Plan) -> Told:
    """The same for a mistake: its message, which is one line."""

    def message(*changes: tuple[str, str], **config: Any) -> str:
        with pytest.raises(InputError) as error:
            plan(*changes, **config)
        assert "\n" not in str(error.value)
        return str(error.value)

    return message


def _write(path: Path, *rows: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _line(tmp_path: Path, part: str) -> str:
    """`small.yaml, line N: `, N being the line in which `part` begins."""
    path = tmp_path / "small.yaml"
    number = path.read_text(encoding="utf-8").split(part)[0].count("\n") + 1
    return f"{path}, line {number}: "


def test_a_sound_study_is_let_through(plan: Plan) -> None:
    plan()
    plan(("rank: [2, 8]", "rank: [2, 16]"))
    plan(scale="tiny")


def _method(more: str) -> tuple[str, str]:
    return "    rank: [2, 8]\n", f"    {more}\n"


LAYERS = {
    "all": ("rank: 17", "rank", "rank 17 is larger than the smallest adapted matrix", "16 x 32"),
    "attention": (
        "rank: 17\n    target_modules: attention",
        "rank",
        "which has rank 16",
        "up to 16",
    ),
    "mlp": ("rank: 33\n    target_modules: mlp", "rank", "which has rank 32", "up to 32"),
    "names": ("rank: 40\n    target_modules: [q_proj]", "rank", "rank 32", "0.self_attn.q_proj"),
    "initial rank": ("rank: 12\n    variant: adalora", "rank", "initial rank 18 is larger", "16"),
    "no such name": (
        "rank: 2\n    target_modules: [q_proj, query]",
        "target_modules",
        "the model has no linear layer query, but down_proj, gate_proj",
        "q_proj",
    ),
    "a norm": ("rank: 2\n    target_modules: [norm]", "target_modules", "no linear layer norm", ""),
    "blocks": (
        "rank: 2\n    second_stage: {layers: last 3, learning_rate: 0.1}",
        "second_stage.layers",
        "the model has no 3 blocks, but 2",
        "",
    ),
    "modules": (
        "rank: 2\n    second_stage: {layers: [mlp, layers.2], learning_rate: 0.1}",
        "second_stage.layers",
        "no module whose name ends in layers.2",
        "",
    ),
}
HERE = "{pretrain: {documents: [facts/old], hidden_size: 32, intermediate_size: 40, num_layers: 2}}"


NARROW = ("all", "attention", "initial rank")  # the keys and values, which only the folder has


@pytest.mark.parametrize(
    ("mistake", "base"),
    [
        *((mistake, "of a folder") for mistake in LAYERS),
        *((mistake, "trained here") for mistake in LAYERS if mistake not in NARROW),
    ],
)
def test_layers_and_ranks_that_the_base_has_not(
    told: Told, tmp_path: Path, mistake: str, base: str
) -> None:
    """Of the adapted matrices the smallest counts, and every name must be one of the model's."""
    more, key, first, second = LAYERS[mistake]
    changes = [_method(more)]
    if base == "trained here":
        changes.append(("{model: MODEL}", HERE))
    if "second_stage" in more:
        changes.append(("method: lora", "method: hybrid"))
    message = told(*changes)
    place = key.split(".")[0] + ":"
    assert message.startswith(_line(tmp_path, place) + f"methods.0.{key}: ")
    assert first in message
    assert second in message


@pytest.mark.parametrize(
    "more",
    [
        "rank: 32\n    target_modules: mlp",
        "rank: 32\n    target_modules: [q_proj, model.layers.1.mlp.up_proj, lm_head]",
        "rank: 16\n    target_modules: [embed_tokens, self_attn.v_proj]",
    ],
)
def test_layers_and_ranks_that_the_base_has(plan: Plan, more: str) -> None:
    """Adapters of the MLP alone may have a rank above that of the narrow keys and values."""
    plan(_method(more))
    more = more.replace(", lm_head", "").replace("embed_tokens, ", "")
    then = "\n    second_stage: {layers: [mlp, layers.1, norm, embed*], learning_rate: 0.1}"
    plan(_method(more + then), ("method: lora", "method: hybrid"))


def test_a_small_model_has_the_layers_that_are_foretold(tokenizer: Any) -> None:
    spec = SmallModelConfig(
        hidden_size=32, intermediate_size=40, num_layers=2, vocab_size=len(tokenizer)
    )
    built = _new_model(spec, tokenizer, 0)
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in built.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
    }
    assert small_model(spec).shapes == shapes


def test_a_folders_layers_are_those_of_the_loaded_model(model: Path) -> None:
    """Its headers tell them, a tied head included; and the parameters, each counted once."""
    loaded = load_base(model, torch.device("cpu"))
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in loaded.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
    }
    found = read_model_layers(model)
    assert found.shapes == shapes
    assert (found.is_complete, found.blocks, found.context) == (True, 2, 256)
    assert model_parameters(model) == loaded.num_parameters()


@pytest.mark.parametrize("change", ["experts", "renamed"])
def test_names_are_not_refused_where_files_do_not_tell_them(
    plan: Plan, model: Path, change: str
) -> None:
    """What is put together or renamed when it is loaded is checked by the job that loads it."""
    config = json.loads((model / "config.json").read_text())
    if change == "experts":
        expert = {"model.layers.0.mlp.experts.0.w1.weight": torch.zeros(2, 32)}
        save_file(expert, model / "model.safetensors")
        config["model_type"] = "jamba"
    else:
        config["architectures"] = ["GPTNeoXForCausalLM"]
    (model / "config.json").write_text(json.dumps(config))
    plan(_method("rank: 8\n    target_modules: [query]"))


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _with(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _without_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _without_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
HEADER = b'{"a.weight": {"dtype": "F32", "shape": 3, "data_offsets": [0, 4]}}'
FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no configuration": (_without("config.json"), "no config.json there, so it is no model"),
    "broken configuration": (_with("config.json", b"{"), "config.json: not JSON"),
    "a list": (_with("config.json", b"[]"), "expected a JSON object with `model_type`"),
    "no type": (_with("config.json", b"{}"), "expected a JSON object with `model_type`"),
    "unknown type": (_with("config.json", b'{"model_type": "foo"}'), "language model of type foo"),
    "no decoder": (_with("config.json", b'{"model_type": "t5"}'), "language model of type t5"),
    "no weights": (_without("model.safetensors"), "no model.safetensors there, nor model.safe"),
    "pickled weights": (_as_pickle, "other formats (pytorch_model.bin) are not read"),
    "lfs pointer": (_with("model.safetensors", POINTER), "model.safetensors: not a safetensors"),
    "no header": (_with("model.safetensors", b"x"), "model.safetensors: not a safetensors file"),
    "empty": (_with("model.safetensors", b""), "model.safetensors: not a safetensors file"),
    "bad header": (
        _with("model.safetensors", len(HEADER).to_bytes(8, "little") + HEADER + bytes(4)),
        "model.safetensors: not a safetensors file",
    ),
    "cut off": (_cut, "fetch it again"),
    "a missing shard": (_without_a_shard, "model-2.safetensors is not in the folder"),
    "bad index": (
        lambda folder: (
            _without("model.safetensors")(folder)
            or _with("model.safetensors.index.json", b"[1]")(folder)
        ),
        "expected `weight_map`",
    ),
    "other width": (
        _config(hidden_size=64),
        "config.json: hidden_size is 64, where the weights have 32",
    ),
    "other vocabulary": (_config(vocab_size=7), "config.json: vocab_size is 7, where the weights"),
    "other MLP": (
        _config(intermediate_size=72),
        "intermediate_size is 72, where the weights",
    ),
    "other heads": (_config(num_key_value_heads=2), "num_key_value_heads x head_dim is 32, where"),
    "other depth": (_config(num_hidden_layers=3), "is 3, and there are weights of 2 blocks"),
    "no tokenizer": (_without_tokenizer, "no tokenizer there; copy tokenizer.json"),
}


@pytest.mark.parametrize("mistake", FOLDERS)
def test_a_folder_that_is_no_whole_model(
    told: Told, model: Path, tmp_path: Path, mistake: str
) -> None:
    breaks, expected = FOLDERS[mistake]
    breaks(model)
    message = told()
    assert message.startswith(_line(tmp_path, "base:") + f"base.model: {model}")
    assert expected in message
    assert told(model=str(model)).startswith(f"--config model={model}: ")


KINDS: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "gemma2": {"head_dim": 24},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "gpt_neox": {},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 2},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "phi": {},
    "qwen3": {"head_dim": 24},
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_many_types_agree_with_their_configuration(model: Path, kind: str) -> None:
    """The heads may be wider than the model, embeddings narrower, keys of other names."""
    usual = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    given = KINDS[kind] if "n_head" in KINDS[kind] else usual | heads | KINDS[kind]
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(kind, vocab_size=500, **ids, **given)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    read_model_layers(model)
    _config(vocab_size=501)(model)
    with pytest.raises(InputError, match="vocab_size is 501, where the weights have 500"):
        read_model_layers(model)


BROKEN = {
    "nothing in it": ("tokenizer.json", b"{}"),
    "a list": ("tokenizer.json", b"[]"),
    "cut off": ("tokenizer.json", b'{"version": "1.0", "added_'),
    "no model": ("tokenizer.json", b'{"added_tokens": []}'),
    "settings in a list": ("tokenizer_config.json", b"[]"),
}


@pytest.mark.parametrize("file", BROKEN)
def test_a_broken_tokenizer_is_told_by_the_first_job(
    model: Path, tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Libraries end in errors of any type, which say nothing of the folder."""
    name, content = BROKEN[file]
    (model / name).write_bytes(content)
    params = {"folder": str(model), "origin": "x", "downloaded": False, "prompt": None}
    options = [f"--params={write_params(tmp_path, **params)}", f"--output={tmp_path / 'base.json'}"]
    with pytest.raises(SystemExit):
        register_base.main(options)
    told = capsys.readouterr().err
    assert f"{model}: no tokenizer can be read there (" in told
    assert "copy tokenizer.json and tokenizer_config.json" in told
    assert "Traceback" not in told


def test_a_chat_prompt_needs_a_template(plan: Plan, told: Told, model: Path) -> None:
    chat = ("train:", "prompt: {chat: true}\ntrain:")
    plan(chat)
    (model / "chat_template.jinja").unlink()
    assert "prompt.chat: the tokenizer in" in told(chat)


def test_thinking_and_arguments_of_a_template_are_decided_by_the_study(
    plan: Plan, told: Told, model: Path
) -> None:
    """Before any job, where the model is in a folder; conversations are in the template too."""
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if enable_thinking %}<think>{% endif %}")

    def prompt(text: str) -> tuple[str, str]:
        return "train:", f"prompt: {{{text}}}\ntrain:"

    plan()
    assert "write `template_arguments: {enable_thinking: false}`" in told(prompt("chat: true"))
    plan(prompt("chat: true, template_arguments: {enable_thinking: false}"))
    wrong = told(prompt("chat: true, template_arguments: {enable_thinkin: false}"))
    assert "prompt.template_arguments.enable_thinkin: the chat template" in wrong
    assert "its arguments: enable_thinking" in wrong
    reserved = told(prompt("chat: true, template_arguments: {messages: 1}"))
    assert "prompt.template_arguments.messages: the renderer" in reserved


def test_a_broken_file_of_weights_is_told_when_it_is_loaded(model: Path) -> None:
    """A hub's model is on the disk when it is loaded, and not before."""
    (model / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(InputError, match="no causal language model can be read"):
        load_base(model, torch.device("cpu"))


@pytest.mark.parametrize("broken", ["lacking", "of another shape"])
def test_a_base_is_never_completed_with_random_weights(model: Path, broken: str) -> None:
    """The library would draw them anew at every loading, and only warn."""
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name] = weights[name][:1].clone()
    if broken == "lacking":
        del weights[name]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"lack the weight `{name}`"):
        load_base(model, torch.device("cpu"))


OWN = ("  facts:", "  own: {folder: ROWS}\n  facts:")
RIGHT = {
    "gsm8k": {"question": "1 + 1?", "answer": "#### 2"},
    "hellaswag": {
        "activity_label": "a",
        "ctx_a": "b",
        "ctx_b": "c",
        "endings": ["d", "e"],
        "label": "0",
    },
}
BENCHMARKS = {
    "no folder": ("gsm8k: {}", {}, "gsm8k/test.jsonl, which gsm8k needs"),
    "no examples": (
        "gsm8k: {max_new_tokens: 20}",
        {"gsm8k/test": [RIGHT["gsm8k"]]},
        "gsm8k/train.jsonl, which gsm8k needs (for 5 examples in the prompt)",
    ),
    "too few examples": (
        "gsm8k: {max_new_tokens: 20}",
        {"gsm8k/test": [RIGHT["gsm8k"]], "gsm8k/train": [RIGHT["gsm8k"]] * 5},
        "train.jsonl: has 5 rows, and 5 examples in the prompt need 6",
    ),
    "more examples than the task's": (
        "hellaswag: {num_fewshot: 1}",
        {"hellaswag/validation": [RIGHT["hellaswag"]]},
        "hellaswag/train.jsonl, which hellaswag needs (for 1 examples",
    ),
    "no column": (
        "gsm8k: {num_fewshot: 0, max_new_tokens: 20}",
        {"gsm8k/test": [RIGHT["gsm8k"], {"question": "x"}]},
        "test.jsonl, line 2: the column 'answer' is missing",
    ),
    "no rows": (
        "gsm8k: {num_fewshot: 0, max_new_tokens: 20}",
        {"gsm8k/test": []},
        "test.jsonl: has no rows",
    ),
    "examples of a task without": (
        "humaneval: {num_fewshot: 3}",
        {},
        "benchmarks.tasks.humaneval.num_fewshot: humaneval is defined without examples",
    ),
    "answers longer than the context": (
        "gsm8k: {max_new_tokens: 256}",
        {},
        "benchmarks.tasks.gsm8k.max_new_tokens: the answers of gsm8k may take 256 tokens",
    ),
    "a name that the harness has not": (
        "helaswag: {}",
        {},
        "benchmarks.tasks.helaswag: the lm-evaluation-harness has no task helaswag; did you mean "
        "hellaswag",
    ),
    "a group": ("mmlu: {}", {}, "benchmarks.tasks.mmlu: mmlu is no task"),
    "a metric that the task has not": (
        "sciq: {metric: bleu}",
        {},
        "benchmarks.tasks.sciq.metric: sciq has no metric bleu, but acc,none, acc_norm,none",
    ),
    "samples of what is no program": (
        "sciq: {samples: 5}",
        {},
        "benchmarks.tasks.sciq.samples: the answers of sciq are no programs",
    ),
    "no rows of another task": ("sciq: {}", {}, "sciq/test.jsonl, which sciq needs"),
    "no examples of another task": (
        "sciq: {num_fewshot: 2}",
        {"sciq/test": [{}]},
        "sciq/train.jsonl, which sciq needs (for 2 examples in the prompt)",
    ),
    "answers longer by definition": ("humaneval: {}", {}, "may take 1024 tokens"),
}


@pytest.mark.parametrize("mistake", BENCHMARKS)
def test_benchmarks_that_could_not_be_run(told: Told, tmp_path: Path, mistake: str) -> None:
    task, files, expected = BENCHMARKS[mistake]
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, rows in files.items():
        _write(folder / f"{name}.jsonl", *rows)
    if mistake == "no folder":
        task = "gsm8k: {max_new_tokens: 20}"
    asked = ("selection:", f"benchmarks: {{tasks: {{{task}}}}}\nselection:")
    assert expected in told(asked, benchmarks_dir=str(folder))
    own = (OWN[0], OWN[1].replace("ROWS", str(folder)))
    named = ("benchmarks: {", "benchmarks: {dataset: own, ")
    message = told(asked, own, named)
    assert expected in message
    if "which" in expected:
        assert message.startswith(_line(tmp_path, "benchmarks:") + "benchmarks.dataset: ")


def test_benchmarks_that_can_be_run(plan: Plan, tmp_path: Path) -> None:
    """Examples are asked for only where they are used; a task from the hub needs no file here."""
    _write(tmp_path / "gsm8k" / "test.jsonl", RIGHT["gsm8k"])
    tasks = "{gsm8k: {max_new_tokens: 255, num_fewshot: 0}}"
    plan(
        ("selection:", f"benchmarks: {{tasks: {tasks}}}\nselection:"), benchmarks_dir=str(tmp_path)
    )
    tasks = "{gsm8k: {max_new_tokens: 20}, hellaswag: {num_fewshot: 3}}"
    plan(("selection:", f"benchmarks: {{tasks: {tasks}}}\nselection:"))


def test_other_tasks_come_from_a_folder_the_hub_or_rows_of_the_same_kind(
    plan: Plan, told: Told, tmp_path: Path
) -> None:
    """From the hub at a commit that the study names; the micro-world serves what reads alike."""

    def asked(tasks: str) -> tuple[str, str]:
        return ("selection:", f"benchmarks: {{tasks: {{{tasks}}}}}\nselection:")

    _write(tmp_path / "sciq" / "test.jsonl", {"question": "Hot?"})
    plan(asked("sciq: {}"), benchmarks_dir=str(tmp_path))
    expected = "benchmarks.tasks.sciq: its rows come from allenai/sciq on the hub, so it needs a"
    assert expected in told(asked("sciq: {}"))
    plan(asked(f"sciq: {{revision: {'a' * 40}}}"))
    world = ("  facts:", "  world: {generate: micro-world}\n  facts:")
    named = ("benchmarks: {", "benchmarks: {dataset: world, ")
    plan(world, asked("arc_easy: {num_fewshot: 3}"), named)
    assert "the micro-world has no rows for sciq" in told(world, asked("sciq: {}"), named)


def test_a_hubs_dataset_has_no_rows_of_benchmarks(told: Told) -> None:
    """The micro-world's rows would have been taken for them."""
    hub = ("  facts:", "  far: {hub: a/b, revision: " + "a" * 40 + "}\n  facts:")
    rows = ("selection:", "benchmarks: {dataset: far, tasks: {hellaswag: {}}}\nselection:")
    assert "benchmarks.dataset: far is a dataset on the hub" in told(hub, rows)


LENGTHS = {
    "training": ("max_length: 100", "max_length: 4", "of the answer in FACTS/new.jsonl, line 1,"),
    "answers": ("max_new_tokens: 20", "max_new_tokens: 256", "evaluation.max_new_tokens: 256"),
    "answers after questions": (
        "max_new_tokens: 20",
        "max_new_tokens: 253",
        "253 after the 4 words of the question in FACTS/new.jsonl, line 1 are more than the 256",
    ),
    "blocks": (
        "selection:",
        "general_text: {table: facts/text, block: 257}\nselection:",
        "general_text.block: 257 tokens are more than the 256",
    ),
}


@pytest.mark.parametrize("mistake", LENGTHS)
def test_what_is_certainly_too_long(told: Told, tmp_path: Path, mistake: str) -> None:
    """A text has at least as many tokens as words."""
    _write(tmp_path / "facts" / "text.jsonl", {"text": "Much. " * 100})
    old, new, expected = LENGTHS[mistake]
    message = told((old, new))
    assert message.startswith(_line(tmp_path, new.split(":")[0] + ": "))
    assert expected.replace("FACTS", str(tmp_path / "facts")) in message


def test_what_may_fit_is_let_through(plan: Plan) -> None:
    plan(("max_length: 100", "max_length: 5"))
    plan(("max_new_tokens: 20", "max_new_tokens: 252"))


def test_rows_that_are_left_out_may_be_long(plan: Plan, told: Told, tmp_path: Path) -> None:
    long = ROW | {"question": "who " * 300}
    _write(tmp_path / "facts" / "new.jsonl", ROW, long)
    assert f"the answer in {tmp_path / 'facts' / 'new.jsonl'}, line 2, whose question" in told()
    _write(tmp_path / "facts" / "few.jsonl", ROW)
    plan(("train:", "train_limit: 1\ntrain:"), ("table: facts/new", "table: facts/few"))


def test_a_text_shorter_than_its_block(told: Told, tmp_path: Path) -> None:
    _write(tmp_path / "facts" / "text.jsonl", {"text": "Zoë."})
    text = ("selection:", "general_text: {table: facts/text, block: 6}\nselection:")
    assert "text.jsonl: the text has 5 bytes, fewer than the 6 tokens of one block" in told(text)


@pytest.mark.parametrize("origin", ["same folder", "link", "copy"])
@pytest.mark.parametrize("use", ["probe", "text", "replay"])
def test_old_knowledge_is_not_trained_on_under_another_name(
    told: Told, plan: Plan, tmp_path: Path, origin: str, use: str
) -> None:
    facts, other = tmp_path / "facts", tmp_path / "other"
    _write(facts / "new.jsonl", ROW | {"text": "x" * 600})
    if origin == "same folder":
        other = facts / ".." / "facts"
    else:
        other.mkdir()
        if origin == "link":
            (other / "new.jsonl").symlink_to(facts / "new.jsonl")
        else:
            shutil.copy(facts / "new.jsonl", other)
    named = ("  facts:", f"  again: {{folder: {other}}}\n  facts:")
    changes = {
        "probe": ("table: facts/old", "table: again/new"),
        "text": ("selection:", "general_text: {table: again/new, block: 9}\nselection:"),
        "replay": _method("rank: 2\n    mitigation: {replay: {table: again/old}}"),
    }
    if use == "replay" and origin != "same folder":
        shutil.copy(facts / "old.jsonl", other / "old.jsonl")
    message = told(named, changes[use])
    assert ", which is trained on" in message
    assert ("again/old" if use == "replay" else "again/new") in message
    # A second name of what is only trained on, or only measured, is none.
    plan(named, ("train: facts/new", "train: again/new"))


def test_a_question_of_old_knowledge_is_not_trained_on(
    plan: Plan, told: Told, tmp_path: Path
) -> None:
    """Told before any job where the rows are in folders; rows that are not measured may be."""
    _write(tmp_path / "facts" / "both.jsonl", OLD, ROW | {"answer": "Ida."})
    message = told(("facts/old", "facts/both"))
    assert message.startswith(f"{tmp_path}/facts/both.jsonl, line 2: the question `Who wrote it?` ")
    assert f"is trained on, too ({tmp_path}/facts/new.jsonl, line 1)" in message
    plan(("{table: facts/old,", "{table: facts/both, limit: 1,"))


def test_a_right_answer_among_the_wrong_ones_is_told_before_any_job(
    told: Told, tmp_path: Path
) -> None:
    _write(tmp_path / "facts" / "odd.jsonl", OLD, OLD | {"perturbed_answer": ["Bob.", "Eve."]})
    message = told(("facts/old", "facts/odd"))
    assert message.startswith(f"{tmp_path}/facts/odd.jsonl, line 2: `answer`, `Eve.`, is among")


def test_answers_that_rouge_does_not_see_are_refused_before_any_job(
    plan: Plan, told: Told, tmp_path: Path
) -> None:
    russian = {"question": "Когда?", "answer": "В 753 году.", "perturbed_answer": ["В 754 году."]}
    _write(tmp_path / "facts" / "new.jsonl", russian)
    message = told()
    assert message.startswith("100% of the letters in the answers of probe `new` are not among a–z")
    assert f"{tmp_path}/facts/new.jsonl, line 1" in message
    plan(("evaluation: {", "evaluation: {rouge_tokenizer: unicode, "))


def test_one_origin_on_the_hub_or_of_a_generator_is_one_too(told: Told) -> None:
    for origin in ("{generate: micro-world}", "{hub: a/b, revision: " + "a" * 40 + "}"):
        twice = ("  facts:", f"  one: {origin}\n  two: {origin}\n  facts:")
        changes = ("train: facts/new", "train: one/documents"), ("facts/old", "two/documents")
        assert "two/documents holds what one/documents holds" in told(twice, *changes)


def test_a_folder_in_an_options_place_is_told_as_the_option(told: Told, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    message = told(facts_dir=str(tmp_path / "bare"))
    assert message.startswith(_line(tmp_path, "train:") + "train.0: ")
    assert f"{tmp_path / 'bare'}: there is no new.jsonl" in message


@pytest.mark.parametrize(
    ("old", "new", "key", "expected"),
    [
        ("{folder: FACTS}", "{folder: /no/where}", "datasets.facts.folder", "no folder /no/where"),
        ("facts/old", "facts/odl", "probes.old.table.0", "there is no odl.jsonl (nor .json"),
        (
            "{model: MODEL}",
            "{pretrain: {documents: [facts/new, facts/tales]}}",
            "base.pretrain.documents.1",
            "there is no tales.jsonl",
        ),
    ],
)
def test_a_table_that_is_not_there_is_told_with_its_key(
    told: Told, tmp_path: Path, old: str, new: str, key: str, expected: str
) -> None:
    message = told((old, new))
    assert message.startswith(_line(tmp_path, new) + f"{key}: ")
    assert expected in message


def test_documents_are_read_before_any_job(told: Told, tmp_path: Path) -> None:
    _write(tmp_path / "facts" / "tales.jsonl", {"text": "A."}, {"txt": "B."})
    here = ("{model: MODEL}", "{pretrain: {documents: [facts/tales]}}")
    assert "tales.jsonl, line 2: expected `question` and `answer`, `messages`, or" in told(here)


def test_the_micro_world_has_its_own_tables_only(told: Told) -> None:
    world = ("  facts:", "  world: {generate: micro-world}\n  facts:")
    message = told(world, ("facts/old", "world/authors"))
    assert "probes.old.table.0: the micro-world has no table authors, only new_authors" in message
