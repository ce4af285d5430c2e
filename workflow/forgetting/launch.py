"""Start a program in one process, or in several of this machine that find each other.

    python -m forgetting.launch PROCESSES PROGRAM ARGUMENT...

torchrun, with one line at the end in place of the launcher's traceback. When one process ends
badly, the others are ended too, and the status is not 0.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(argv: list[str] | None = None) -> None:
    """Become the program, or run so many of it."""
    processes, *program = argv or sys.argv[1:]
    if processes == "1":
        os.execv(sys.executable, [sys.executable, *program])
    # The processes share the cores; more threads than those would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(processes))))
    logging.disable()
    # --standalone: at a port that is free.
    options = ["--standalone", f"--nproc-per-node={processes}", *program]
    try:
        run(parse_args(options))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        raise SystemExit(_killed(error, processes) or 1) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None


def _killed(error: ChildFailedError, processes: str) -> str | None:
    """Tell of a process that could tell nothing itself; those that were ended for it come last."""
    killed = [(rank, found) for rank, found in error.failures.items() if found.exitcode < 0]
    for rank, found in sorted(killed, key=lambda pair: pair[1].exitcode == -signal.SIGTERM):
        return (
            f"error: process {rank} of 0 to {int(processes) - 1} was killed by "
            f"{found.signal_name()} and the others were ended: perhaps memory ran out. "
            "Started again, the run goes on from its newest checkpoint"
        )
    return None


if __name__ == "__main__":
    main()
