"""Errors that a program reports in one line: wrong inputs, a full disk, out of memory."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress

FREE_SPACE = "free some space there"
GRANT_WRITE = "let this user write there, or take another folder"
DISK_ERRORS = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EFBIG: FREE_SPACE,
    errno.EROFS: GRANT_WRITE,
    errno.EACCES: GRANT_WRITE,
    errno.EPERM: GRANT_WRITE,
}
"""Remedies for errors of a disk or folder, by error number."""

RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""The end of messages of libraries in Rust, such as safetensors and tokenizers."""

OOM_PHRASES = {
    "out of memory",  # CUDA, also through other libraries
    "failed to cuda calloc",  # NCCL
    "out_of_memory",  # the CUDA driver
    "status_alloc_failed",  # cuBLAS, cuDNN, cuSPARSE
    "memoryallocation",  # the CUDA runtime, by the name of its error
    "can't allocate memory",  # torch on a CPU, on Linux
    "not enough memory",  # torch on a CPU, on other systems
    "cannot allocate memory",  # a memory-mapped file
    "bad_alloc",  # C++
}
"""Lower-case phrases of the messages of libraries that are out of memory."""


class InputError(Exception):
    """An input of the user cannot be used.

    The message names the file and the line or key, and says what was expected and what to do.
    """


def reports_input_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Make a program's `main` report expected errors in one line and exit with status 1.

    Expected are an `InputError`, a full disk, a folder that must not be written to, and running
    out of memory.
    """

    @functools.wraps(main)
    def wrapper(argv: list[str] | None = None) -> None:
        _lock_results_for_job()
        try:
            main(argv)
        except Exception as error:
            message = _error_message(error)
            if message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            raise SystemExit(1) from None

    return wrapper


def _error_message(error: Exception) -> str | None:
    """Return the line that reports an expected error; None for any other error."""
    if isinstance(error, InputError):
        return str(error)
    if (fault := disk_fault(error)) is not None:
        return f"{getattr(error, 'filename', None) or 'a file'}: {fault}"
    if is_out_of_memory(error):
        cause = (str(error) or type(error).__name__).splitlines()[0]
        return (
            f"memory has run out ({cause}): make evaluation.batch_size, benchmarks.batch_size or "
            "training.micro_batch_size smaller, or use a machine with more memory"
        )
    return None


def _lock_results_for_job() -> None:
    """Lock the file by which the next snakemake notices this job, until the process ends.

    Jobs can outlive a snakemake that was killed; see `forgetting.locks`.
    """
    if path := os.environ.get("FORGETTING_JOBS_LOCK"):
        # Without such a folder, or without locks on its file system, the job runs unnoticed.
        with suppress(OSError):
            fcntl.flock(os.open(path, os.O_RDONLY | os.O_CREAT, 0o666), fcntl.LOCK_SH)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that a GPU or the machine is out of memory."""
    # By its name: importing torch for its class would slow every program down.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in message for phrase in OOM_PHRASES)


def disk_fault(error: Exception) -> str | None:
    """Return the cause and the remedy of a disk error; None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (match := RUST_OS_ERROR.search(str(error))):
        number = int(match[1])
    if number not in DISK_ERRORS:
        return None
    return f"{os.strerror(number)}; {DISK_ERRORS[number]}"
