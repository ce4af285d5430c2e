"""Full and read-only disks: small file systems in memory."""

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
    """Mount a file system of `size` KiB on a folder; yield a function that resizes it."""
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
    """Mount a file system on a folder to which not even root can write."""
    with small_disk(folder, size=64):
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield
