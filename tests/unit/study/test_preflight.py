"""Preflight checks of tables, model folders, layers, benchmarks and lengths."""

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
from forgetting.models.architecture import ModelLayers, read_model_layers
from forgetting.models.loading import load_base, load_meta_model
from forgetting.models.size import small_model_size
from forgetting.study.load import load_study, study_source
from forgetting.study.preflight import check_inputs
from forgetting.training.pretrain import new_model
from scripts import register_base
from support.invalid_studies import assert_reports, edited, invalid_studies
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
Check = Callable[..., None]
Message = Callable[..., str]


@pytest.fixture
def model(base_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the base model: width 32, keys and values of 16, 2 blocks, 256 tokens."""
    return Path(shutil.copytree(base_folder, tmp_path / "model"))


@pytest.fixture
def check(model: Path, tmp_path: Path) -> Check:
    """Return check((old, new), ..., option=value), which checks the study with edited text."""
    _write(tmp_path / "facts" / "new.jsonl", ROW)
    _write(tmp_path / "facts" / "old.jsonl", OLD)

    def check_study(*changes: tuple[str, str], **config: Any) -> None:
        text = edited(STUDY, changes)
        path = tmp_path / "small.yaml"
        text = text.replace("FACTS", str(tmp_path / "facts")).replace("MODEL", str(model))
        path.write_text(text, encoding="utf-8")
        options = {"study": str(path), **config}
        _, study = load_study(options, tmp_path)
        check_inputs(study, study_source(options, tmp_path).locate)

    return check_study


@pytest.fixture
def message_of(check: Check) -> Message:
    """Return message_of((old, new), ..., option=value), which returns the one-line message."""

    def message(*changes: tuple[str, str], **config: Any) -> str:
        with pytest.raises(InputError) as error:
            check(*changes, **config)
        assert "\n" not in str(error.value)
        return str(error.value)

    return message


def _write(path: Path, *rows: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _line(tmp_path: Path, part: str) -> str:
    """Return `small.yaml, line N: `, in which N is the line where `part` begins."""
    path = tmp_path / "small.yaml"
    number = path.read_text(encoding="utf-8").split(part)[0].count("\n") + 1
    return f"{path}, line {number}: "


def test_valid_study_is_accepted(check: Check) -> None:
    check()
    check(("rank: [2, 8]", "rank: [2, 16]"))
    check(scale="tiny")


def _method(more: str) -> tuple[str, str]:
    return "    rank: [2, 8]\n", f"    {more}\n"


@pytest.mark.parametrize("row", invalid_studies("local_model"))
def test_invalid_study_is_reported_by_line_and_key(
    message_of: Message, tmp_path: Path, row: dict[str, Any]
) -> None:
    _write(tmp_path / "facts" / "text.jsonl", {"text": "Much. " * 100})
    message = message_of(*row["edit"].items())
    assert_reports(message, row, tmp_path / "small.yaml", tmp_path / "facts")


@pytest.mark.parametrize(
    "more",
    [
        "rank: 32\n    target_modules: mlp",
        "rank: 32\n    target_modules: [q_proj, model.layers.1.mlp.up_proj, lm_head]",
        "rank: 16\n    target_modules: [embed_tokens, self_attn.v_proj]",
    ],
)
def test_layers_and_ranks_of_the_base_are_accepted(check: Check, more: str) -> None:
    """Adapters of the MLP may have a larger rank than the narrow keys and values."""
    check(_method(more))
    more = more.replace(", lm_head", "").replace("embed_tokens, ", "")
    then = "\n    second_stage: {layers: [mlp, layers.1, norm, embed*], learning_rate: 0.1}"
    check(_method(more + then), ("method: lora", "method: hybrid"))


def test_small_model_size_predicts_the_layers_of_new_model(tokenizer: Any) -> None:
    spec = SmallModelConfig(
        hidden_size=32, intermediate_size=40, num_layers=2, vocab_size=len(tokenizer)
    )
    built = new_model(spec, tokenizer, 0)
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in built.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
    }
    assert _shapes(small_model_size(spec).layers) == shapes


def _shapes(layers: ModelLayers) -> dict[str, tuple[int, ...]]:
    return {layer.name: layer.shape for layer in layers.layers}


def test_read_model_layers_agrees_with_the_loaded_model(model: Path) -> None:
    """The headers have all layers, a tied head included, and count each parameter once."""
    loaded = load_base(model, torch.device("cpu"))
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in loaded.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
    }
    layers = read_model_layers(model)
    assert _shapes(layers) == shapes
    assert (layers.is_complete, layers.blocks, layers.context) == (True, 2, 256)
    assert load_meta_model(model).num_parameters() == loaded.num_parameters()


@pytest.mark.parametrize("change", ["experts", "renamed"])
def test_unknown_layers_are_accepted_if_files_lack_names(
    check: Check, model: Path, change: str
) -> None:
    """Layers that are fused or renamed at loading are checked by the job that loads the model."""
    config = json.loads((model / "config.json").read_text())
    if change == "experts":
        expert = {"model.layers.0.mlp.experts.0.w1.weight": torch.zeros(2, 32)}
        save_file(expert, model / "model.safetensors")
        config["model_type"] = "jamba"
    else:
        config["model_type"] = "olmo_hybrid"
    (model / "config.json").write_text(json.dumps(config))
    check(_method("rank: 8\n    target_modules: [query]"))


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
    "no tokenizer": (_without_tokenizer, "no tokenizer there; copy tokenizer.json"),
}


@pytest.mark.parametrize("mistake", FOLDERS)
def test_damaged_model_folder_is_refused(
    message_of: Message, model: Path, tmp_path: Path, mistake: str
) -> None:
    breaks, expected = FOLDERS[mistake]
    breaks(model)
    message = message_of()
    assert message.startswith(_line(tmp_path, "base:") + f"base.model: {model}")
    assert expected in message
    assert message_of(model=str(model)).startswith(f"--config model={model}: ")


BROKEN = {
    "nothing in it": ("tokenizer.json", b"{}"),
    "a list": ("tokenizer.json", b"[]"),
    "cut off": ("tokenizer.json", b'{"version": "1.0", "added_'),
    "no model": ("tokenizer.json", b'{"added_tokens": []}'),
    "settings in a list": ("tokenizer_config.json", b"[]"),
}


@pytest.mark.parametrize("file", BROKEN)
def test_register_base_reports_a_damaged_tokenizer(
    model: Path, tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Libraries raise errors of any type, which do not name the folder."""
    name, content = BROKEN[file]
    (model / name).write_bytes(content)
    params = {"folder": str(model), "origin": "x", "downloaded": False, "prompt": None}
    options = [f"--{name}={tmp_path / f'{name}.json'}" for name in ("layers", "output")]
    with pytest.raises(SystemExit):
        register_base.main([f"--params={write_params(tmp_path, **params)}", *options])
    printed = capsys.readouterr().err
    assert f"{model}: no tokenizer can be read there (" in printed
    assert "copy tokenizer.json and tokenizer_config.json" in printed
    assert "Traceback" not in printed


def test_chat_prompt_needs_a_template(check: Check, message_of: Message, model: Path) -> None:
    chat = ("train:", "prompt: {chat: true}\ntrain:")
    check(chat)
    (model / "chat_template.jinja").unlink()
    assert "prompt.chat: the tokenizer in" in message_of(chat)


def test_template_arguments_are_checked(check: Check, message_of: Message, model: Path) -> None:
    """The study must set the arguments of the template of a model in a folder."""
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if enable_thinking %}<think>{% endif %}")

    def prompt(text: str) -> tuple[str, str]:
        return "train:", f"prompt: {{{text}}}\ntrain:"

    check()
    assert "write `template_arguments: {enable_thinking: false}`" in message_of(
        prompt("chat: true")
    )
    check(prompt("chat: true, template_arguments: {enable_thinking: false}"))
    wrong = message_of(prompt("chat: true, template_arguments: {enable_thinkin: false}"))
    assert "prompt.template_arguments.enable_thinkin: the chat template" in wrong
    assert "its arguments: enable_thinking" in wrong
    reserved = message_of(prompt("chat: true, template_arguments: {messages: 1}"))
    assert "prompt.template_arguments.messages: the renderer" in reserved


def test_load_base_refuses_damaged_weights(model: Path) -> None:
    """A hub model is downloaded by a job, after the preflight checks."""
    (model / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(InputError, match="no causal language model can be read"):
        load_base(model, torch.device("cpu"))


@pytest.mark.parametrize("broken", ["lacking", "of another shape"])
def test_load_base_refuses_incomplete_weights(model: Path, broken: str) -> None:
    """transformers would initialize missing weights at random, with a warning only."""
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name] = weights[name][:1].clone()
    message = f"{name} of shape 32 x 32, but it has 1 x 32 in the safetensors;"
    if broken == "lacking":
        del weights[name]
        message = f"{name}, which the safetensors lack;"
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"config.json: asks for the weight {message} copy config"):
        load_base(model, torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "unused", "refused"),
    [
        ("qwen3", "model.layers.2.self_attn.q_proj.weight", True),
        ("qwen3", "model.layers.0.self_attn.q_proj.bias", True),
        ("qwen3", "model.layers.0.self_attn.rotary_emb.inv_freq", False),
        ("qwen3", "visual.blocks.0.attn.qkv.weight", False),
        ("gpt2", "h.2.attn.c_attn.weight", True),
        ("gpt2", "h.0.attn.bias", False),
        ("gpt2", "score.weight", False),
    ],
)
def test_load_base_refuses_weights_that_the_model_lacks(
    model: Path, kind: str, unused: str, refused: bool
) -> None:
    """transformers would leave out a block or a bias; constants and parts for images are free."""
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2} if kind == "gpt2" else {"hidden_size": 32}
    if kind != "gpt2":
        shape |= {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        shape |= {"num_key_value_heads": 1, "head_dim": 16}
    config = AutoConfig.for_model(kind, vocab_size=500, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    weights = load_file(model / "model.safetensors")
    if unused.startswith("h."):  # The files of GPT-2 on the hub omit the prefix of the model.
        weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    weights[unused] = torch.ones(32)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    if refused:
        with pytest.raises(InputError, match=f"has no place for the weight {unused} of the saf"):
            load_base(model, torch.device("cpu"))
    else:
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
        "train.jsonl: 5 examples in the prompt need 6 rows, but there are 5",
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
        "benchmarks.tasks.gsm8k.max_new_tokens: answers of gsm8k may have 256 tokens",
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
        "benchmarks.tasks.sciq.samples: the answers of sciq are not programs",
    ),
    "no rows of another task": ("sciq: {}", {}, "sciq/test.jsonl, which sciq needs"),
    "no examples of another task": (
        "sciq: {num_fewshot: 2}",
        {"sciq/test": [{}]},
        "sciq/train.jsonl, which sciq needs (for 2 examples in the prompt)",
    ),
    "answers longer by definition": ("humaneval: {}", {}, "may have 1024 tokens"),
}


@pytest.mark.parametrize("mistake", BENCHMARKS)
def test_invalid_benchmark_is_refused(message_of: Message, tmp_path: Path, mistake: str) -> None:
    task, files, expected = BENCHMARKS[mistake]
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, rows in files.items():
        _write(folder / f"{name}.jsonl", *rows)
    if mistake == "no folder":
        task = "gsm8k: {max_new_tokens: 20}"
    section = ("selection:", f"benchmarks: {{tasks: {{{task}}}}}\nselection:")
    assert expected in message_of(section, benchmarks_dir=str(folder))
    own = (OWN[0], OWN[1].replace("ROWS", str(folder)))
    named = ("benchmarks: {", "benchmarks: {dataset: own, ")
    message = message_of(section, own, named)
    assert expected in message
    if "which" in expected:
        assert message.startswith(_line(tmp_path, "benchmarks:") + "benchmarks.dataset: ")


def test_benchmark_needs_only_the_rows_it_uses(check: Check, tmp_path: Path) -> None:
    """Examples are needed only if they are used; a task from the hub needs no files."""
    _write(tmp_path / "gsm8k" / "test.jsonl", RIGHT["gsm8k"])
    tasks = "{gsm8k: {max_new_tokens: 255, num_fewshot: 0}}"
    check(
        ("selection:", f"benchmarks: {{tasks: {tasks}}}\nselection:"), benchmarks_dir=str(tmp_path)
    )
    tasks = "{gsm8k: {max_new_tokens: 20}, hellaswag: {num_fewshot: 3}}"
    check(("selection:", f"benchmarks: {{tasks: {tasks}}}\nselection:"))


def test_other_tasks_need_a_folder_a_revision_or_same_data(
    check: Check, message_of: Message, tmp_path: Path
) -> None:
    """The micro-world has rows for tasks on the same datasets as the built-in ones."""

    def tasks(tasks: str) -> tuple[str, str]:
        return ("selection:", f"benchmarks: {{tasks: {{{tasks}}}}}\nselection:")

    _write(tmp_path / "sciq" / "test.jsonl", {"question": "Hot?"})
    check(tasks("sciq: {}"), benchmarks_dir=str(tmp_path))
    expected = "benchmarks.tasks.sciq: its rows come from allenai/sciq on the hub, so it needs a"
    assert expected in message_of(tasks("sciq: {}"))
    check(tasks(f"sciq: {{revision: {'a' * 40}}}"))
    world = ("  facts:", "  world: {generate: micro-world}\n  facts:")
    named = ("benchmarks: {", "benchmarks: {dataset: world, ")
    check(world, tasks("arc_easy: {num_fewshot: 3}"), named)
    assert "the micro-world has no rows for sciq" in message_of(world, tasks("sciq: {}"), named)


def test_lengths_that_may_fit_are_accepted(check: Check) -> None:
    check(("max_length: 100", "max_length: 5"))
    check(("max_new_tokens: 20", "max_new_tokens: 252"))


def test_rows_beyond_the_limit_may_be_long(
    check: Check, message_of: Message, tmp_path: Path
) -> None:
    long = ROW | {"question": "who " * 300}
    _write(tmp_path / "facts" / "new.jsonl", ROW, long)
    assert (
        f"the answer in {tmp_path / 'facts' / 'new.jsonl'}, line 2, whose question" in message_of()
    )
    _write(tmp_path / "facts" / "few.jsonl", ROW)
    check(("train:", "train_limit: 1\ntrain:"), ("table: facts/new", "table: facts/few"))


def test_text_shorter_than_a_block_is_refused(message_of: Message, tmp_path: Path) -> None:
    _write(tmp_path / "facts" / "text.jsonl", {"text": "Zoë."})
    text = ("selection:", "general_text: {table: facts/text, block: 6}\nselection:")
    assert "text.jsonl: the text has 5 bytes, fewer than the 6 tokens of one block" in message_of(
        text
    )


@pytest.mark.parametrize("origin", ["same folder", "link", "copy"])
@pytest.mark.parametrize("use", ["probe", "text", "replay"])
def test_leaked_table_under_another_name_is_refused(
    message_of: Message, check: Check, tmp_path: Path, origin: str, use: str
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
    message = message_of(named, changes[use])
    assert ", which is trained on" in message
    assert ("again/old" if use == "replay" else "again/new") in message
    # A table may have two names if both are trained on, or both are measured.
    check(named, ("train: facts/new", "train: again/new"))


def test_leaked_question_is_refused(check: Check, message_of: Message, tmp_path: Path) -> None:
    """Rows beyond the limit of a probe may be trained on."""
    _write(tmp_path / "facts" / "both.jsonl", OLD, ROW | {"answer": "Ida."})
    message = message_of(("facts/old", "facts/both"))
    assert message.startswith(f"{tmp_path}/facts/both.jsonl, line 2: the question `Who wrote it?` ")
    assert f"is trained on, too ({tmp_path}/facts/new.jsonl, line 1)" in message
    check(("{table: facts/old,", "{table: facts/both, limit: 1,"))


def test_right_answer_among_wrong_ones_is_refused(message_of: Message, tmp_path: Path) -> None:
    _write(tmp_path / "facts" / "odd.jsonl", OLD, OLD | {"perturbed_answer": ["Bob.", "Eve."]})
    message = message_of(("facts/old", "facts/odd"))
    assert message.startswith(f"{tmp_path}/facts/odd.jsonl, line 2: `answer`, `Eve.`, is among")


def test_answers_without_rouge_letters_are_refused(
    check: Check, message_of: Message, tmp_path: Path
) -> None:
    russian = {"question": "Когда?", "answer": "В 753 году.", "perturbed_answer": ["В 754 году."]}
    _write(tmp_path / "facts" / "new.jsonl", russian)
    message = message_of()
    assert message.startswith("100% of the letters in the answers of probe `new` are not among a–z")
    assert f"{tmp_path}/facts/new.jsonl, line 1" in message
    check(("evaluation: {", "evaluation: {rouge_tokenizer: unicode, "))


def test_missing_table_of_a_folder_option_is_reported(message_of: Message, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    message = message_of(facts_dir=str(tmp_path / "bare"))
    assert message.startswith(_line(tmp_path, "train:") + "train.0: ")
    assert f"{tmp_path / 'bare'}: there is no new.jsonl" in message


def test_invalid_document_row_is_refused(message_of: Message, tmp_path: Path) -> None:
    _write(tmp_path / "facts" / "tales.jsonl", {"text": "A."}, {"txt": "B."})
    here = ("{model: MODEL}", "{pretrain: {documents: [facts/tales]}}")
    assert "tales.jsonl, line 2: expected `question` and `answer`, `messages`, or" in message_of(
        here
    )
