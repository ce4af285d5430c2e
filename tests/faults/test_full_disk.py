"""A full disk or a folder that must not be written to: one line, and nothing half written."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from huggingface_hub import HfApi, RepoFile
from safetensors import SafetensorError

from forgetting.data.hub import fetch_model
from forgetting.digests import visible_files
from forgetting.errors import InputError
from forgetting.io import (
    PARTIAL_SUFFIX,
    atomic_folder,
    atomic_write,
    disk_errors_as_input_errors,
    write_jsonl,
)
from support.params import write_params
from support.small_disk import read_only_disk, small_disk

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow" / "scripts"
PROGRAMS = sorted(path.stem for path in SCRIPTS.glob("*.py"))
FAULTS = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EROFS: "let this user write there",
    errno.EACCES: "let this user write there",
    errno.EPERM: "let this user write there",
}


def _program(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _told(main: Callable[..., None], arguments: list[str], capsys: Any) -> str:
    """The one line of a program that fails."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    told: str = capsys.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in told
    return lines[0]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_tells_of_a_disk_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever in it the error comes from: here from its first step."""
    main = _program(name).main
    for number, remedy in FAULTS.items():

        def fail(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number), "results/mini/base.json")

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", fail)
        told = _told(main, [], capsys)
        assert told.startswith(f"error: results/mini/base.json: {os.strerror(number)}; {remedy}")


@pytest.mark.parametrize("number", FAULTS)
@pytest.mark.parametrize(
    "kind", [OSError, SafetensorError, Exception], ids=["Python", "safetensors", "tokenizers"]
)
def test_errors_of_disks_are_known_whichever_library_writes(
    kind: type[Exception], number: int, tmp_path: Path
) -> None:
    words = os.strerror(number)
    error = OSError(number, words) if kind is OSError else kind(f"{words} (os error {number})")
    told = f"a.bin: not written: {words}; {FAULTS[number]}"
    with pytest.raises(InputError, match=told), disk_errors_as_input_errors(tmp_path / "a.bin"):
        raise error


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    """A file that is missing or a mistake of a programmer's has another remedy."""
    for error in (FileNotFoundError(errno.ENOENT, "no"), ValueError("(os error 2)"), KeyError("x")):
        with pytest.raises(type(error)), disk_errors_as_input_errors(tmp_path / "a.bin"):
            raise error


@pytest.mark.parametrize("write", [atomic_write, atomic_folder])
def test_a_folder_that_is_read_only_is_told_before_anything_is_written(
    write: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path
) -> None:
    """Its own folder cannot be made, or a file in it."""
    with read_only_disk(tmp_path):
        for target in (tmp_path / "a", tmp_path / "new" / "a"):
            told = "a: not written: Read-only file system; let"
            with pytest.raises(InputError, match=told), write(target):
                pytest.fail("there is nothing to write to")
        assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    """What cannot be written leaves the folder that was there."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(InputError, match="No space left"), atomic_folder(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]
    with atomic_folder(target) as partial:
        (partial / "new").touch()
    assert [path.name for path in visible_files(target)] == ["new"]


PRETRAINED = {"hidden_size": 64, "intermediate_size": 64, "num_layers": 1, "num_heads": 2}
SMALL = {
    **PRETRAINED,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "block_size": 32,
    "batch_tokens": 64,
}


def _arguments(name: str, work: Path, target: Path) -> list[str]:
    """Arguments of a program that write below a folder."""
    if name == "generate_microworld":
        return ["--seed", "0", "--output", str(target / "world")]
    documents = work / "documents.jsonl"
    write_jsonl(documents, [{"text": f"Number {n} is {n}."} for n in range(20)])
    return [
        *("--params", str(write_params(work, model=SMALL, seed=0, precision="float32"))),
        *("--documents", str(documents), "--state", str(target / "state")),
        *("--folder", str(target / "model"), "--output", str(target / "base.json")),
    ]


@pytest.mark.parametrize("name", ["generate_microworld", "pretrain_base"])
@pytest.mark.parametrize("size", [4, 32, 100, None], ids=lambda size: f"{size or 'read-only'}")
def test_programs_leave_nothing_half_written(
    name: str, size: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full at the tokenizer, at the weights; and where nothing can be written at all."""
    target = tmp_path / "disk"
    target.mkdir()
    arguments = _arguments(name, tmp_path, target)
    with small_disk(target, size) if size else read_only_disk(target):
        told = _told(_program(name).main, arguments, capsys)
        assert str(target) in told
        assert ("No space left" if size else "Read-only") in told
        assert not list(target.rglob(f"*{PARTIAL_SUFFIX}"))
        assert not list(target.glob("*model*"))


def test_a_download_to_a_full_disk_does_not_blame_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "cache/blobs/1")

    files = [RepoFile(path="model.safetensors", size=1, oid="0")]
    monkeypatch.setattr(HfApi, "list_repo_tree", lambda *_, **__: files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    told = "cache/blobs/1: not written: No space left on device; make room there"
    with pytest.raises(InputError, match=f"^{told}$"):
        fetch_model("owner/name", "0" * 40, tmp_path / "model")
