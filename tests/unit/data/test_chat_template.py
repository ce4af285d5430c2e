"""Chat templates: the end of answers of base and tuned models, and the text of prompts."""

from __future__ import annotations

import json
from collections import Counter
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from forgetting.benchmarks.hflm import SharedPrefixLM
from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig
from forgetting.data import chat_template, tokenize
from forgetting.data.tokenize import (
    encode_messages,
    encode_pair,
    encode_prompt,
    resolve_template,
    turn_ending,
)
from forgetting.errors import InputError
from forgetting.evaluation import probes
from forgetting.evaluation.generation import generate_greedy
from forgetting.models.loading import load_base, load_tokenizer
from scripts import register_base
from support.models import byte_tokenizer, random_llama
from support.params import write_params

pytestmark = pytest.mark.usefixtures("one_thread")

CHAT = PromptConfig(chat=True)
QUESTIONS = ["Who?", "What was it?", "When?", "Where did they meet?", "Why?"]
SETTINGS = EvaluationConfig(max_new_tokens=24, batch_size=4)
START, END = 257, 258

TURNS = (
    "{% for m in messages %}{{ '<start>' + m.role + '\n' + m.content + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)
EOS_AT_LAST = TURNS + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
# Turns have a start token and no end token.
NO_END = (
    "{% for m in messages %}{{ '<start>' + m.role + '\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SWITCH = (
    "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "{% for m in messages %}{{ '<start>' + m.role + '\n' + m.content + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}"
    "{% if not enable_thinking %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"
)


def _tokenizer(template: str | None = TURNS) -> PreTrainedTokenizerBase:
    """Return a tokenizer of bytes and two tokens for turns, one of them marked as special."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<start>"], special_tokens=True)
    tokenizer.add_tokens(["<end>"])
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a model that often generates <end>, and never the tokenizer's end of sequence."""
    tokenizer, model = _tokenizer(), random_llama(context=256)
    model.resize_token_embeddings(END + 1)
    prompts = [tokenizer(question)["input_ids"] for question in QUESTIONS]
    generated = generate_greedy(model, prompts, 24, 4, {-1}, 0)
    often = Counter(token for answer in generated for token in answer[3:]).most_common(1)[0][0]
    with torch.no_grad():
        # <end> takes the logits of the end of sequence.
        model.lm_head.weight[END] = 1.01 * model.lm_head.weight[often]
    path = tmp_path / "model"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _set(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("where", ["template", "generation_config.json", "config.json"])
def test_generation_stops_at_tokens_of_the_generation_config(folder: Path, where: str) -> None:
    """This holds for probes, refusals and benchmarks, and the end token is left out."""
    prompt = CHAT if where == "template" else PromptConfig()
    if where != "template":
        _set(folder / where, eos_token_id=[0, END])
    model, tokenizer = load_base(folder, torch.device("cpu")), load_tokenizer(folder)
    prompts = [encode_prompt(tokenizer, prompt, question) for question in QUESTIONS]
    free = generate_greedy(model, prompts, 24, 4, {-1}, 0)
    expected = [list(takewhile(lambda token: token not in (0, END), answer)) for answer in free]
    assert len({len(answer) for answer in expected}) > 1
    assert probes.generate(model, tokenizer, QUESTIONS, prompt, SETTINGS) == expected
    if where == "template":
        return
    texts = [tokenizer.decode(ids) for ids in prompts]
    requests = [SimpleNamespace(args=(text, {"until": [], "max_gen_toks": 24})) for text in texts]
    harness = SharedPrefixLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    generated = harness.generate_until(requests)
    assert generated == [tokenizer.decode(answer, skip_special_tokens=True) for answer in expected]


def _adopt(folder: Path, prompt: PromptConfig | None = None) -> None:
    params = write_params(
        folder.parent,
        folder=str(folder),
        origin="x",
        downloaded=False,
        prompt=prompt.model_dump(mode="json") if prompt else None,
    )
    outputs = [f"--layers={folder / '../layers.json'}", f"--output={folder / '../base.json'}"]
    register_base.main([f"--params={params}", *outputs])


def test_only_special_tokens_end_an_answer(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An end token that is a letter would truncate answers."""
    _set(folder / "generation_config.json", eos_token_id=[0, END])
    _adopt(folder)
    letter = load_tokenizer(folder)("a")["input_ids"][0]
    _set(folder / "generation_config.json", eos_token_id=[0, letter])
    with pytest.raises(SystemExit):
        _adopt(folder)
    assert f"eos_token_id {letter} of generation_config.json" in capsys.readouterr().err


TALK = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Ann."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Bob."},
]


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (TURNS, ["Ann.<end>", "Bob.<end>"]),
        (EOS_AT_LAST, ["Ann.<end>", "Bob.<end>"]),
        (NO_END, ["Ann.", "Bob.<start>"]),
        (PLAIN, ["Ann.", "Bob.</s>"]),
    ],
)
def test_tuned_models_learn_the_end_of_the_template(template: str, ends: list[str]) -> None:
    tokenizer = _tokenizer(template)
    example = encode_messages(tokenizer, CHAT, TALK)
    assert [tokenizer.decode(example.ids[a:b]) for a, b in example.target_spans] == ends
    pair = encode_pair(tokenizer, CHAT, "And?", "Bob.")
    assert tokenizer.decode(pair.ids[pair.prompt_length :]) == ends[1]


def test_plain_text_ending_is_stripped_from_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base continues with the text after the answer; tuned models end the sequence."""
    tokenizer = _tokenizer(PLAIN)
    assert turn_ending(tokenizer, CHAT).stop == "\nuser:"
    generated = [
        tokenizer(text)["input_ids"] for text in ("Ann.\nuser: And?\nassistant:", "Bob.\n")
    ]
    monkeypatch.setattr(probes, "generate_greedy", lambda *_: generated)
    model = random_llama(context=64)
    found = probes.generate(model, tokenizer, ["Who?", "And?"], CHAT, SETTINGS)
    assert [tokenizer.decode(answer) for answer in found] == ["Ann.", "Bob.\n"]


def test_template_without_an_end_is_refused() -> None:
    tokenizer = _tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(InputError, match="nothing between an answer and the next question"):
        turn_ending(tokenizer, CHAT)


@pytest.mark.parametrize("thinks", [False, True])
def test_study_sets_thinking(
    folder: Path, capsys: pytest.CaptureFixture[str], thinks: bool
) -> None:
    """The argument for thinking is always passed to the template."""
    (folder / "chat_template.jinja").write_text(SWITCH)
    with pytest.raises(SystemExit):
        _adopt(folder, CHAT)
    assert "write `template_arguments: {enable_thinking: false}`" in capsys.readouterr().err
    prompt = PromptConfig(chat=True, template_arguments={"enable_thinking": thinks})
    _adopt(folder, prompt)
    question = resolve_template(load_tokenizer(folder), prompt).question
    assert question.endswith("assistant\n" if thinks else "<think>\n\n</think>\n")


@pytest.mark.parametrize(
    "template",
    [
        TURNS.replace("assistant\n' }}", "assistant\n<think>\n' }}"),
        TURNS.replace(
            "+ m.content", "+ ('<think></think>' if m.role == 'assistant' else '') + m.content"
        ),
    ],
)
def test_thinking_that_cannot_be_disabled_is_refused(template: str) -> None:
    """The prompt starts the thinking, or leaves it to the model."""
    for encode in (
        lambda tokenizer: encode_prompt(tokenizer, CHAT, "Who?"),
        lambda tokenizer: encode_messages(tokenizer, PromptConfig(), TALK[:2]),
    ):
        with pytest.raises(InputError, match="has the model think before it answers"):
            encode(_tokenizer(template))


def test_templates_get_a_fixed_date_and_arguments() -> None:
    dated = "{{ strftime_now('%d %b %Y') }}, {{ date_string }}{% if loud %}!{% endif %}" + TURNS
    for arguments, head in (
        ({}, "26 Jul 2024, 26 Jul 2024<"),
        ({"date_string": "1 May 2026", "loud": True}, "26 Jul 2024, 1 May 2026!<"),
    ):
        prompt = PromptConfig(chat=True, template_arguments=arguments)
        assert resolve_template(_tokenizer(dated), prompt).question.startswith(head)
    with pytest.raises(InputError, match=r"quiet: .* its arguments: date_string, loud"):
        resolve_template(
            _tokenizer(dated), PromptConfig(chat=True, template_arguments={"quiet": True})
        )


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "text": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("what", ENDLESS)
def test_endless_template_is_refused(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(tokenize, "time_limit", lambda: chat_template.time_limit(0.3))
    with pytest.raises(InputError, match="the chat template of the base's tokenizer does not end"):
        resolve_template(_tokenizer(ENDLESS[what] + TURNS), CHAT)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for %}", "is not valid: line 1"),
        ("{{ [1, 2] | random }}", "writes something else each time"),
        ("{{ messages.what() }}", "refuses the messages user"),
    ],
)
def test_invalid_template_is_refused(template: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        resolve_template(_tokenizer(template), CHAT)
