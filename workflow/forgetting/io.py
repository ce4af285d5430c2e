"""Read and write files: atomic writes with recorded digests, JSON, JSON Lines and parquet."""

from __future__ import annotations

import fcntl
import functools
import glob
import hashlib
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from forgetting import digests
from forgetting.digests import sha256
from forgetting.errors import FREE_SPACE, InputError, disk_fault

if TYPE_CHECKING:
    import pandas as pd

PARTIAL_SUFFIX = ".partial"
"""Suffix of files that are being written."""


@contextmanager
def disk_errors_as_input_errors(path: Path) -> Iterator[None]:
    """Turn disk errors within the block into an `InputError` that names `path`."""
    try:
        yield
    except Exception as error:
        if (fault := disk_fault(error)) is not None:
            if (other := _other_path(error, path)) is not None:
                raise InputError(f"{other}: not read: {fault}") from None
            raise InputError(f"{path}: not written: {fault}") from None
        if isinstance(error, SafetensorError):
            raise InputError(f"{path}: not written: {error}; {FREE_SPACE}") from None
        raise


def _other_path(error: Exception, path: Path) -> Path | None:
    """Return the file that an error names unless it is written for `path`."""
    # An error of a copy names the origin first, and then the file that was being written.
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    folder = path.parent.absolute()
    if not isinstance(name, str):
        return None
    named = Path(name).absolute()
    is_written = named.is_relative_to(folder) or folder.is_relative_to(named)
    return None if is_written else Path(name)


@contextmanager
def atomic_write(path: Path, *, recorded: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, which replaces `path` at the end.

    The content is flushed to the disk before the rename, so that a crash leaves either the old
    file or the new one. An error leaves the old file and no temporary file. Temporary files of
    killed processes are removed when the file is written the next time.

    Args:
        recorded: record the digest (`forgetting.digests`), which readers check.

    Raises:
        InputError: the disk is full, or the folder must not be written to.
    """
    with disk_errors_as_input_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL_SUFFIX
        )
    temporary = Path(name)
    try:
        _lock(handle)
        with disk_errors_as_input_errors(path):
            yield temporary
            if not recorded:
                digests.record_path(path).unlink(missing_ok=True)  # of an older file
            _flush(temporary)
            temporary.chmod(0o666 & ~_umask())
            with _with_digest(path, temporary) if recorded else nullcontext():
                temporary.replace(path)
                _flush(path.parent)
            _remove_abandoned(path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def _with_digest(path: Path, new: Path) -> Iterator[None]:
    """Record the digest of the new file, and of the old one until the block has replaced it."""
    digest = sha256(new)
    previous = digests.recorded_digests(path) if path.exists() else []
    _write_record(path, [digest, *previous])
    yield
    if previous:
        _write_record(path, [digest])


def _write_record(path: Path, known: Iterable[str]) -> None:
    """Write the digests of the contents that a file may have."""
    # Named after the file itself, so that `_remove_abandoned` finds it.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL_SUFFIX)
    temporary = Path(name)
    try:
        _lock(handle)
        temporary.write_text("".join(f"{digest}  {path.name}\n" for digest in known))
        _flush(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(digests.record_path(path))
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder, which replaces the folder `path` at the end.

    Raises:
        InputError: the disk is full, or the parent folder must not be written to.
    """
    partial, old = path.with_name(f".{path.name}"), _old_folder(path)
    if old.exists() and not path.exists():
        old.rename(path)  # killed between the two renames of `rename_synced`
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with disk_errors_as_input_errors(path):
            partial.mkdir(parents=True)
            yield partial
            rename_synced(partial, path)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def rename_synced(partial: Path, final: Path) -> None:
    """Rename a complete folder after its files and their digests have reached the disk.

    A folder that `final` replaces is removed after the rename.
    """
    new = [p for p in digests.visible_files(partial) if not digests.record_path(p).exists()]
    for path, digest in digests.sha256_of_each(new).items():
        digests.record_path(path).write_text(f"{digest}  {path.name}\n")
    for path in [*partial.rglob("*"), partial]:
        _flush(path)
    old = _old_folder(final)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old_folder(folder: Path) -> Path:
    """Return the path of a folder while another replaces it."""
    return folder.with_name(f".{folder.name}.old")


def remove_file(path: Path) -> None:
    """Remove a file, if it is there, and its recorded digest."""
    path.unlink(missing_ok=True)
    digests.record_path(path).unlink(missing_ok=True)


def warn_damaged(path: Path, damage: str, consequence: str) -> None:
    """Print a warning about damaged state that is computed again."""
    print(f"warning: {path} {damage}; {consequence}", file=sys.stderr, flush=True)


def remove_folder(path: Path) -> None:
    """Remove a folder; it is renamed first, so that it is never incomplete."""
    removed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    if path.exists():
        path.rename(removed)
        shutil.rmtree(removed)


def removal_command(*paths: Path) -> str:
    """Return the command that removes files and folders."""
    return " ".join(["rm -rf", *(shlex.quote(str(path)) for path in paths)])


def check_file(path: Path, remedy: str | None = None, *, required: bool = True) -> None:
    """Raise an `InputError` if a file differs from what was written.

    Args:
        remedy: command that removes what has to be made again; by default it removes the file.
        required: refuse a file whose digest was not recorded.
    """
    if damage := digests.file_damage(path, required=required):
        raise damage_error(path, damage, remedy or removal_command(path))


def damage_error(
    path: Path, damage: str, remedy: str, consequence: str = "it is made again"
) -> InputError:
    """Return the error that names a damaged file and the command that repairs it."""
    return InputError(f"{path} {damage}; run `{remedy}`, then repeat the command: {consequence}")


def link_or_copy(origin: str | Path, target: str | Path) -> None:
    """Make a hard link to a file that is never changed, or a copy if links are not supported."""
    try:
        os.link(origin, target)
    except OSError:
        shutil.copy2(origin, target)


def link_recorded(origin: Path, target: Path) -> None:
    """Link a file that is never changed into another folder, with its recorded digest."""
    record = digests.record_path(target)
    record.unlink(missing_ok=True)  # of a process that was killed before it linked the file
    link_or_copy(digests.record_path(origin), record)
    link_or_copy(origin, target)


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of `path` that no process is writing any more."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL_SUFFIX}"):
        try:
            handle = os.open(leftover, os.O_RDWR)
        except OSError:
            continue
        if _lock(handle):
            leftover.unlink(missing_ok=True)
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock a file until it is closed or the process ends; return False if another locked it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_atomically(path: Path, content: str | bytes, *, recorded: bool = True) -> None:
    """Write `content` to `path` atomically."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_write(path, recorded=recorded) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, remedy: str | None = None) -> Any:
    """Read JSON that `write_json` wrote; see `check_file`."""
    check_file(path, remedy)
    return json.loads(path.read_text(encoding="utf-8"))


def read_foreign_json(path: Path) -> Any:
    """Read a JSON file that other programs wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object per line, atomically, and return the number of rows.

    Rows are consumed one by one, so that they need not fit into memory together.
    """
    count = 0
    with (
        atomic_write(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="\n") as file,
    ):
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON Lines; a malformed line raises an `InputError` with its number."""
    return [row for _, row in read_jsonl_numbered(path)]


def read_jsonl_numbered(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a JSON Lines file with their line numbers; blank lines are skipped."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    _check_table(path)
    with file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, parse_line(line, f"{path}, line {number}")


def _check_table(path: Path) -> None:
    """Check a table against its recorded digest; the tables of users have none."""
    if damage := digests.file_damage(path, required=False):
        error = damage_error(path, damage, removal_command(path))
        accept = removal_command(digests.record_path(path))
        raise InputError(f"{error}. If you have changed it yourself, run `{accept}` instead")


_ARRAY = (
    "a JSON array; expected JSON lines, one object a line: `jq -c '.[]' ARRAY.json > TABLE.jsonl` "
    "makes them"
)


def parse_line(encoded: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object of a line; its text can be encoded as UTF-8 again.

    Args:
        encoded: the bytes of the line.
        where: file and line number, for errors.

    Raises:
        InputError: the line is not a JSON object, repeats a key or holds a surrogate.
    """
    try:
        line = encoded.decode("utf-8-sig")  # Windows writes a byte-order mark.
        row = json.loads(line, object_pairs_hook=functools.partial(_unique_keys, where))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        if encoded.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
            raise InputError(f"{where}: {_ARRAY}") from None
        raise InputError(
            f"{where}: not a JSON object ({error.msg} at column {error.colno}); "
            "expected one object a line"
        ) from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply; expected a flat JSON object") from None
    except ValueError:
        raise InputError(f"{where}: a whole number there has more digits than are read") from None
    if isinstance(row, list):
        raise InputError(f"{where}: {_ARRAY}")
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    # In UTF-8 text, a surrogate can only come from an escape.
    if r"\ud" in line.lower() and (broken := [key for key in row if not _is_encodable(key, row)]):
        raise InputError(f"{where}: `{broken[0]}` holds half a character (a surrogate)")
    return row


def _unique_keys(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise an `InputError` if a key occurs twice.

    The json module would keep the last value.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f"{where}: `{twice}` is there twice; take one of them out")
    return row


def _is_encodable(key: str, row: Mapping[str, Any]) -> bool:
    """Return whether a value can be encoded as UTF-8."""
    try:
        json.dumps({key: row[key]}, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as parquet, atomically."""
    with atomic_write(path) as temporary:
        table.to_parquet(temporary, index=False)


def read_table(path: Path, remedy: str | None = None) -> pd.DataFrame:
    """Read a table that `write_table` wrote; see `check_file`."""
    import pandas as pd

    check_file(path, remedy)
    return pd.read_parquet(path)


def content_key(value: Any, length: int = 16) -> str:
    """Return a short digest of a value that JSON can represent; the order of keys is ignored."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]
