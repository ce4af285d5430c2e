"""Full and read-only disks: programs end with one line and leave no partial files."""

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
    link_or_copy,
    write_jsonl,
)
from support.params import write_params
from support.small_disk import read_only_disk, small_disk

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow" / "scripts"
PROGRAMS = sorted(path.stem for path in SCRIPTS.glob("*.py"))
FAULTS = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there",
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


def _error_line(main: Callable[..., None], arguments: list[str], capsys: Any) -> str:
    """Run a program that fails and return its only error line."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    message: str = capsys.readouterr().err
    lines = [line for line in message.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in message
    return lines[0]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_reports_disk_errors_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error is raised in the first call of the program."""
    main = _program(name).main
    for number, remedy in FAULTS.items():

        def fail(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number), "results/mini/base.json")

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", fail)
        message = _error_line(main, [], capsys)
        assert message.startswith(f"error: results/mini/base.json: {os.strerror(number)}; {remedy}")


@pytest.mark.parametrize("number", FAULTS)
@pytest.mark.parametrize(
    "kind", [OSError, SafetensorError, Exception], ids=["Python", "safetensors", "tokenizers"]
)
def test_disk_errors_of_every_library_are_recognized(
    kind: type[Exception], number: int, tmp_path: Path
) -> None:
    words = os.strerror(number)
    error = OSError(number, words) if kind is OSError else kind(f"{words} (os error {number})")
    message = f"a.bin: not written: {words}; {FAULTS[number]}"
    with pytest.raises(InputError, match=message), disk_errors_as_input_errors(tmp_path / "a.bin"):
        raise error


def test_other_errors_are_not_converted(tmp_path: Path) -> None:
    """A missing file or a programming error has another remedy."""
    for error in (FileNotFoundError(errno.ENOENT, "no"), ValueError("(os error 2)"), KeyError("x")):
        with pytest.raises(type(error)), disk_errors_as_input_errors(tmp_path / "a.bin"):
            raise error


@pytest.mark.parametrize("write", [atomic_write, atomic_folder])
def test_read_only_folder_is_reported_before_writing(
    write: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path
) -> None:
    """Neither a file nor its parent folder can be created."""
    with read_only_disk(tmp_path):
        for target in (tmp_path / "a", tmp_path / "new" / "a"):
            message = "a: not written: Read-only file system; let"
            with pytest.raises(InputError, match=message), write(target):
                pytest.fail("there is nothing to write to")
        assert not list(tmp_path.iterdir())


def test_folder_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    """A failed write leaves the old folder."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(InputError, match="No space left"), atomic_folder(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]
    with atomic_folder(target) as partial:
        (partial / "new").touch()
    assert [path.name for path in visible_files(target)] == ["new"]


def test_copy_to_a_full_disk_blames_the_target(tmp_path: Path) -> None:
    """Selected weights are copied if they are on another disk."""
    origin, disk = tmp_path / "weights", tmp_path / "disk"
    origin.write_bytes(bytes(100_000))
    disk.mkdir()
    message = f"^{disk / 'selected'}: not written: No space left on device; "
    with (
        small_disk(disk, 64),
        pytest.raises(InputError, match=message),
        atomic_folder(disk / "selected") as partial,
    ):
        link_or_copy(origin, partial / "weights")


PRETRAINED = {"hidden_size": 64, "intermediate_size": 64, "num_layers": 1, "num_heads": 2}
SMALL = {
    **PRETRAINED,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "block_size": 32,
    "batch_tokens": 64,
}


def _arguments(name: str, work: Path, target: Path) -> list[str]:
    """Return arguments with which a program writes below `target`."""
    if name == "generate_microworld":
        return ["--seed", "0", "--output", str(target / "world")]
    documents = work / "documents.jsonl"
    write_jsonl(documents, [{"text": f"Number {n} is {n}."} for n in range(20)])
    return [
        *("--params", str(write_params(work, model=SMALL, seed=0, precision="float32"))),
        *("--documents", str(documents), "--state", str(target / "state")),
        *("--folder", str(target / "model"), "--layers", str(target / "layers.json")),
        *("--output", str(target / "base.json")),
    ]


@pytest.mark.parametrize("name", ["generate_microworld", "pretrain_base"])
@pytest.mark.parametrize("size", [4, 32, 100, None], ids=lambda size: f"{size or 'read-only'}")
def test_programs_leave_nothing_half_written(
    name: str, size: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full at the tokenizer or at the weights, or it is read-only."""
    target = tmp_path / "disk"
    target.mkdir()
    arguments = _arguments(name, tmp_path, target)
    with small_disk(target, size) if size else read_only_disk(target):
        message = _error_line(_program(name).main, arguments, capsys)
        assert str(target) in message
        assert ("No space left" if size else "Read-only") in message
        assert not list(target.rglob(f"*{PARTIAL_SUFFIX}"))
        assert not list(target.glob("*model*"))


def test_download_to_a_full_disk_blames_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "cache/blobs/1")

    files = [RepoFile(path="model.safetensors", size=1, oid="0")]
    monkeypatch.setattr(HfApi, "list_repo_tree", lambda *_, **__: files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    message = "cache/blobs/1: not written: No space left on device; free some space there"
    with pytest.raises(InputError, match=f"^{message}$"):
        fetch_model("owner/name", "0" * 40, tmp_path / "model")
