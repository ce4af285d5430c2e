"""Start a program in one process, or in several that form a process group.

    python -m forgetting.training.launch PROCESSES NODES PROGRAM ARGUMENT...

A wrapper of torchrun that prints one line at the end in place of the launcher's traceback. When a
process fails, the launcher ends the others and its exit status is not 0. A process that is out of
memory can request a restart of all processes; torchrun's own restarts would repeat any failure. In
a SLURM job of several nodes the processes are spread over the nodes, one for each GPU. Elsewhere
all of them run on this machine.
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

RENDEZVOUS_VARIABLE = "FORGETTING_RENDEZVOUS"
"""Environment variable with the host and port of the store that the launchers of all nodes use."""

RESTART_KEY = "restart"
"""Key that a process sets in the store to request a restart of all processes."""


def main(argv: list[str] | None = None) -> None:
    """Replace this process by the program, or run it in several processes."""
    processes, requested_nodes, *program = argv or sys.argv[1:]
    if processes in ("0", "1"):  # 0 where a site has no GPUs
        os.execv(sys.executable, [sys.executable, *program])
    logging.disable()
    nodes, run_program = int(requested_nodes), _run_on_this_node
    try:
        if RENDEZVOUS_VARIABLE in os.environ:
            raise SystemExit(_run_on_this_node(nodes, processes, program))
        if nodes > 1:
            allocated, cores = _allocation()
            nodes = min(nodes, allocated)
            if nodes > 1:
                run_program = partial(_run_on_all_nodes, cores // allocated)
        while True:
            host = socket.gethostname() if nodes > 1 else "localhost"
            store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
            os.environ[RENDEZVOUS_VARIABLE] = f"{host}:{store.port}"
            status = run_program(nodes, processes, program)
            if not store.check([RESTART_KEY]):
                raise SystemExit(status)
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None


def _launcher_store() -> TCPStore:
    """Connect to the store of the launcher."""
    host, port = os.environ[RENDEZVOUS_VARIABLE].rsplit(":", 1)
    return TCPStore(host, int(port), is_master=False)


def request_restart() -> NoReturn:
    """End this process and make the launcher restart all processes."""
    # Set the key first, so that the launchers of all nodes recognize the failure that follows.
    _launcher_store().set(RESTART_KEY, "")
    # A regular exit of the interpreter could block, since a process group waits for its peers.
    os._exit(1)


def _run_on_this_node(nodes: int, processes: str, program: list[str]) -> int | str:
    """Run the processes of this node; return the exit status or a message."""
    local = int(processes) // nodes
    if nodes > 1:
        local = int(os.environ.get("SLURM_GPUS_ON_NODE", local))
    # The processes share the cores; more threads than cores would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local)))
    options = [
        f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={os.environ[RENDEZVOUS_VARIABLE]}",
        "--rdzv-id=forgetting",
        "--rdzv-conf=is_host=0",
        f"--nproc-per-node={local}",
    ]
    try:
        run(parse_args([*options, *program]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        if _launcher_store().check([RESTART_KEY]):
            return 1
        return _kill_message(error, processes) or 1
    return 0


def _allocation() -> tuple[int, int]:
    """Return the numbers of nodes and of processor cores of this SLURM job; (1, 0) without SLURM.

    squeue has to be called, since Snakemake's plugin removes all SLURM variables but the job's id.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return 1, 0
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%D %C"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        nodes, cores = map(int, done.stdout.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        raise SystemExit(f"error: squeue does not report the nodes of this job, {job}") from None
    return nodes, cores


def _run_on_all_nodes(cores: int, nodes: int, processes: str, program: list[str]) -> int:
    """Start a launcher on every node with `cores` cores; return the largest exit status."""
    options = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    options += [f"--cpus-per-task={cores}", "--kill-on-bad-exit=1"]
    launcher = ["-m", "forgetting.training.launch", processes, str(nodes), *program]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise_signal)
    with subprocess.Popen(["srun", *options, sys.executable, *launcher]) as srun:
        try:
            return srun.wait()
        except SignalException as error:
            srun.send_signal(error.sigval)
            raise


def _raise_signal(number: int, _: object) -> NoReturn:
    raise SignalException("ended", signal.Signals(number))


def _kill_message(error: ChildFailedError, processes: str) -> str | None:
    """Return a message if a signal killed a process, which cannot report it; otherwise None."""

    def order(failure: tuple[int, ProcessFailure]) -> int:
        # The launcher ends the remaining processes by SIGTERM, so that signal explains nothing.
        code = failure[1].exitcode
        return 2 if code == -signal.SIGTERM else int(code > 0)

    rank, failure = min(error.failures.items(), key=order)
    if failure.exitcode > 0:
        return None
    return (
        f"error: process {rank} of 0 to {int(processes) - 1} was killed by "
        f"{failure.signal_name()} and the others were ended; perhaps memory ran out. "
        "Start the job again: the run resumes from its newest checkpoint"
    )


if __name__ == "__main__":
    main()
