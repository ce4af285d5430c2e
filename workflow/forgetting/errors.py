"""Errors."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress

FREE_SPACE = "make room there"


GRANT_WRITE = "let this user write there, or take another folder"


DISK_ERRORS = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EFBIG: FREE_SPACE,
    errno.EROFS: GRANT_WRITE,
    errno.EACCES: GRANT_WRITE,
    errno.EPERM: GRANT_WRITE,
}
"""What helps against an error of a disk or a folder, by its number."""


OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust end their messages: safetensors, tokenizers."""


NO_MEMORY = {
    "out of memory",  # CUDA, also through others
    "failed to cuda calloc",  # NCCL
    "out_of_memory",  # CUDA's driver
    "status_alloc_failed",  # cuBLAS, cuDNN, cuSPARSE
    "memoryallocation",  # CUDA's runtime, by the name of its error
    "can't allocate memory",  # torch on a CPU, on Linux
    "not enough memory",  # elsewhere
    "cannot allocate memory",  # a file that is mapped
    "bad_alloc",  # C++
}
"""How libraries tell that there is no room, in lower case: there is no error in common."""


class InputError(Exception):
    """Something that the user gave cannot be used.

    The message names the file and the line or key, says what was expected and how to mend it.
    """


def reports_input_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Make a program's `main` end with one clear line and status 1 on an `InputError`, where memory
    has run out, and on a disk that is full or a folder that must not be written to.
    """

    @functools.wraps(main)
    def wrapper(argv: list[str] | None = None) -> None:
        _lock_results_for_job()
        try:
            main(argv)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        except Exception as error:
            if (fault := disk_fault(error)) is not None:
                where = getattr(error, "filename", None) or "a file"
                print(f"error: {where}: {fault}", file=sys.stderr)
                raise SystemExit(1) from None
            if not is_out_of_memory(error):
                raise
            what = (str(error) or type(error).__name__).splitlines()[0]
            print(
                f"error: memory has run out ({what}): make "
                "evaluation.batch_size, benchmarks.batch_size or training.micro_batch_size "
                "smaller, or run it where there is more",
                file=sys.stderr,
            )
            raise SystemExit(1) from None

    return wrapper


def _lock_results_for_job() -> None:
    """Lock the file that the next snakemake looks at, until this process ends.

    Of a snakemake that is killed, programs may run on; see `forgetting.locks`.
    """
    if path := os.environ.get("FORGETTING_JOBS_LOCK"):
        # Where there is no such folder or no lock, nothing can be shown.
        with suppress(OSError):
            fcntl.flock(os.open(path, os.O_RDONLY | os.O_CREAT, 0o666), fcntl.LOCK_SH)


def is_out_of_memory(error: Exception) -> bool:
    """Does the error say that something found no room, on a GPU or on a CPU?"""
    # torch has a class for it on a GPU, which is not imported here for its name.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    told = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in told for words in NO_MEMORY)


def disk_fault(error: Exception) -> str | None:
    """Return the reason and the remedy if a disk is full or a folder must not be written to."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (told := OS_ERROR.search(str(error))):
        number = int(told[1])
    if number not in DISK_ERRORS:
        return None
    return f"{os.strerror(number)}; {DISK_ERRORS[number]}"
