"""Locks on folders of results: each belongs to one study, and one snakemake writes to it at a time.

Snakemake's own locks are on files, not studies. Studies that read one download or write one page
block each other, the end of a run removes the locks of all others, and a killed run leaves its own.
profiles/default therefore sets `nolock`. Each run instead locks the folder of its study by a lock
of the operating system, which ends with the process. Several studies can run at the same time.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from forgetting.errors import InputError
from forgetting.io import content_key, disk_errors_as_input_errors

OWNER_FILE = "owner.json"
"""File in a folder of results that names the study file; a running snakemake locks it."""
JOBS_LOCK = "jobs.lock"
"""File in a folder of results that every job locks, so that jobs of a killed snakemake show."""
_HELD_LOCKS: list[int] = []
"""Descriptors of locked files, which stay open: closing a file would release its lock."""


def study_origin(path: Path, studies: Path) -> str:
    """Return the identity of a study file: its path, or its name if it is in `studies`.

    The name is the same in every checkout, so that another checkout can continue the results.
    """
    return path.stem if path.parent.resolve() == studies.resolve() else os.path.relpath(path)


def check_owner(folder: Path, study: str) -> None:
    """Refuse a folder that holds the results of another study.

    If the other study file no longer exists, it was renamed or moved, and the folder is free.

    Args:
        folder: of the results.
        study: as `study_origin` returns it.

    Raises:
        InputError: the folder belongs to another study, or its name differs only by case.
    """
    for other in folder.parent.glob("*"):
        if other.name != folder.name and other.name.casefold() == folder.name.casefold():
            raise InputError(
                f"study={study}: its results would go to {folder}, and some file systems take that "
                f"for {other}, which is there; rename the study file"
            )
    try:
        owner = Path(json.loads((folder / OWNER_FILE).read_text(encoding="utf-8"))["study"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if owner.is_file() and not (Path(study).is_file() and owner.samefile(study)):
        raise InputError(
            f"study={study}: {folder} holds the results of {owner}, which has the same name; "
            "rename one of the two files, or move the folder away"
        )


def lock_results(folder: Path, study: str) -> None:
    """Lock a study's folder of results until this process ends, and record its owner.

    Raises:
        InputError: another snakemake has locked it, or it belongs to another study.
    """
    with disk_errors_as_input_errors(folder):
        owner = _open_locked(folder / OWNER_FILE)
        if owner is None:
            raise InputError(
                f"{folder}: another snakemake runs this study here; wait until it has ended"
            )
        check_owner(folder, study)
        record = json.dumps({"study": study}, indent=2) + "\n"
        os.ftruncate(owner, 0)
        os.pwrite(owner, record.encode(), 0)
    _HELD_LOCKS.append(owner)


def check_no_running_jobs(folder: Path, patience: float = 10.0) -> None:
    """Refuse a folder to which jobs of a killed snakemake still write.

    Args:
        folder: of a study's results.
        patience: seconds to wait for jobs that are about to end.

    Raises:
        InputError: jobs still run.
    """
    deadline = time.monotonic() + patience
    with disk_errors_as_input_errors(folder):
        while (jobs := _open_locked(folder / JOBS_LOCK)) is None and time.monotonic() < deadline:
            time.sleep(0.2)
    if jobs is None:
        raise InputError(
            f"{folder}: jobs of a snakemake that was killed still run there; wait until they have "
            "ended, or end them"
        )
    os.close(jobs)


def lock_downloads(paths: Iterable[str]) -> None:
    """Lock the targets of downloads, which studies may share, until this process ends.

    Raises:
        InputError: another snakemake downloads one of them.
    """
    for path in paths:
        lock = Path("resources", ".locks", content_key(path))
        with disk_errors_as_input_errors(lock):
            handle = _open_locked(lock)
        if handle is None:
            raise InputError(
                f"{path}: another snakemake downloads it; start this one when it is there"
            )
        _HELD_LOCKS.append(handle)


def locked_by_others(folder: Path) -> bool:
    """Return whether a snakemake has locked the results of another study."""
    others = [other for other in folder.parent.glob("*") if other.name != folder.name]
    return any(map(is_locked, others))


def is_locked(folder: Path) -> bool:
    """Return whether a snakemake has locked this folder of results."""
    if not (folder / OWNER_FILE).is_file():
        return False
    handle = _open_locked(folder / OWNER_FILE)
    if handle is not None:
        os.close(handle)
    return handle is None


def _open_locked(path: Path) -> int | None:
    """Open and lock a file; return None if another process has locked it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        advice = "this file system has no locks; do not start a study twice at the same time"
        print(f"warning: {path}: {advice}", file=sys.stderr)
    return handle
