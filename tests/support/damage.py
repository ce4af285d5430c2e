"""Damage files as a failing disk or a user may."""

from __future__ import annotations

import os
from pathlib import Path


def flip(path: Path) -> None:
    """Flip a bit in the middle of a file; keep its date and size."""
    content, before = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def truncate(path: Path) -> None:
    """Remove the second half of a file."""
    os.truncate(path, path.stat().st_size // 2)
