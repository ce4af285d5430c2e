"""Pretraining: packing does not change losses, and equal inputs give equal bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from forgetting.config.base_model import SmallModelConfig
from forgetting.errors import InputError
from forgetting.io import read_json, write_jsonl
from forgetting.schedule import LrSchedule
from forgetting.training.checkpoints import TrainState
from forgetting.training.pretrain import pretrain, train_tokenizer
from scripts import pretrain_base
from support.params import write_params
from support.pretraining import SPEC, file_digests, some_documents

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return some_documents()


@pytest.fixture(scope="module")
def base(documents, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "base"
    pretrain(documents, SPEC, out, out.parent / "state", seed=3)
    return out


def test_record_has_device_precision_and_threads(documents, tmp_path) -> None:
    """The numbers of a base depend on them, so that the page can name them."""
    write_jsonl(tmp_path / "documents.jsonl", [{"text": text} for text in documents])
    spec = SPEC.model_copy(update={"epochs": 0.1}).model_dump(mode="json")
    arguments = {
        "params": write_params(tmp_path, model=spec, seed=0, precision="float32"),
        "documents": tmp_path / "documents.jsonl",
        "folder": tmp_path / "model",
        "state": tmp_path / "state",
        "layers": tmp_path / "layers.json",
        "output": tmp_path / "base.json",
    }
    pretrain_base.main([f"--{key}={value}" for key, value in arguments.items()])
    record = read_json(tmp_path / "base.json")
    assert read_json(tmp_path / "layers.json")["parameters"] == record["parameters"]
    assert record["precision"] == "float32" and record["machine"]["threads"] == 1
    assert record["device"].startswith("CPU, 1 of ")


def test_equal_inputs_give_equal_bytes(documents, base, tmp_path) -> None:
    """The global random state is neither used nor changed."""
    torch.manual_seed(99)
    before = torch.get_rng_state()
    pretrain(documents, SPEC, tmp_path / "again", tmp_path / "state", seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert file_digests(tmp_path / "again") == file_digests(base)


def test_another_seed_gives_another_model(documents, base, tmp_path) -> None:
    pretrain(documents, SPEC, tmp_path / "other", tmp_path / "state", seed=4)
    name = "model.safetensors"
    assert file_digests(tmp_path / "other")[name] != file_digests(base)[name]


def test_transformers_loads_what_was_saved(base) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert isinstance(model, LlamaForCausalLM)
    assert model.config.max_position_embeddings == 2048
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.dtype == torch.float32


def test_no_partial_folder_is_left(base) -> None:
    assert [path.name for path in base.parent.iterdir()] == ["base"]


def test_a_failure_leaves_the_old_folder(documents, base, tmp_path, monkeypatch) -> None:
    out = tmp_path / "base"
    pretrain(documents, SPEC, out, tmp_path / "state", seed=3)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(documents, SPEC, out, tmp_path / "state", seed=4, log=fail)
    assert file_digests(out) == file_digests(base)


def test_no_documents_is_an_error_that_says_so(tmp_path) -> None:
    with pytest.raises(ValueError, match="no documents"):
        pretrain([], SPEC, tmp_path / "base", tmp_path / "state", seed=0)


def test_progress_is_logged_after_every_step(documents, tmp_path) -> None:
    logged: list[tuple[int, int, float]] = []

    def log(state: TrainState, schedule: LrSchedule) -> None:
        logged.append((state.step, schedule.steps, state.losses[-1]))

    done = pretrain(documents, SPEC, tmp_path / "base", tmp_path / "state", seed=0, log=log)
    assert [step for step, _, _ in logged] == [*range(1, done.steps + 1)]
    assert logged[-1] == (done.steps, done.steps, done.final_loss)


def test_a_diverging_pretraining_ends_with_a_message(documents, tmp_path) -> None:
    spec = SPEC.model_copy(update={"learning_rate": 1e4})
    with pytest.raises(InputError, match=r"base\.pretrain: the loss diverged after"):
        pretrain(documents, spec, tmp_path / "base", tmp_path / "state", seed=3)
    assert not (tmp_path / "base").exists()


def test_packed_documents_have_their_separate_loss(documents, base, tmp_path) -> None:
    """With all documents in one step, the loss is the mean over their separate tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(3)
    model = LlamaForCausalLM(AutoModelForCausalLM.from_pretrained(base).config)
    total, targets = 0.0, 0
    for text in documents:
        ids = torch.tensor(
            [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id][: SPEC.block_size]]
        )
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        targets += ids.shape[1] - 1
    spec = SPEC.model_copy(update={"batch_tokens": 100_000, "epochs": 1.0})
    done = pretrain(documents, spec, tmp_path / "base", tmp_path / "state", seed=3)
    assert done.steps == 1
    assert done.final_loss == pytest.approx(total / targets, rel=1e-5)


def test_training_lowers_the_loss(documents, tmp_path) -> None:
    spec = SPEC.model_copy(update={"epochs": 9.0})
    short = pretrain(documents, SPEC, tmp_path / "short", tmp_path / "state", seed=0)
    long = pretrain(documents, spec, tmp_path / "long", tmp_path / "state", seed=0)
    assert long.final_loss < short.final_loss - 0.5
    assert long.tokens == pytest.approx(6 * short.tokens, rel=0.05)


def test_tokenizer_round_trip(base) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    for text in [
        "Emily Brontë, 1818.\n\n  def f(x):\n    return x",
        "日本 ✓ <<3+4=7>>7",
        "\n#### 12",
    ]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_splits_digits_and_line_ends(base) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.tokenize("1234")[-4:] == ["1", "2", "3", "4"]
    assert len(tokenizer("\n\n")["input_ids"]) == 2


@pytest.mark.parametrize(
    ("prompt", "rest"),
    [
        ("Question: Who wrote 'Emma'?\n", "Answer: Jane Austen"),
        ('def f(x: int) -> int:\n    """Return x."""\n', "    return x\n"),
        ("Question: How many are left?\nAnswer:", " 3+4=<<3+4=7>>7\n#### 7"),
    ],
)
def test_prompt_tokens_do_not_depend_on_the_answer(base, prompt, rest) -> None:
    """Otherwise a benchmark would start from tokens that did not occur in training."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    head = tokenizer(prompt)["input_ids"]
    assert tokenizer(prompt + rest)["input_ids"][: len(head)] == head


def test_tokenizer_has_the_requested_vocab_size(documents, tmp_path) -> None:
    assert len(train_tokenizer(documents, 500, tmp_path)) == 500


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden"):
        SmallModelConfig(hidden=3)  # type: ignore[call-arg]
