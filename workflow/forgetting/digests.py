"""Recorded digests, by which a reader checks that a file is what was written.

The digest of FILE is in `.FILE.sha256` in the same folder, in the format of `sha256sum`, so that
`sha256sum --check .FILE.sha256` checks it as well. `io.atomic_write` writes both. While a file is
being replaced, its record has two lines, for the old and the new content. A process that is killed
at any moment therefore leaves a file that matches its record.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

SUFFIX = ".sha256"

COPIES_VARIABLE = "FORGETTING_STORAGE_COPIES"
"""Environment variable, set where a storage plugin of Snakemake gives jobs copies of their inputs:
it copies no hidden files, so files without a recorded digest are accepted."""


def sha256(path: Path) -> str:
    """Return the hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_each(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the digests of several files, which are read in threads."""
    files = list(paths)
    with ThreadPoolExecutor() as threads:  # hashing releases the interpreter
        return dict(zip(files, threads.map(sha256, files), strict=True))


def sha256_of_all(paths: Iterable[Path]) -> tuple[dict[str, str], str]:
    """Return the digests of files by name, in the given order, and one digest over all of them."""
    files = {path.name: digest for path, digest in sha256_of_each(paths).items()}
    return files, hashlib.sha256(json.dumps(files).encode()).hexdigest()


def record_path(path: Path) -> Path:
    """Return where the digest of a file is recorded."""
    return path.with_name(f".{path.name}{SUFFIX}")


def recorded_digests(path: Path) -> list[str]:
    """Return the digests that are recorded for a file; an empty list without a record."""
    try:
        lines = record_path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [line.partition(" ")[0] for line in lines]


def is_record(path: Path) -> bool:
    """Return whether a file records the digest of another."""
    return path.name.startswith(".") and path.name.endswith(SUFFIX)


def visible_files(folder: Path) -> list[Path]:
    """Return all files below a folder, sorted, without hidden files and folders."""
    return sorted(path for path in _below(folder) if not path.name.startswith("."))


def _below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names)


def file_damage(path: Path, *, required: bool = True) -> str | None:
    """Return the damage of a file as the predicate of a sentence; None if it is intact.

    Args:
        required: whether a file without a recorded digest is damaged. Files of users have none.
    """
    if not path.is_file():
        return "is missing"
    record = record_path(path)
    if not record.exists():
        if not required or os.environ.get(COPIES_VARIABLE):
            return None
        return f"has no recorded sha256 ({record.name}; copies must have hidden files as well)"
    if _sha256_once(path) not in recorded_digests(path):
        return f"differs from what was written (its sha256 is not that in {record.name})"
    return None


def _sha256_once(path: Path) -> str:
    """Return the digest of a file; a process computes it once while the file is unchanged."""
    status = path.stat()
    stamp = (status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    return _sha256_at(path.absolute(), stamp)


@lru_cache(maxsize=4096)
def _sha256_at(path: Path, stamp: tuple[int, ...]) -> str:
    return sha256(path)


def folder_damage(folder: Path, optional: Iterable[str] = ()) -> tuple[Path, str] | None:
    """Return the first damaged file below a folder of recorded files, and its damage.

    Args:
        optional: names of files that may be missing.
    """
    recorded = {
        path.with_name(path.name[1 : -len(SUFFIX)]) for path in _below(folder) if is_record(path)
    }
    may_be_missing = set(optional)
    for path in sorted(recorded | set(visible_files(folder))):
        if path.name in may_be_missing and not path.exists():
            continue
        if damage := file_damage(path):
            return path, damage
    return None
