"""Downloads of tables and models: complete and verified, or one message and no file.

A small HTTP server serves a folder as the hub serves a repository.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub.constants
import pandas as pd
import pytest
from huggingface_hub.utils import disable_progress_bars

from forgetting.data.hub import HubDataset
from forgetting.io import read_jsonl
from scripts import download_benchmark, download_model, download_table

REVISION = "0123456789" * 4
LARGE = 4096
"""Files of this size or more are stored as the hub stores large files."""


@dataclass
class Hub:
    """A hub with one repository, someone/data, and its errors.

    Attributes:
        folder: the files.
        error: status and `X-Error-Code` of all answers.
        lists: whether the list of files has no error.
        replaced: content that is sent instead of a file's content.
        lost: files that are listed and missing.
        requests: paths of all requests.
    """

    folder: Path
    error: tuple[int, str] | None = None
    lists: bool = False
    replaced: dict[str, bytes] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def listing(self) -> list[dict[str, Any]]:
        """Return every file with its published digests."""
        entries = []
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            content = path.read_bytes()
            entry: dict[str, Any] = {
                "type": "file",
                "path": path.relative_to(self.folder).as_posix(),
                "size": len(content),
                "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
            }
            if len(content) >= LARGE:
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return entries

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and content of an answer."""
        path = path.partition("?")[0]
        self.requests.append(path)
        if self.error and not (self.lists and "/tree/" in path):
            status, code = self.error
            return status, {"X-Error-Code": code}, b"{}"
        if "/tree/" in path:
            return 200, {}, json.dumps(self.listing()).encode()
        name = path.partition(f"/resolve/{REVISION}/")[2]
        if name in self.lost or not (self.folder / name).is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        content = (self.folder / name).read_bytes()
        headers = {"X-Repo-Commit": REVISION, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        return 200, headers, self.replaced.get(name, content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Start the hub, and configure the programs to use it."""
    served = Hub(tmp_path / "repository")
    served.folder.mkdir()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, content = served.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    at = f"http://127.0.0.1:{server.server_port}"
    _point(monkeypatch, at)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    disable_progress_bars()
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def _point(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def repository(hub: Hub) -> Path:
    """Return the folder of the repository."""
    return hub.folder


@pytest.fixture
def fetch(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that downloads a table and returns its path."""

    def run(table: str) -> Path:
        output = tmp_path / "out" / f"{table}.jsonl"
        options = ["--dataset=someone/data", f"--revision={REVISION}"]
        download_table.main([*options, f"--table={table}", f"--output={output}"])
        return output

    return run


@pytest.fixture
def fetch_model(tmp_path: Path) -> Callable[[], Path]:
    """Return a function that downloads the model and returns its folder."""

    def run() -> Path:
        output = tmp_path / "out" / "model"
        options = ["--model=someone/data", f"--revision={REVISION}", f"--output={output}"]
        download_model.main(options)
        return output

    return run


def _nothing_left(tmp_path: Path) -> bool:
    return not [path for path in tmp_path.rglob("out/**/*") if path.is_file()]


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_json_lines_are_kept_unchanged(
    repository: Path, fetch: Callable[[str], Path], form: str
) -> None:
    (repository / f"full.{form}").write_text('{"question": "Who?"}\n')
    assert fetch("full").read_text() == '{"question": "Who?"}\n'


def test_json_array_becomes_lines(
    repository: Path, fetch: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """MetaMathQA is published so."""
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
def test_parquet_files_become_lines_in_order(
    repository: Path, fetch: Callable[[str], Path], names: list[str]
) -> None:
    """There are several batches of rows; values without a JSON type become text."""
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


def test_missing_hub_table_names_the_expected_files(
    repository: Path, fetch: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        fetch("full")
    printed = capsys.readouterr().err
    assert f"someone/data at {REVISION} has none of full.jsonl, full.json, full.parquet" in printed
    assert _nothing_left(repository.parent)


def test_network_failure_leaves_no_partial_table(
    hub: Hub, fetch: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    for name in names:
        pd.DataFrame({"text": ["some"]}).to_parquet(hub.folder / name)
    hub.lost.append(names[1])
    with pytest.raises(SystemExit):
        fetch("train")
    assert f"the hub lists the file {names[1]}, but does not have it" in capsys.readouterr().err
    assert _nothing_left(hub.folder.parent)


def _flipped(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


@pytest.mark.parametrize("rows", [1, 500])
def test_table_with_a_flipped_bit_is_refused(
    hub: Hub, fetch: Callable[[str], Path], capsys: pytest.CaptureFixture[str], rows: int
) -> None:
    """Small files are verified by git's id, large ones by SHA-256."""
    content = b'{"question": "Who?"}\n' * rows
    (hub.folder / "full.jsonl").write_bytes(content)
    hub.replaced["full.jsonl"] = _flipped(content)
    with pytest.raises(SystemExit):
        fetch("full")
    assert "full.jsonl was downloaded with another content" in capsys.readouterr().err
    assert _nothing_left(hub.folder.parent)
    hub.replaced.clear()
    assert fetch("full").read_bytes() == content


MODEL = {
    "config.json": b"{}",
    "generation_config.json": b'{"eos_token_id": [0, 4]}',
    "model.safetensors": b"weights" * 1000,
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "merges.txt": b"a b",
    "vocab.txt": b"a",
    "tokenizer.model": b"pieces",
    "spiece.model": b"pieces",
}
OTHERS = {
    "README.md": b"A model.",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"weights again",
    "onnx/model.onnx": b"",
}


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _files(folder: Path) -> dict[str, bytes]:
    """Return the names of files without the records of their digests."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def test_model_download_has_only_files_that_are_read(
    hub: Hub, fetch_model: Callable[[], Path]
) -> None:
    _write(hub.folder, MODEL | OTHERS)
    assert _files(fetch_model()) == MODEL


@pytest.mark.parametrize("name", ["model.safetensors", "chat_template.jinja"])
def test_model_with_a_flipped_bit_is_refused(
    hub: Hub, fetch_model: Callable[[], Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    _write(hub.folder, MODEL)
    hub.replaced[name] = _flipped(MODEL[name])
    with pytest.raises(SystemExit):
        fetch_model()
    printed = capsys.readouterr().err
    assert f"someone/data at {REVISION}: {name} was downloaded with another content" in printed
    assert "run it again" in printed
    assert _nothing_left(hub.folder.parent)
    hub.replaced.clear()
    assert _files(fetch_model()) == MODEL


SHARDS = {f"model-0000{n}-of-00002.safetensors": b"weights %d" % n for n in (1, 2)}


def _index(*names: str) -> dict[str, bytes]:
    weights = {f"layer{number}.weight": name for number, name in enumerate(names)}
    return {"model.safetensors.index.json": json.dumps({"weight_map": weights}).encode()}


def test_model_download_has_all_shards_of_the_index(
    hub: Hub, fetch_model: Callable[[], Path]
) -> None:
    shards = SHARDS | {"more/model-3.safetensors": b"weights 3"}
    files = {"config.json": b"{}"} | shards | _index(*shards)
    _write(hub.folder, files | OTHERS)
    assert _files(fetch_model()) == files


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "lost.safetensors"])
def test_index_with_unknown_files_is_refused_before_download(
    hub: Hub, fetch_model: Callable[[], Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    _write(hub.folder, {"config.json": b"{}"} | SHARDS | _index(*SHARDS, name))
    with pytest.raises(SystemExit):
        fetch_model()
    printed = capsys.readouterr().err
    assert f"names {name}, which is not a file of the repository" in printed
    assert not any("model-00001" in path for path in hub.requests)
    assert _nothing_left(hub.folder.parent)


ERRORS = {
    "gated": ((403, "GatedRepo"), "only who accepted its conditions", "hf auth login"),
    "repository": ((401, "RepoNotFound"), "no such repository, or it is private", "OWNER/NAME"),
    "revision": ((404, "RevisionNotFound"), "but no such revision", "take one of the commits"),
    "token": ((403, ""), "refuses the access (HTTP 403)", "HF_TOKEN"),
    "down": ((410, ""), "answers with HTTP 410", "try again later"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_hub_errors_are_reported_with_a_remedy(
    hub: Hub,
    fetch: Callable[[str], Path],
    fetch_model: Callable[[], Path],
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    hub.error, reason, remedy = ERRORS[what]
    for run in (fetch_model, lambda: fetch("full")):
        with pytest.raises(SystemExit):
            run()
        printed = capsys.readouterr().err
        assert printed.startswith(f"error: someone/data at {REVISION}: ")
        assert reason in printed
        assert remedy in printed
        assert printed.count("\n") == 1
        assert _nothing_left(hub.folder.parent)


def test_gated_files_of_a_public_list_are_reported(
    hub: Hub, fetch_model: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The list of Llama's files is public, its files are not."""
    _write(hub.folder, MODEL)
    hub.error, hub.lists = (403, "GatedRepo"), True
    with pytest.raises(SystemExit):
        fetch_model()
    assert "only who accepted its conditions" in capsys.readouterr().err
    hub.error, hub.lost = None, ["tokenizer.json"]
    with pytest.raises(SystemExit):
        fetch_model()
    assert "lists the file tokenizer.json, but does not have it" in capsys.readouterr().err
    assert _nothing_left(hub.folder.parent)


def test_missing_network_is_reported(
    hub: Hub,
    fetch: Callable[[str], Path],
    fetch_model: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _point(monkeypatch, "http://127.0.0.1:9")
    # huggingface_hub retries after 1, 2, 4, 8 and 8 s.
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for run in (fetch_model, lambda: fetch("full")):
        with pytest.raises(SystemExit):
            run()
        printed = capsys.readouterr().err
        assert "the hub cannot be reached" in printed
        assert "check the network" in printed
        assert _nothing_left(hub.folder.parent)


def test_model_without_safetensors_is_refused(
    hub: Hub, fetch_model: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _write(hub.folder, {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(SystemExit):
        fetch_model()
    assert "has neither model.safetensors nor" in capsys.readouterr().err


def test_damaged_benchmark_rows_are_refused_and_refetched(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`datasets` caches files; a damaged one is removed from the cache."""
    content = b'{"question": "Who?", "answer": "Ann."}\n' * 200
    (hub.folder / "test.jsonl").write_bytes(content)

    def load(dataset: str, config: str, **options: Any) -> list[Any]:
        """Load JSON lines as `datasets` does."""
        where = {"repo_type": "dataset", "revision": options["revision"]}
        path = huggingface_hub.HfApi().hf_hub_download(dataset, "test.jsonl", **where)
        return [json.loads(line) for line in Path(path).read_text().splitlines()]

    monkeypatch.setattr(datasets, "load_dataset", load)
    origin = HubDataset("someone/data", "main", REVISION, ("test",))
    monkeypatch.setitem(download_benchmark.HUB_DATASETS, "gsm8k", origin)
    output = tmp_path / "out" / "gsm8k"
    options = ["--task=gsm8k", f"--revision={REVISION}", f"--output={output}"]
    monkeypatch.setattr(
        download_benchmark, "benchmark", lambda _: SimpleNamespace(dataset=("someone/data", "main"))
    )
    hub.replaced["test.jsonl"] = content.replace(b"Ann", b"Bob", 1)
    with pytest.raises(SystemExit):
        download_benchmark.main(options)
    assert "test.jsonl was downloaded with another content" in capsys.readouterr().err
    assert _nothing_left(tmp_path)
    hub.replaced.clear()
    download_benchmark.main(options)
    assert len(read_jsonl(output / "test.jsonl")) == 200
