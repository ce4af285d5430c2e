"""Tables from the hub, in the forms in which they are published; the hub here is a folder."""

from __future__ import annotations

import datetime
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pandas as pd
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from forgetting.data.hub import fetch_model
from forgetting.inputs import model_files
from forgetting.records import read_jsonl

SCRIPT = Path(__file__).resolve().parents[1] / "workflow" / "scripts" / "download_table.py"
REVISION = "0123456789" * 4


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset whose files are those of a folder, at one revision."""
    folder = tmp_path / "repository"
    folder.mkdir()

    def download(dataset: str, name: str, repo_type: str, revision: str) -> str:
        assert (dataset, repo_type, revision) == ("someone/data", "dataset", REVISION)
        if not (folder / name).is_file():
            raise EntryNotFoundError(name)
        return str(folder / name)

    def listing(self: object, dataset: str, repo_type: str, revision: str) -> list[str]:
        paths = (path for path in folder.rglob("*") if path.is_file())
        return [str(path.relative_to(folder)) for path in paths]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listing)
    return folder


@pytest.fixture
def fetch(tmp_path: Path) -> Callable[[str], Path]:
    """Run the program that the rule runs; where its output is."""
    specification = importlib.util.spec_from_file_location("download_table", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    def run(table: str) -> Path:
        output = tmp_path / "out" / f"{table}.jsonl"
        options = ["--dataset=someone/data", f"--revision={REVISION}"]
        module.main([*options, f"--table={table}", f"--output={output}"])
        return output

    return run


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_lines_are_taken_as_they_are(
    repository: Path, fetch: Callable[[str], Path], form: str
) -> None:
    (repository / f"full.{form}").write_text('{"question": "Who?"}\n')
    assert fetch("full").read_text() == '{"question": "Who?"}\n'


def test_an_array_becomes_lines(
    repository: Path, fetch: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """As MetaMathQA is published."""
    rows = [{"query": "Zwölf?", "response": "12"}, {"query": "2\n3", "response": "5"}]
    (repository / "all.json").write_text(json.dumps(rows, indent=2))
    assert read_jsonl(fetch("all")) == rows
    (repository / "half.json").write_text('[{"query": "a"},')
    with pytest.raises(SystemExit):
        fetch("half")
    assert "half.json: neither lines of JSON nor an array" in capsys.readouterr().err


@pytest.mark.parametrize(
    "names",
    [
        ["train.parquet"],
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["train-00000-of-00002-5a023365406cb9c4.parquet", "train-00001-of-00002-5a02.parquet"],
    ],
)
def test_parquet_files_become_lines_in_their_order(
    repository: Path, fetch: Callable[[str], Path], names: list[str]
) -> None:
    """Also more rows than are read at once; what JSON has no form for becomes text."""
    (repository / "data").mkdir()
    day, place = datetime.datetime(2023, 4, 5), 0
    for name in names:
        rows = [{"text": f"Zwölf {place + n}", "day": day} for n in range(1500)]
        pd.DataFrame(rows).to_parquet(repository / "data" / name)
        place += 1500
    for other in ("data/train_small.parquet", "data/test-00000-of-00001.parquet"):
        pd.DataFrame({"text": ["no"]}).to_parquet(repository / other)
    rows = read_jsonl(fetch("data/train"))
    assert [row["text"] for row in rows] == [f"Zwölf {n}" for n in range(place)]
    assert rows[0]["day"].startswith("2023-04-05")


def test_a_table_that_is_not_there_is_told_with_what_was_looked_for(
    repository: Path, fetch: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        fetch("full")
    told = capsys.readouterr().err
    assert f"someone/data at {REVISION} has none of full.jsonl, full.json, full.parquet" in told
    assert not list(repository.parent.glob("out/*"))


def test_a_network_that_breaks_leaves_no_half_table(
    repository: Path,
    fetch: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    for name in names:
        pd.DataFrame({"text": ["some"]}).to_parquet(repository / name)
    working = huggingface_hub.hf_hub_download

    def breaking(dataset: str, name: str, **more: str) -> str:
        if name == names[1]:
            raise LocalEntryNotFoundError("no route to the hub")
        return str(working(dataset, name, **more))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", breaking)
    with pytest.raises(SystemExit):
        fetch("train")
    assert "cannot be fetched from the hub: check the network" in capsys.readouterr().err
    assert not list(repository.parent.glob("out/*"))


def test_all_files_that_a_tokenizer_reads_come_with_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Templates among them; documentation and other formats of the weights stay there."""
    read = {"config.json", "model.safetensors", "chat_template.jinja", "merges.txt", "vocab.bpe"}
    read |= {"additional_chat_templates/tools.jinja", "sentencepiece.bpe.model", "source.spm"}

    def download(model: str, local_dir: Path, **options: Any) -> None:
        patterns = {name: options[name] for name in ("allow_patterns", "ignore_patterns")}
        for name in filter_repo_objects([*read, "README.md", "pytorch_model.bin"], **patterns):
            (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (local_dir / name).touch()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    fetch_model("someone/model", REVISION, tmp_path)
    found = {path.relative_to(tmp_path).as_posix() for path in model_files(tmp_path)}
    assert found == read
    assert not [*tmp_path.glob("README*"), *tmp_path.glob("*.bin")]
