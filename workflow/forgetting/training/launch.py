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
from functools import partial
from typing import NoReturn

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

RENDEZVOUS_SECONDS = "FORGETTING_MEETING"
"""Variable with host and port at which the launchers of all nodes meet."""

RESTART_STATUS = "again"
"""What a process writes down there to have all started again."""


def main(argv: list[str] | None = None) -> None:
    """Become the program, or run so many of it."""
    processes, asked, *program = argv or sys.argv[1:]
    if processes in ("0", "1"):  # 0 where there is no GPU to ask for
        os.execv(sys.executable, [sys.executable, *program])
    logging.disable()
    nodes, attempt = int(asked), _this_node
    try:
        if RENDEZVOUS_SECONDS in os.environ:
            raise SystemExit(_this_node(nodes, processes, program))
        if nodes > 1:
            there, cores = _allocation()
            nodes = min(nodes, there)
            attempt = partial(_run_on_all_nodes, cores // there) if nodes > 1 else _this_node
        while True:
            host = socket.gethostname() if nodes > 1 else "localhost"
            notes = TCPStore(host, 0, is_master=True, wait_for_workers=False)
            os.environ[RENDEZVOUS_SECONDS] = f"{host}:{notes.port}"
            status = attempt(nodes, processes, program)
            if not notes.check([RESTART_STATUS]):
                raise SystemExit(status)
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None


def _notes_folder() -> TCPStore:
    """What the launcher has laid out for all to write in."""
    host, port = os.environ[RENDEZVOUS_SECONDS].rsplit(":", 1)
    return TCPStore(host, int(port), is_master=False)


def request_restart() -> NoReturn:
    """End this process, and have the launcher end the others and start all anew."""
    # First the word, so that whatever comes of this end is known for it, on every node.
    _notes_folder().set(RESTART_STATUS, "")
    # Not by the end of the interpreter, where a process group may wait for the others.
    os._exit(1)


def _this_node(nodes: int, processes: str, program: list[str]) -> int | str:
    """Run this node's processes; the status, or what there is to tell."""
    here = int(processes) // nodes
    if nodes > 1:
        here = int(os.environ.get("SLURM_GPUS_ON_NODE", here))
    # The processes share the cores; more threads than those would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // here)))
    meeting = [
        f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={os.environ[RENDEZVOUS_SECONDS]}",
    ]
    meeting += ["--rdzv-id=forgetting", "--rdzv-conf=is_host=0"]
    try:
        run(parse_args([*meeting, f"--nproc-per-node={here}", *program]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        repeated = _notes_folder().check([RESTART_STATUS])
        return 1 if repeated else _was_killed(error, processes) or 1
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


def _run_on_all_nodes(cores: int, nodes: int, processes: str, program: list[str]) -> int:
    """Start a launcher on every node, with so many cores of each; the largest status."""
    place = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    place += [f"--cpus-per-task={cores}", "--kill-on-bad-exit=1"]
    launcher = ["-m", "forgetting.training.launch", processes, str(nodes), *program]
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, _stop)
    with subprocess.Popen(["srun", *place, sys.executable, *launcher]) as srun:
        try:
            return srun.wait()
        except SignalException as error:
            srun.send_signal(error.sigval)
            raise


def _stop(number: int, _: object) -> NoReturn:
    raise SignalException("ended", signal.Signals(number))


def _was_killed(error: ChildFailedError, processes: str) -> str | None:
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
