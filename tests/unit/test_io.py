"""Atomic writes, JSON Lines, and errors that end a program with one line and status 1."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from forgetting import io
from forgetting.digests import is_record, sha256
from forgetting.errors import InputError, is_out_of_memory, reports_input_errors
from forgetting.io import (
    atomic_write,
    content_key,
    read_json,
    read_jsonl,
    write_atomically,
    write_json,
    write_jsonl,
    write_table,
)


def _names(folder: Path) -> list[str]:
    """Return the names of all files except recorded digests."""
    return sorted(path.name for path in folder.iterdir() if not is_record(path))


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_interrupted_write_leaves_the_old_file(tmp_path: Path, stop: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(stop), atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        raise stop
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["a.txt"]


def _fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write_half)


def test_full_disk_leaves_no_half_written_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill_the_disk(monkeypatch)
    with pytest.raises((OSError, InputError)):
        write_atomically(tmp_path / "new.json", "x" * 100)
    assert _names(tmp_path) == []


def test_full_disk_ends_a_program_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk is reported like an input error: file and reason, status 1."""
    _fill_the_disk(monkeypatch)

    @reports_input_errors
    def main(argv: list[str] | None = None) -> None:
        write_json(tmp_path / "runs.json", {"steps": 1})

    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "runs.json" in message
    assert "No space left" in message


def test_unwritable_table_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_table(path, pd.DataFrame({"value": [1]}))
    with pytest.raises(Exception, match="object"):
        write_table(path, pd.DataFrame({"value": [1, "two", object()]}))
    assert pd.read_parquet(path)["value"].tolist() == [1]
    assert _names(tmp_path) == ["t.parquet"]


def test_written_files_have_the_permissions_of_ordinary_files(tmp_path: Path) -> None:
    """A temporary file is private; a result has the permissions of the umask."""
    write_atomically(tmp_path / "ours", "x")
    (tmp_path / "plain").write_text("x")
    ours, plain = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain"))
    assert ours == plain


def test_folders_are_made_and_text_is_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.json"
    value = {"name": "Żółć 東京 \u2028", "share": 0.1 + 0.2, "none": None}
    write_json(path, value)
    assert read_json(path) == value
    assert "東京" in path.read_bytes().decode("utf-8")


def test_json_lines_survive_every_character_of_a_text(tmp_path: Path) -> None:
    """Line separators inside a string are no line ends."""
    rows = [{"text": 'a\u2028b\u2029c\x85d\x0be\r\nf\n"q" \\ é 🙂'}, {"text": ""}]
    write_jsonl(tmp_path / "r.jsonl", rows)
    assert read_jsonl(tmp_path / "r.jsonl") == rows


def test_row_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_jsonl(tmp_path / "r.jsonl", [{"a": 1}, {"b": object()}])
    assert _names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": 2\n', "line 2: not a JSON object"),
        (b'{"a": 1}\n\n\n[1, 2]\n', "line 4: a JSON array; expected JSON lines"),
        (b'{"a": "\xff"}\n', "not UTF-8 text"),
        (b'{"a": ' + b"[" * 10**5 + b"\n", "line 1: nested too deeply"),
        (b'{"a": 1, "n": ' + b"1" * 5000 + b"}\n", "line 1: a whole number there has more digits"),
        (b'{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', "line 2: `a` is there twice"),
        (b'{"a": {"b": 1, "b": 2}}\n', "line 1: `b` is there twice"),
        (b'{"a": "x", "b": ["y", "\\uD800z"]}\n', "line 1: `b` holds half a character"),
    ],
)
def test_malformed_line_is_reported_by_file_and_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_jsonl(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_is_reported_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.jsonl: there is no such file"):
        read_jsonl(tmp_path / "gone.jsonl")


def test_input_error_ends_a_program_with_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @reports_input_errors
    def main(argv: list[str] | None = None) -> None:
        raise InputError("study.yaml, line 3: no such key")

    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: study.yaml, line 3: no such key\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nmore"),
    ],
)
def test_out_of_memory_ends_a_program_with_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names the sizes that can be reduced."""

    @reports_input_errors
    def main(argv: list[str] | None = None) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: memory has run out (")
    assert message.count("\n") == 1
    assert "evaluation.batch_size" in message


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB",
        "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable assertions.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY",
        "Caught OutOfMemoryError in replica 0 on device 0.\ntorch.OutOfMemoryError: CUDA out of "
        "memory. Tried to allocate 20.00 MiB",
        "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for "
        "details), NCCL version 2.27.5\nncclUnhandledCudaError: Call to CUDA function failed.\n"
        "Last error:\nCuda failure 2 'out of memory'",
        "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error, NCCL version 2.27.5\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
        "Failed to CUDA calloc async 6291456 bytes",
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)",
        "[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: you "
        "tried to allocate 4000000000000 bytes.",
        "unable to mmap 8589934592 bytes from file </model.safetensors>: Cannot allocate memory "
        "(12)",
        "std::bad_alloc",
    ],
)
def test_out_of_memory_is_recognized_by_message(message: str) -> None:
    """Of errors of other classes than torch.OutOfMemoryError, which is recognized by name."""
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(ValueError(message))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`",
        "NCCL error in: ProcessGroupNCCL.cpp:2264, remote process exited or there was a network "
        "error, NCCL version 2.27.5",
        "unsupported operation: some elements refer to a single memory location",
    ],
)
def test_other_errors_are_not_out_of_memory(message: str) -> None:
    assert not is_out_of_memory(RuntimeError(message))


def test_another_error_of_torch_keeps_its_traceback() -> None:
    @reports_input_errors
    def main(argv: list[str] | None = None) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        main([])


def test_a_programmers_mistake_keeps_its_traceback() -> None:
    @reports_input_errors
    def main(argv: list[str] | None = None) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main([])


def test_equal_values_have_equal_keys_and_others_do_not() -> None:
    value: dict[str, Any] = {"a": [1, 2], "b": {"c": 0.1, "d": None}}
    assert content_key(value) == content_key({"b": {"d": None, "c": 0.1}, "a": [1, 2]})
    for other in ({**value, "a": [2, 1]}, {**value, "b": {"c": 0.2, "d": None}}, {"a": [1, 2]}):
        assert content_key(other) != content_key(value)


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    """Each writes its own temporary file; the last to finish wins."""
    path = tmp_path / "a"
    with atomic_write(path) as first:
        first.write_text("first")
        io.write_atomically(path, "second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert _names(tmp_path) == ["a"]


def test_temporary_file_of_a_killed_writer_is_removed(tmp_path: Path) -> None:
    """Killed programs would otherwise fill the folder with temporary files."""
    killed = "with atomic_write(path) as part: part.write_text('half'); os.kill(os.getpid(), 9)"
    code = "import os; from pathlib import Path; from forgetting.io import atomic_write"
    file = tmp_path / "runs.json"
    code = f"{code}\npath = Path({str(file)!r})\n{killed}"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(list(tmp_path.glob(".runs.json.*"))) == 1
    (tmp_path / ".runs.json").write_text("a file of another name")
    write_json(file, {"whole": True})
    assert set(_names(tmp_path)) == {"runs.json", ".runs.json"}
