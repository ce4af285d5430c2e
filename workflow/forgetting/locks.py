"""Ownership of a folder of results: one study has it, and one snakemake writes there at a time.

Snakemake locks files, not studies: two studies that read one download or write one page lock each
other out, the end of a run removes the locks of all others in the folder, and a killed run leaves
its own. So profiles/default sets `nolock`, and each run holds a lock of the operating system on the
folder of its study instead, which ends with the process. Several studies run side by side.
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
"""In a folder of results: names the study file; the snakemake that writes there has locked it."""
JOBS_LOCK = "jobs.lock"
"""Locked by every program that writes there: so it is known when one outlives its snakemake."""
_HELD_LOCKS: list[int] = []
"""Locked files; closing one would free it."""


def study_origin(path: Path, studies: Path) -> str:
    """Return the identity of a study file: its path, or its name if it is in `studies`.

    The name is the same in another checkout, from which the same results may be continued.
    """
    return path.stem if path.parent.resolve() == studies.resolve() else os.path.relpath(path)


def check_owner(folder: Path, study: str) -> None:
    """Refuse a folder that holds the results of another study.

    Of a file that is gone the results are free: it was renamed or moved.

    Args:
        folder: of the results.
        study: as `study_origin` returns it.

    Raises:
        InputError: the folder is another study's, or differs from one only by case.
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
    """Hold a study's folder of results until this process ends, and write down whose it is.

    Raises:
        InputError: another snakemake holds it, or it is another study's.
    """
    with disk_errors_as_input_errors(folder):
        owner = _locked(folder / OWNER_FILE)
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
    """Refuse a folder in which jobs of a killed snakemake still write.

    Args:
        folder: of a study's results.
        patience: seconds in which a job that is about to end may do so.
    """
    deadline = time.monotonic() + patience
    with disk_errors_as_input_errors(folder):
        while (jobs := _locked(folder / JOBS_LOCK)) is None and time.monotonic() < deadline:
            time.sleep(0.2)
    if jobs is None:
        raise InputError(
            f"{folder}: jobs of a snakemake that was killed still run there; wait until they have "
            "ended, or end them"
        )
    os.close(jobs)


def lock_downloads(paths: Iterable[str]) -> None:
    """Hold what is to be downloaded, which several studies may share, until this process ends.

    Raises:
        InputError: another snakemake downloads it.
    """
    for path in paths:
        lock = Path("resources", ".locks", content_key(path))
        with disk_errors_as_input_errors(lock):
            handle = _locked(lock)
        if handle is None:
            raise InputError(
                f"{path}: another snakemake downloads it; start this one when it is there"
            )
        _HELD_LOCKS.append(handle)


def locked_by_others(folder: Path) -> bool:
    """Does a snakemake hold the results of another study?"""
    others = [other for other in folder.parent.glob("*") if other.name != folder.name]
    return any(map(is_locked, others))


def is_locked(folder: Path) -> bool:
    """Does a snakemake hold this folder of results?"""
    if not (folder / OWNER_FILE).is_file():
        return False
    handle = _locked(folder / OWNER_FILE)
    if handle is not None:
        os.close(handle)
    return handle is None


def _locked(path: Path) -> int | None:
    """Open and lock a file; None where another process has locked it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        told = "this file system has no locks; do not start a study twice at the same time"
        print(f"warning: {path}: {told}", file=sys.stderr)
    return handle
