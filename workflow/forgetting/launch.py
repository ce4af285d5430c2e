"""Start a program in one process, or in several of this machine that find each other.

    python -m forgetting.launch PROCESSES PROGRAM ARGUMENT...

torchrun, with the program's own message at the end in place of the launcher's traceback. When one
process ends badly, however, the others are ended too, and the status is not 0.
"""

from __future__ import annotations

import os
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(argv: list[str] | None = None) -> None:
    """Become the program, or run so many of it."""
    processes, *program = argv or sys.argv[1:]
    if processes == "1":
        os.execv(sys.executable, [sys.executable, *program])
    # --standalone: at a port that is free.
    options = ["--standalone", f"--nproc-per-node={processes}", *program]
    try:
        run(parse_args(options))  # type: ignore[no-untyped-call]
    except ChildFailedError:
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
