"""A disk that is full: a small file system in memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: int = 4) -> Iterator[Callable[[int], None]]:
    """Mounts one of so many KiB as a folder; what it yields changes the size."""
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(folder), "-o"]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk takes the rights of root")
    made = subprocess.run([*mount, f"size={size}k"], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no small disk can be mounted: {made.stderr.strip()}")

    def resize(size: int) -> None:
        subprocess.run([*mount, f"remount,size={size}k"], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def read_only_disk(folder: Path) -> Iterator[None]:
    """Mount a file system on a folder to which nobody can write, not even root."""
    with small_disk(folder, size=64):
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield
