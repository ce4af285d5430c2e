"""Where the prompt ends and the answer begins, in tokens; and that one end of sequence follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from forgetting.data import render_answer, render_question
from forgetting.encode import encode_pair, encode_prompt
from forgetting.models import load_tokenizer
from forgetting.study import Prompt

Rows = list[dict[str, Any]]
TEXTS = ["Question: Who wrote it?\nAnswer: William Shakespeare", "[INST] a [/INST]William"] * 3


def _tokenizer(*, bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """Words with the space in front as tokens, and single bytes for all else."""
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
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, question: str, answer: str
) -> tuple[list[str], list[str]]:
    example = encode_pair(tokenizer, prompt, question, answer)
    tokens = [tokenizer.decode([token]) for token in example.ids]
    return tokens[: example.prompt], tokens[example.prompt :]


def test_tofus_template_counts_five_targets_for_two_names() -> None:
    """With a token per word, `Answer`, `:`, two names and the end: as in the logs of TOFU's Phi."""
    head, targets = _split(_tokenizer(), Prompt(), "Who wrote it?", "William Shakespeare")
    assert "".join(head) == "Question: Who wrote it?\n"
    assert targets == ["Answer", ":", " William", " Shakespeare", "</s>"]


def test_a_chat_template_counts_only_the_answer_and_the_end() -> None:
    chat = Prompt(question="[INST] {question} [/INST]", answer="{answer}")
    head, targets = _split(_tokenizer(bos=True), chat, "Who wrote it?", "William")
    assert "".join(head) == "<s>[INST] Who wrote it? [/INST]"
    assert targets == ["William", "</s>"]


def test_what_is_trained_on_is_what_a_generation_starts_from(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, rows: Rows
) -> None:
    """The prompt of an example has exactly the tokens of the prompt alone; all text is there."""
    for row in rows:
        example = encode_pair(tokenizer, prompt, row["question"], row["answer"])
        assert example.ids[: example.prompt] == encode_prompt(tokenizer, prompt, row["question"])
        text = render_question(prompt, row["question"]) + render_answer(prompt, row["answer"])
        assert tokenizer.decode(example.ids[:-1]) == text
        assert example.ids[-1] == tokenizer.eos_token_id
        assert example.targets == len(example.ids) - example.prompt


def test_a_token_across_the_boundary_is_split_there() -> None:
    """`Shakes` and `peare` are one token together; apart, the prompt stays what it is alone."""
    tokenizer = _tokenizer()
    assert len(tokenizer(" Shakespeare")["input_ids"]) == 1
    prompt = Prompt(question="{question} Shakes", answer="{answer}")
    head, targets = _split(tokenizer, prompt, "Who?", "peare")
    assert "".join(head) == "Who? Shakes"
    assert "".join(targets) == "peare</s>"


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True)])
def test_special_tokens_stand_once_and_in_their_place(bos: bool, eos: bool) -> None:
    """One beginning if the tokenizer has one, never an end before the answer, one after it."""
    tokenizer = _tokenizer(bos=bos, eos=eos)
    for question in ("Who wrote it?", "Who Shakes"):
        prompt = Prompt(question="{question}", answer="{answer}")
        example = encode_pair(tokenizer, prompt, question, "peare William")
        assert example.ids.count(0) == int(bos)
        assert (example.ids[0] == 0) is bos
        assert example.ids.count(1) == 1
        assert example.ids[-1] == 1
        head = encode_prompt(tokenizer, prompt, question)
        assert example.ids[: example.prompt] == head
        assert 1 not in head


def test_a_cut_answer_is_not_taught_to_end_there(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, rows: Rows
) -> None:
    """Cut text has no end of sequence; text that just fits with its end keeps it."""
    row = rows[1]
    whole = encode_pair(tokenizer, prompt, row["question"], row["answer"])
    size = len(whole.ids)
    for length in (size + 5, size):
        assert encode_pair(tokenizer, prompt, row["question"], row["answer"], length) == whole
    for length in (size - 1, size - 2, whole.prompt + 1):
        cut = encode_pair(tokenizer, prompt, row["question"], row["answer"], length)
        assert cut.ids == whole.ids[:length]
        assert tokenizer.eos_token_id not in cut.ids
        assert cut.targets == length - whole.prompt


def test_a_cut_inside_the_prompt_leaves_nothing_to_train_on(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, rows: Rows
) -> None:
    """Fewer than one target: the caller refuses it, so the count must say so."""
    assert encode_pair(tokenizer, prompt, rows[0]["question"], rows[0]["answer"], 4).targets < 1


@pytest.mark.real_data
def test_a_published_tokenizer_with_a_beginning_token(real_data: Path, prompt: Prompt) -> None:
    """A sentencepiece-like Llama tokenizer: one beginning, no token across the boundary."""
    tokenizer = load_tokenizer(real_data / "stories260K")
    chat = Prompt(question="[INST] {question} [/INST]", answer="{answer}")
    for template in (prompt, chat):
        example = encode_pair(tokenizer, template, "Who was Tim?", "A boy named Tim.")
        assert example.ids.count(tokenizer.bos_token_id) == 1
        assert example.ids[: example.prompt] == encode_prompt(tokenizer, template, "Who was Tim?")
        told = tokenizer.decode(example.ids[example.prompt :], skip_special_tokens=True)
        assert told.strip() == render_answer(template, "A boy named Tim.")
