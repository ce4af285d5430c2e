"""The boundary of prompt and answer in tokens, and the end of sequence after the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from forgetting.config.data import PromptConfig
from forgetting.data.tables import document_texts
from forgetting.data.tokenize import encode_messages, encode_pair, encode_prompt, resolve_template
from forgetting.errors import InputError
from forgetting.models.loading import load_tokenizer

Rows = list[dict[str, Any]]
TEXTS = ["Question: Who wrote it?\nAnswer: William Shakespeare", "[INST] a [/INST]William"] * 3


def _tokenizer(*, bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words with the space before them, and bytes for the rest."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    single = ["<s>"] * bos + ["$A"] + ["</s>"] * eos
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(single), special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def _split(
    tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, question: str, answer: str
) -> tuple[list[str], list[str]]:
    example = encode_pair(tokenizer, prompt, question, answer)
    tokens = [tokenizer.decode([token]) for token in example.ids]
    return tokens[: example.prompt_length], tokens[example.prompt_length :]


def test_tofu_template_has_five_targets_for_two_names() -> None:
    """The targets are `Answer`, `:`, two names and the end, as in the logs of TOFU's Phi."""
    head, targets = _split(_tokenizer(), PromptConfig(), "Who wrote it?", "William Shakespeare")
    assert "".join(head) == "Question: Who wrote it?\n"
    assert targets == ["Answer", ":", " William", " Shakespeare", "</s>"]


def test_text_of_the_prompt_is_no_target() -> None:
    """`Answer:` is part of the prompt here, as in open-unlearning's template for Phi."""
    prompt = PromptConfig(question="Question: {question}\nAnswer:", answer=" {answer}")
    head, targets = _split(_tokenizer(), prompt, "Who wrote it?", "William Shakespeare")
    assert "".join(head) == "Question: Who wrote it?\nAnswer:"
    assert targets == [" William", " Shakespeare", "</s>"]


def test_chat_template_targets_are_answer_and_end() -> None:
    chat = PromptConfig(question="[INST] {question} [/INST]", answer="{answer}")
    head, targets = _split(_tokenizer(bos=True), chat, "Who wrote it?", "William")
    assert "".join(head) == "<s>[INST] Who wrote it? [/INST]"
    assert targets == ["William", "</s>"]


def test_training_prompt_equals_generation_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, rows: Rows
) -> None:
    """The prompt of an example has the tokens of the prompt alone, and no text is lost."""
    for row in rows:
        example = encode_pair(tokenizer, prompt, row["question"], row["answer"])
        assert example.ids[: example.prompt_length] == encode_prompt(
            tokenizer, prompt, row["question"]
        )
        text = prompt.render_question(row["question"]) + prompt.render_answer(row["answer"])
        assert tokenizer.decode(example.ids[:-1]) == text
        assert example.ids[-1] == tokenizer.eos_token_id
        assert example.targets == len(example.ids) - example.prompt_length


def test_token_across_the_boundary_is_split() -> None:
    """`Shakes` and `peare` are one token together, and two in an example."""
    tokenizer = _tokenizer()
    assert len(tokenizer(" Shakespeare")["input_ids"]) == 1
    prompt = PromptConfig(question="{question} Shakes", answer="{answer}")
    head, targets = _split(tokenizer, prompt, "Who?", "peare")
    assert "".join(head) == "Who? Shakes"
    assert "".join(targets) == "peare</s>"


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True)])
def test_special_tokens_occur_once(bos: bool, eos: bool) -> None:
    """There is one BOS if the tokenizer has one, and one end, after the answer."""
    tokenizer = _tokenizer(bos=bos, eos=eos)
    for question in ("Who wrote it?", "Who Shakes"):
        prompt = PromptConfig(question="{question}", answer="{answer}")
        example = encode_pair(tokenizer, prompt, question, "peare William")
        assert example.ids.count(0) == int(bos)
        assert (example.ids[0] == 0) is bos
        assert example.ids.count(1) == 1
        assert example.ids[-1] == 1
        head = encode_prompt(tokenizer, prompt, question)
        assert example.ids[: example.prompt_length] == head
        assert 1 not in head


def test_truncated_answer_has_no_end_token(
    tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, rows: Rows
) -> None:
    """An answer that just fits keeps its end token."""
    row = rows[1]
    whole = encode_pair(tokenizer, prompt, row["question"], row["answer"])
    size = len(whole.ids)
    for length in (size + 5, size):
        assert encode_pair(tokenizer, prompt, row["question"], row["answer"], length) == whole
    for length in (size - 1, size - 2, whole.prompt_length + 1):
        cut = encode_pair(tokenizer, prompt, row["question"], row["answer"], length)
        assert cut.ids == whole.ids[:length]
        assert tokenizer.eos_token_id not in cut.ids
        assert cut.targets == length - whole.prompt_length


def test_truncation_in_the_prompt_leaves_no_targets(
    tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, rows: Rows
) -> None:
    """The count of targets is 0, so that the caller can refuse the row."""
    assert encode_pair(tokenizer, prompt, rows[0]["question"], rows[0]["answer"], 4).targets < 1


@pytest.mark.real_data
def test_llama_like_tokenizer_adds_one_bos_token(real_data: Path, prompt: PromptConfig) -> None:
    """It has one BOS and no token across the boundary."""
    tokenizer = load_tokenizer(real_data / "stories260K")
    chat = PromptConfig(question="[INST] {question} [/INST]", answer="{answer}")
    for template in (prompt, chat):
        example = encode_pair(tokenizer, template, "Who was Tim?", "A boy named Tim.")
        assert example.ids.count(tokenizer.bos_token_id) == 1
        assert example.ids[: example.prompt_length] == encode_prompt(
            tokenizer, template, "Who was Tim?"
        )
        answer = tokenizer.decode(example.ids[example.prompt_length :], skip_special_tokens=True)
        assert answer.strip() == template.render_answer("A boy named Tim.")


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + "
    "' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# The template adds a text before an answer and removes it from earlier answers.
PREFACED = (
    "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ 'Well: ' }}{% endif %}{{ m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
CHAT = PromptConfig(chat=True)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who wrote it?"},
    {"role": "assistant", "content": "William"},
    {"role": "user", "content": "William who?"},
    {"role": "assistant", "content": "Shakespeare"},
]


def _chat(template: str, *, end: str = "</s>") -> PreTrainedTokenizerFast:
    """Return a tokenizer with a chat template, whose BOS also precedes plain text."""
    tokenizer = _tokenizer(bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = end
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_pair_has_the_tokens_of_apply_chat_template(system: str | None) -> None:
    tokenizer = _chat(CHATML, end="<|im_end|>")
    prompt = PromptConfig(chat=True, system=system)
    messages = [{"role": "user", "content": "Who wrote it?"}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    head = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(tokenizer, prompt, "Who wrote it?") == head
    messages.append({"role": "assistant", "content": "William Shakespeare"})
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    example = encode_pair(tokenizer, prompt, "Who wrote it?", "William Shakespeare")
    assert example.prompt_length == len(head)
    # The line end after the answer is left out.
    assert example.ids == whole[: len(example.ids)]
    assert tokenizer.decode(example.ids[example.prompt_length :]) == "William Shakespeare<|im_end|>"
    assert tokenizer.decode(whole[len(example.ids) :]) == "\n"


def test_chat_templates_have_one_bos_and_one_end() -> None:
    """In Llama 2's template BOS is the template's, and the end is not doubled."""
    tokenizer = _chat(LLAMA2)
    example = encode_pair(tokenizer, CHAT, "Who wrote it?", "William")
    assert tokenizer.decode(example.ids) == "<s>[INST] Who wrote it? [/INST] William </s>"
    assert tokenizer.decode(example.ids[example.prompt_length :]) == " William </s>"
    # If the end of a turn is not the end of the sequence, answers end with that of the turn.
    example = encode_pair(_chat(CHATML), CHAT, "Who?", "William")
    assert tokenizer.decode(example.ids[example.prompt_length :]) == "William<|im_end|>"


def test_text_before_answers_is_learned_and_stripped() -> None:
    tokenizer = _chat(PREFACED)
    example = encode_pair(tokenizer, CHAT, "Who?", "William")
    generated = tokenizer.decode(example.ids[example.prompt_length :], skip_special_tokens=True)
    assert generated == "Well: William"
    assert resolve_template(tokenizer, CHAT).strip_answer(generated) == "William"


def test_only_answers_of_a_conversation_are_targets() -> None:
    tokenizer = _chat(CHATML, end="<|im_end|>")
    example = encode_messages(tokenizer, CHAT, TALK)
    targets = [tokenizer.decode(example.ids[a:b]) for a, b in example.target_spans]
    assert targets == ["William<|im_end|>", "Shakespeare<|im_end|>"]
    whole = tokenizer.apply_chat_template(TALK, return_dict=False)
    assert example.ids == whole[: len(example.ids)]
    # A last question without an answer is left out.
    assert encode_messages(tokenizer, CHAT, TALK[:4]) == encode_messages(tokenizer, CHAT, TALK[:3])
    # Conversations without a system message get the study's.
    brief = PromptConfig(chat=True, system="Be brief.")
    assert encode_messages(tokenizer, brief, TALK[1:]) == example
    assert encode_messages(tokenizer, brief, TALK) == example


@pytest.mark.parametrize("template", [CHATML, LLAMA2, PREFACED])
def test_conversation_of_one_turn_equals_a_pair(template: str) -> None:
    tokenizer = _chat(template)
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "William"}]
    for length in (None, 5, 9):
        example = encode_messages(tokenizer, CHAT, talk, length)
        assert example == encode_pair(tokenizer, CHAT, "Who?", "William", length)


def test_truncated_conversation_keeps_earlier_answers() -> None:
    tokenizer = _chat(CHATML, end="<|im_end|>")
    whole = encode_messages(tokenizer, CHAT, TALK)
    (first, end), (second, _) = whole.target_spans
    for length, spans in [
        (second + 1, ((first, end), (second, second + 1))),
        (second, ((first, end),)),
        (first + 1, ((first, first + 1),)),
    ]:
        cut = encode_messages(tokenizer, CHAT, TALK, length)
        assert (cut.ids, cut.spans) == (whole.ids[:length], spans)
    assert encode_messages(tokenizer, CHAT, TALK, first).targets < 1


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "tokenizer has no chat template; write the prompt as `question` and `answer`"),
        (LLAMA2, "refuses the messages system, user: only user and assistant"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not repeat question and answer"),
    ],
)
def test_unsuitable_template_is_refused(template: str | None, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        encode_prompt(_chat(template), PromptConfig(chat=True, system="Be brief."), "Who?")


def test_template_that_rewrites_turns_is_refused() -> None:
    with pytest.raises(InputError, match="make each turn a row"):
        encode_messages(_chat(PREFACED), CHAT, TALK)


def test_prompt_does_not_depend_on_the_current_date() -> None:
    """Llama 3's template writes the current date unless a variable sets it."""
    template = (
        "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}\n" + LLAMA2
    )
    assert resolve_template(_chat(template), CHAT).question.startswith("26 Jul 2024\n")


def test_documents_of_a_chat_study_use_its_template(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The micro-world's model thus sees the template in pretraining."""
    table = tmp_path / "t.jsonl"
    table.write_text('{"question": "Who?", "answer": "Ann."}\n')
    for prompt in (CHAT, PromptConfig(chat=True, system="Be brief.")):
        written = resolve_template(tokenizer, prompt)
        (document,) = document_texts(table, prompt)
        text = written.render_question("Who?") + written.render_answer("Ann.")
        assert document + tokenizer.eos_token == text


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"system": "Be brief."}, "`system` needs `chat: true`"),
        ({"chat": True, "question": "Q: {question}"}, "remove `question` and `answer`"),
    ],
)
def test_prompt_has_one_template(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        PromptConfig.model_validate(values)
