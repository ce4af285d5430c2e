"""Start a program in one process, or in several that find each other.

    python -m forgetting.training.launch PROCESSES NODES PROGRAM ARGUMENT...

torchrun, with one line at the end in place of the launcher's traceback. When one process ends
badly, the others are ended too, and the status is not 0. Where one asks for it, since its memory
has run out, all are started again; torchrun's own restarts would repeat any failure. In a job of
SLURM that has so many nodes, the processes are spread over them, one for each GPU; elsewhere all
are on this machine.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

MEETING = "FORGETTING_MEETING"
"""Variable with host and port at which the launchers of several nodes meet."""

AGAIN = 200
"""Status by which a process asks that all be started again: more than 128 and any signal, as srun
tells the largest status of those that it has started."""

GRACE = 5.0
"""Seconds in which the launcher has noticed that a process has ended, and ended the others."""


def main(argv: list[str] | None = None) -> None:
    """Become the program, or run so many of it."""
    processes, asked, *program = argv or sys.argv[1:]
    if processes in ("0", "1"):  # 0 where there is no GPU to ask for
        os.execv(sys.executable, [sys.executable, *program])
    nodes = int(asked)
    if nodes > 1 and MEETING not in os.environ:
        there, cores = _allocation()
        nodes = min(nodes, there)
        if nodes > 1:
            _repeat(partial(_on_all, nodes, cores // there, [processes, str(nodes), *program]))
    here = int(processes) // nodes
    if nodes > 1:
        here = int(os.environ.get("SLURM_GPUS_ON_NODE", here))
    # The processes share the cores; more threads than those would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // here)))
    logging.disable()
    attempt = partial(_here, [*_meeting(nodes), f"--nproc-per-node={here}", *program], processes)
    if nodes == 1:
        _repeat(attempt)
    status = attempt()
    if status not in (0, AGAIN):
        # A process of another node may have asked to begin again, and this one only lost it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE)
    raise SystemExit(status)


def _repeat(attempt: Callable[[], int | str]) -> NoReturn:
    """End as the first attempt does after which none is asked for again."""
    while (status := attempt()) == AGAIN:
        pass
    raise SystemExit(status)


def _here(options: list[str], processes: str) -> int | str:
    """Run the processes of this machine; their status, or what there is to tell."""
    try:
        run(parse_args(options))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        if any(found.exitcode == AGAIN for found in error.failures.values()):
            return AGAIN
        return _killed(error, processes) or 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _allocation() -> tuple[int, int]:
    """Nodes and processor cores of the job of SLURM in which this is; elsewhere there is one node.

    SLURM has to be asked: of its variables Snakemake's plugin leaves the number of the job alone.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return 1, 0
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%D %C"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        nodes, cores = map(int, told.stdout.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        raise SystemExit(f"error: squeue does not tell the nodes of this job, {job}") from None
    return nodes, cores


def _on_all(nodes: int, cores: int, arguments: list[str]) -> int:
    """Start a launcher on every node; they meet on this one, the first. Their largest status."""
    with socket.socket() as free:
        free.bind(("", 0))
        os.environ[MEETING] = f"{socket.gethostname()}:{free.getsockname()[1]}"
    place = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    place += [f"--cpus-per-task={cores}"]
    launcher = [sys.executable, "-m", "forgetting.training.launch", *arguments]
    srun = subprocess.Popen(["srun", *place, "--kill-on-bad-exit=1", *launcher])
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, lambda number, _: srun.send_signal(number))
    status = srun.wait()
    return status if status >= 0 else 128 - status


def _meeting(nodes: int) -> list[str]:
    """torchrun's options for where the processes find each other."""
    if nodes == 1:
        return ["--standalone"]  # at a port that is free
    first = int(os.environ["SLURM_NODEID"] == "0")
    return [
        f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={os.environ[MEETING]}",
        f"--rdzv-id={os.environ['SLURM_JOB_ID']}",
        f"--rdzv-conf=is_host={first}",
    ]


def _killed(error: ChildFailedError, processes: str) -> str | None:
    """Tell of a process that could tell nothing itself; those that were ended for it come last."""

    def order(failure: tuple[int, ProcessFailure]) -> int:
        code = failure[1].exitcode
        return 2 if code == -signal.SIGTERM else int(code > 0)

    rank, found = min(error.failures.items(), key=order)
    if found.exitcode > 0:
        return None
    return (
        f"error: process {rank} of 0 to {int(processes) - 1} was killed by "
        f"{found.signal_name()} and the others were ended: perhaps memory ran out. "
        "Started again, the run goes on from its newest checkpoint"
    )


if __name__ == "__main__":
    main()
