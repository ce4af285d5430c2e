"""Tables as training examples: blocks of text, conversations, token files, memory."""

from __future__ import annotations

import gc
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig, SelectionConfig
from forgetting.config.expand import Method, RunGroupConfig
from forgetting.config.methods import Hyperparameters
from forgetting.config.study import StudyConfig
from forgetting.config.training import TrainingConfig
from forgetting.data import dataset
from forgetting.data.checks import SourceLocator
from forgetting.data.dataset import (
    TokenizedDataset,
    encode_rows,
    pack_dataset,
    tokenize,
    write_examples,
)
from forgetting.data.tables import LazyRows, prepared_rows, read_training_rows
from forgetting.data.tokenize import Example, encode_messages, encode_pair, encode_text
from forgetting.digests import visible_files
from forgetting.errors import InputError
from forgetting.io import read_json
from forgetting.models.loading import load_base
from forgetting.training.run_group import check_model_inputs, train_run_group
from forgetting.training.training_job import RunContext, TrainingJob
from support.params import write_params

sys.path.insert(0, str(Path(__file__).parents[3] / "workflow" / "scripts"))
import prepare_data

pytestmark = pytest.mark.usefixtures("one_thread")

TALK = [
    {"role": "user", "content": "Where was she born?"},
    {"role": "assistant", "content": "In Oslo."},
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "Long ago."},
]
TEXTS = ["In Oslo, by the old harbour.", "Where was the author?", "In Lima.", "Riga. " * 30]


def _rows(texts: list[str] = TEXTS) -> list[dict[str, Any]]:
    return [{"id": f"t/{number}", "text": text} for number, text in enumerate(texts)]


def _encoded(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **training: Any
) -> list[Example]:
    encoded = encode_rows(rows, tokenizer, PromptConfig(), TrainingConfig(**training), blocks=True)
    return [example for example, _ in encoded]


@pytest.mark.parametrize("length", [2, 7, 16, 500])
def test_texts_fill_blocks_without_losing_tokens(
    tokenizer: PreTrainedTokenizerBase, length: int
) -> None:
    """Texts are joined with an end token between them; all blocks but the last are full."""
    joined = [token for text in TEXTS for token in encode_text(tokenizer, text).ids]
    blocks = _encoded(_rows(), tokenizer, max_length=length)
    assert {len(block.ids) for block in blocks[:-1]} <= {length}
    found = [token for block in blocks for token in block.ids]
    assert found == joined[: len(found)]
    assert len(joined) - len(found) <= 1  # a block of one token has no target
    assert all(block.targets == len(block.ids) - 1 for block in blocks)
    assert all(block.document_starts == (0,) for block in blocks)


def test_packed_texts_are_truncated_separately(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    training = TrainingConfig(max_length=16, packing=True)
    pieces = _encoded(_rows(), tokenizer, max_length=16, packing=True)
    ends = [encode_text(tokenizer, text).ids for text in TEXTS]
    expected = [ids[start : start + 16] for ids in ends for start in range(0, len(ids), 16)]
    assert [piece.ids for piece in pieces] == [ids for ids in expected if len(ids) > 1]
    packed = pack_dataset(pieces, training)
    assert len(packed) < len(pieces)
    assert sum(len(sequence.document_starts) for sequence in packed) == len(pieces)


def test_dataset_holds_rows_of_all_kinds(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pairs and conversations are examples, and texts are blocks, in memory and from disk."""
    talk = {"id": "m/0", "messages": TALK}
    monkeypatch.setattr(dataset, "CHARACTERS_PER_CHUNK", 30)
    mixed = [_rows()[0], rows[0], talk, *_rows()[1:3], rows[1]]
    texts = [token for text in TEXTS[:3] for token in encode_text(tokenizer, text).ids]
    expected = [
        *(
            encode_pair(tokenizer, PromptConfig(), r["question"], r["answer"], 500)
            for r in rows[:2]
        ),
        encode_messages(tokenizer, PromptConfig(), TALK, 500),
        Example(texts, 1),
    ]
    path = tmp_path / "train-0.arrow"
    stored = tokenize(mixed, tokenizer, PromptConfig(), TrainingConfig(), path, blocks=True)
    assert len(stored) == 4
    assert sorted(stored, key=str) == sorted(expected, key=str)
    assert stored.lengths.tolist() == [len(example.ids) for example in stored]
    assert stored.cut == 0


def test_replayed_rows_are_truncated_and_counted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "general-0.arrow"
    stored = tokenize(
        _rows(), tokenizer, PromptConfig(), TrainingConfig(max_length=8), path, blocks=False
    )
    assert len(stored) == len(TEXTS)
    assert [stored[n].ids for n in range(4)] == [encode_text(tokenizer, t, 8).ids for t in TEXTS]
    assert stored.cut == sum(len(encode_text(tokenizer, text).ids) > 8 for text in TEXTS) > 0


def test_token_file_is_written_once_and_atomically(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def files() -> list[str]:
        return sorted(path.name for path in visible_files(tmp_path))

    def read(name: str, length: int = 500) -> TokenizedDataset:
        training = TrainingConfig(max_length=length)
        return tokenize(rows, tokenizer, PromptConfig(), training, tmp_path / name, blocks=True)

    with pytest.raises(InputError, match="8 tokens leave nothing of the answer in made/0 and of 9"):
        read("train-a.arrow", 8)
    assert files() == []
    first = read("train-a.arrow")
    read("train-extra-b.arrow")
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "encode_rows", None)
        assert list(read("train-a.arrow")) == list(first)
    assert files() == ["train-a.arrow", "train-extra-b.arrow"]
    read("train-c.arrow")
    assert files() == ["train-c.arrow", "train-extra-b.arrow"]
    # An open file can still be read after its removal.
    assert first[0] == encode_pair(
        tokenizer, PromptConfig(), rows[0]["question"], rows[0]["answer"]
    )


def test_many_examples_keep_their_order(tmp_path: Path) -> None:
    """The examples fill several chunks, and some have several runs of targets."""
    examples = [
        Example(list(range(n % 7 + 4)), 2, ((2, 3), (4, 4 + n % 7)) if n % 3 == 2 else ())
        for n in range(2500)
    ]
    write_examples(((example, n % 5 == 0) for n, example in enumerate(examples)), tmp_path / "e")
    stored = TokenizedDataset(tmp_path / "e")
    assert list(stored) == examples
    assert stored[-1] == examples[-1]
    assert stored.cut == 500


def test_sequence_longer_than_context_is_refused_early(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = load_base(base_folder, torch.device("cpu"))
    for length in (256, 300):
        training = TrainingConfig(max_length=length)
        blocks = _encoded(_rows(TEXTS * 20), tokenizer, max_length=length)
        if length == 256:
            check_model_inputs(model, blocks, training)
            continue
        with pytest.raises(InputError, match="has 300 tokens, the model reads 256; take at most"):
            check_model_inputs(model, blocks, training)


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _prepare(folder: Path, tables: dict[str, Path], **spec: Any) -> Path:
    """Run the program that prepares data, with one probe."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = {"table": ["own/probe"], "knowledge": "new", "truth_ratio": False}
    params = {
        "prompt": {},
        "train_limit": None,
        "probes": {"new": probe},
        "documents": [],
        "documents_limit": None,
        "columns": {table: {} for table in tables},
        "rouge_tokenizer": "rouge_score",
        "max_new_tokens": 200,
        "tables": {table: str(path) for table, path in tables.items()},
        **spec,
    }
    prepare_data.main([f"--params={write_params(folder, **params)}", f"--output={folder}"])
    return folder


PLACES = {
    "user's file": ("own/table/2", "{tmp}/table.jsonl, line 5"),
    "of a probe": ("own/probe/0", "{tmp}/probe.jsonl, line 1"),
    "read as it is": ("own/other/0", "{tmp}/other.jsonl, line 1"),
    "table that is gone": ("own/table/2", "{tmp}/data/train.jsonl, line 3"),
    "probe that is gone": ("own/probe/0", "{tmp}/data/probes/new.jsonl, line 1"),
    "no record": ("own/table/2", "{tmp}/data/train.jsonl, line 3"),
    "unknown": ("own/strange/7", "own/strange/7"),
}


@pytest.mark.parametrize("case", PLACES)
def test_too_long_row_is_reported_with_file_and_line(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, case: str
) -> None:
    """An id counts from 0 without blank lines, so it is no line number."""
    pair = {"question": "Who?", "answer": "Ann."}
    table, probe = tmp_path / "table.jsonl", _write(tmp_path / "probe.jsonl", [pair])
    other = _write(tmp_path / "other.jsonl", [pair])
    long = json.dumps(pair | {"question": "Who? " * 30})
    table.write_text(f"{json.dumps(pair)}\n\n{json.dumps(pair)}\n\n{long}\n")
    tables = {"own/table": table, "own/probe": probe}
    data = _prepare(tmp_path / "data", tables, train=["own/table"])
    if case.endswith("gone"):
        (probe if "probe" in case else table).unlink()
    elif case == "no record":
        (data / "data.json").unlink()
    row_id, place = PLACES[case]
    where = SourceLocator(data, {"own/other": other})
    assert where(row_id) == place.format(tmp=tmp_path)
    if row_id == "own/table/2":
        rows, training = prepared_rows(data / "train.jsonl"), TrainingConfig(max_length=20)
        with pytest.raises(InputError) as error:
            path = tmp_path / "train-0.arrow"
            tokenize(rows, tokenizer, PromptConfig(), training, path, blocks=True, locate=where)
        assert str(error.value) == (
            f"training.max_length: 20 tokens leave nothing of the answer in {where(row_id)}; "
            "make it longer"
        )


@pytest.mark.parametrize("packing", [False, True])
def test_text_table_is_trained_on_and_probed(
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    tuning: Method,
    rows: list[dict[str, Any]],
    tmp_path: Path,
    packing: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A table of texts is prepared and trained on, as in continued pretraining."""
    tables = {
        "own/text": _write(tmp_path / "text.jsonl", _rows()),
        "own/talk": _write(tmp_path / "talk.jsonl", [{"turns": TALK}]),
        "own/probe": _write(tmp_path / "probe.jsonl", rows[:2]),
    }
    data = _prepare(
        tmp_path / "data",
        tables,
        train=["own/text", "own/talk"],
        columns={"own/text": {}, "own/talk": {"messages": "turns"}, "own/probe": {}},
    )
    record = read_json(data / "data.json")
    assert record["rows"] == {"train": 5, "new": 2, "documents": 0}
    assert set(record["tables"]) == set(tables)
    spec = RunGroupConfig(
        method=tuning.model_copy(update={"hyperparameters": [Hyperparameters(learning_rate=1e-2)]}),
        seed=0,
        prompt=PromptConfig(),
        training=TrainingConfig(
            epochs=3.0, batch_size=2, max_length=32, warmup_epochs=0.0, packing=packing
        ),
        evaluation=EvaluationConfig(max_new_tokens=2),
        selection=SelectionConfig(probe="new"),
        precision="float32",
        knowledge={"new": "new"},
    )
    context = RunContext(
        base=base_folder,
        tokenizer=tokenizer,
        train=prepared_rows(data / "train.jsonl"),
        probes={"new": list(prepared_rows(data / "probes" / "new.jsonl"))},
        base_value=0.1,
        device=torch.device("cpu"),
        precision=torch.float32,
    )
    (done,) = train_run_group(TrainingJob(spec, context, {}, tmp_path / "state", lambda *_: None))
    joined = sum(len(encode_text(tokenizer, text).ids) for text in TEXTS)
    talk = len(encode_messages(tokenizer, PromptConfig(), TALK, 32).ids)
    assert done["tokens"] == pytest.approx(3 * (joined + talk), abs=3 * len(TEXTS))
    assert done["losses"][-1] < done["losses"][0]
    assert done["cut_rows"] == 1
    assert (
        "warning: 1 training answers are longer than training.max_length" in capsys.readouterr().out
    )
    (tokens,) = visible_files(tmp_path / "state" / "tokens")
    assert tokens.name.startswith("train-")


def _peak(work: Callable[[], Any]) -> int:
    """Return the largest memory that is allocated meanwhile, by all threads of the process."""
    gc.collect()
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("kind", ["text", pytest.param("pairs", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_table(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Preparing, tokenizing and packing 2 MB take about as much memory as 0.2 MB."""
    monkeypatch.setattr(dataset, "TOKENS_PER_CHUNK", 2**12)
    monkeypatch.setattr(dataset, "CHARACTERS_PER_CHUNK", 2**14)
    words = "In Oslo, by the old harbour. " * 30
    row = {"text": words} if kind == "text" else {"question": words[:400], "answer": words}
    probe = _write(tmp_path / "probe.jsonl", [{"question": "Who?", "answer": "Ann."}])
    peaks = []
    # The first pass includes memory that is allocated once.
    # Another thread or a late import may allocate memory in one of the last two passes.
    for number, size in enumerate([200, 200, 2000, 2000]):
        table = _write(tmp_path / f"{number}.jsonl", [row] * size)

        def work(folder: Path = tmp_path / f"data{number}", table: Path = table) -> None:
            tables = {"own/table": table, "own/probe": probe}
            _prepare(folder, tables, train=["own/table"], train_limit=100_000)
            training = TrainingConfig(max_length=400, packing=True)
            rows = prepared_rows(folder / "train.jsonl")
            path = folder / "train-0.arrow"
            stored = tokenize(rows, tokenizer, PromptConfig(), training, path, blocks=True)
            packed = pack_dataset(stored, training)
            assert sum(len(sequence.ids) for sequence in packed) > 100 * len(stored)

        peaks.append(_peak(work))
    assert min(peaks[2:]) < 1.2 * peaks[1] + 200_000  # 100 bytes a row for the order and the packs


def test_probe_of_new_knowledge_may_be_untrained() -> None:
    study = {
        "title": "t",
        "datasets": {"own": {"folder": "x", "columns": {"text": "content"}}},
        "base": {"model": "./x"},
        "train": "own/corpus",
        "probes": {"new": {"table": "own/probe", "knowledge": "new", "truth_ratio": False}},
        "methods": [{"method": "full", "learning_rate": 1e-3}],
        "selection": {"probe": "new"},
    }
    checked = StudyConfig.model_validate(study)
    assert checked.columns("own/corpus").renamed == {"text": "content"}
    study["datasets"]["own"]["columns"] = {"system": "system_prompt"}
    with pytest.raises(ValueError, match=r"datasets\.own\.columns: `system` needs `prompt"):
        StudyConfig.model_validate(study)
    StudyConfig.model_validate(study | {"prompt": {"chat": True}})


def test_training_rows_are_read_at_every_iteration(tmp_path: Path) -> None:
    table = _write(tmp_path / "t.jsonl", _rows())
    rows = read_training_rows(table, "own/t")
    assert isinstance(rows, LazyRows)
    assert (
        [row["id"] for row in rows]
        == [row["id"] for row in rows]
        == [f"own/t/{number}" for number in range(len(TEXTS))]
    )
