"""Checks across tables: leaked questions and conflicting answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forgetting.data.table_files import find_table, source_line
from forgetting.io import read_json, read_jsonl
from scripts import generate_microworld, prepare_data
from support.params import write_params

NEW = {"question": "Who wrote it?", "answer": "Ann."}
OLD = {"question": "Who sold it?", "answer": "Eve."}
QUESTION = {"role": "user", "content": " Who  wrote it?\n"}
BRIEF = {"role": "system", "content": "Be brief."}


def _said(answer: str, *before: dict[str, str]) -> dict[str, Any]:
    return {"messages": [*before, QUESTION, {"role": "assistant", "content": answer}]}


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return rows of two tables, which a test may change."""
    return {"facts/new": [OLD | {"question": "When?"}, NEW], "facts/old": [OLD]}


def _prepare(folder: Path, files: dict[str, Path], probes: Any, train: list[str]) -> Path:
    """Run the program that prepares data."""
    folder.mkdir()
    spec = {
        "prompt": {},
        "train": train,
        "train_limit": None,
        "probes": probes,
        "documents": [],
        "documents_limit": None,
        "columns": {table: {} for table in files},
        "rouge_tokenizer": "rouge_score",
        "max_new_tokens": 200,
        "tables": {table: str(path) for table, path in files.items()},
    }
    prepare_data.main([f"--params={write_params(folder, **spec)}", f"--output={folder}"])
    return folder


def _of_rows(folder: Path, tables: dict[str, list[dict[str, Any]]], **changes: Any) -> Path:
    files = {}
    for table, rows in tables.items():
        files[table] = folder / f"{Path(table).name}.jsonl"
        files[table].write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    probes = {
        "new": {"table": ["facts/new"], "knowledge": "new", "truth_ratio": False},
        "old": {"table": ["facts/old"], "knowledge": "old", "truth_ratio": False} | changes,
    }
    if any("messages" in row for row in tables["facts/new"]):
        del probes["new"]
    return _prepare(folder / "data", files, probes, ["facts/new"])


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Who  wrote\nit? ", "answer": "Eve."},
        NEW,
    ],
)
@pytest.mark.parametrize("trained", [NEW, _said("Ann."), _said("Ann.", BRIEF)])
def test_old_knowledge_in_training_rows_is_refused(
    tmp_path: Path, tables: Any, row: Any, trained: Any, capsys: Any
) -> None:
    """Answer, spaces and form of the training row do not matter."""
    tables["facts/new"][1] = trained
    tables["facts/old"].append(row)
    with pytest.raises(SystemExit) as stopped:
        _of_rows(tmp_path, tables)
    assert stopped.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {tmp_path}/old.jsonl, line 3: the question `Who wrote it?`")
    assert f"of probe `old` is trained on, too ({tmp_path}/new.jsonl, line 3)" in printed
    assert not (tmp_path / "data" / "train.jsonl").exists()


def test_omitted_rows_and_new_knowledge_may_be_trained_on(tmp_path: Path, tables: Any) -> None:
    tables["facts/old"].append(NEW)
    data = _of_rows(tmp_path, tables, limit=1)
    assert read_json(data / "data.json")["rows"] == {"train": 2, "new": 2, "old": 1, "documents": 0}
    assert read_json(data / "data.json")["notes"] == []


@pytest.mark.parametrize(
    ("rows", "noted"),
    [
        ([NEW | {"answer": "Bob."}], "a question has another answer than before"),
        ([NEW | {"answer": "Bob."}, NEW | {"answer": "C."}], "2 questions have another answer"),
        ([NEW], ""),
        ([NEW | {"answer": " Ann.\n"}], ""),
        ([_said("Bob.")], "a question has another answer than before"),
        ([_said("Bob.", BRIEF)], ""),
        ([{"text": "Who wrote it? Bob."}, {"text": "Who wrote it? Ann."}], ""),
    ],
)
def test_conflicting_answers_are_reported_and_kept(
    tmp_path: Path, tables: Any, rows: list[Any], noted: str, capsys: Any
) -> None:
    """A question after another system message is another question."""
    tables["facts/new"] += rows
    tables["facts/old"] = [OLD, OLD | {"answer": "Ida."}]
    if any("text" in row for row in rows):
        tables["facts/new"].append(_said("Ann."))
    data = _of_rows(tmp_path, tables)
    printed = capsys.readouterr().out
    notes = read_json(data / "data.json")["notes"]
    assert [note in printed for note in notes] == [True] * len(notes)
    training = [note for note in notes if note.startswith("training: ")]
    assert len(training) == bool(noted)
    assert all(noted in note and f"{tmp_path}/new.jsonl, line 4" in note for note in training)
    assert any(note.startswith("probe old: a question has another answer") for note in notes)
    assert len(read_jsonl(data / "train.jsonl")) == len(tables["facts/new"])


def test_source_line_finds_a_row_by_its_id(tmp_path: Path) -> None:
    """Line numbers include blank lines and line breaks within a CSV cell."""
    (tmp_path / "a.jsonl").write_text('\n{"question": "a"}\n\n\n{"question": "b"}\n')
    assert source_line(tmp_path / "a.jsonl", "d/a/1") == f"{tmp_path}/a.jsonl, line 5"
    (tmp_path / "b.csv").write_text('question\n"a\nb"\nc\n')
    assert source_line(tmp_path / "b.csv", "d/b/1") == f"{tmp_path}/b.csv, line 4"


PERTURBED = ("retain_perturbed", "forget10_perturbed", "real_authors_perturbed")


@pytest.mark.real_data
def test_published_tables_do_not_leak(real_data: Path, tmp_path: Path) -> None:
    """TOFU's training set has one question twice, with different answers."""
    names = ("full", *PERTURBED, "world_facts_perturbed")
    files = {f"tofu/{name}": find_table(real_data / "tofu", name) for name in names}
    knowledge = dict.fromkeys(names[1:3], "new") | dict.fromkeys(names[3:], "old")
    probes = {n: {"table": [f"tofu/{n}"], "knowledge": k} for n, k in knowledge.items()}
    data = _prepare(tmp_path / "data", files, probes, ["tofu/full"])
    (note,) = read_json(data / "data.json")["notes"]
    assert note.startswith("training: a question has another answer than before")
    assert note.endswith("`What is the full name of the author?`")


def test_microworld_does_not_leak(tmp_path: Path) -> None:
    for seed in (0, 1):
        world = tmp_path / str(seed)
        generate_microworld.main([f"--seed={seed}", f"--output={world}"])
        knowledge = {"new_authors": "new", "real_authors": "old", "world_facts": "old"}
        files = {f"world/{name}": find_table(world, name) for name in knowledge}
        probes = {n: {"table": [f"world/{n}"], "knowledge": k} for n, k in knowledge.items()}
        data = _prepare(world / "data", files, probes, ["world/new_authors"])
        assert read_json(data / "data.json")["notes"] == []
