"""Run programs in a sandbox that `search_sandbox` has found, and return their outcomes."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import select
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import IO, Any, Literal

from forgetting.benchmarks.sandbox import driver
from forgetting.benchmarks.sandbox.seccomp import seccomp_filter

Status = Literal["passed", "failed", "timed_out", "out_of_memory", "crashed"]
Privilege = Literal["user", "nobody_outside", "nobody_inside"]

NOBODY_USER = 65534
TESTER_USER = 65533  # runs the tests where bubblewrap makes no user namespace
MEBIBYTE = 2**20
START_SECONDS = 30.0  # limit for the start of sandbox and interpreter on a busy machine
WALL_TIME_FACTOR = 10  # a program's limit of wall time, in limits of processor time
END_SECONDS = 1.0  # limit for the end of a process whose pipe was closed
REPORT_BYTES = 65536
_SIGNALS = {6: "aborted", 7: "bus error", 9: "killed", 11: "segmentation fault"}
_TIME_SIGNALS = {24, 27}  # SIGXCPU, SIGPROF


class SandboxError(RuntimeError):
    """The sandbox itself failed, so the program has no outcome."""


@dataclass(frozen=True)
class Limits:
    """Resource limits of one program."""

    memory_mib: int = 512
    file_mib: int = 1
    open_files: int = 64
    processes: int | None = 8  # limits threads, since no program may have a second process


@dataclass(frozen=True)
class Outcome:
    """Outcome of a program; `detail` is a short excerpt of the reason."""

    status: Status
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Return whether the program and its tests finished without an exception."""
        return self.status == "passed"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Sandbox:
    """A way to run programs.

    Attributes:
        name: name for messages and records.
        python: the interpreter.
        prefix: the command line of bubblewrap; empty without a sandbox.
        privilege: how the process loses its rights.
        filtered: whether system calls are filtered.
        limits: resource limits of each program.
    """

    name: str
    python: str
    prefix: tuple[str, ...] = ()
    privilege: Privilege = "user"
    filtered: bool = False
    limits: Limits = field(default_factory=Limits)

    @property
    def isolated(self) -> bool:
        """Return whether programs are isolated from this machine."""
        return bool(self.prefix)

    def run_program(self, program: str, tests: str = "", timeout: float = 3.0) -> Outcome:
        """Run a program and then its tests, each for at most `timeout` seconds of processor time.

        Raises:
            SandboxError: the sandbox does not start in two attempts.
        """
        with contextlib.suppress(SandboxError):
            return self._attempt(program, tests, timeout)
        return self._attempt(program, tests, timeout)

    def run_programs(
        self, programs: Sequence[tuple[str, str]], workers: int = 2, timeout: float = 3.0
    ) -> list[Outcome]:
        """Return outcomes in the order of the programs and their tests.

        Each pair runs in sandboxes of its own. Equal pairs are run once.
        """
        unique = list(dict.fromkeys(programs))
        with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
            results = pool.map(lambda pair: self.run_program(pair[0], pair[1], timeout), unique)
            outcomes = dict(zip(unique, results, strict=True))
        return [outcomes[pair] for pair in programs]

    def _attempt(self, program: str, tests: str, timeout: float) -> Outcome:
        to_program, from_tests = os.pipe()
        to_tests, from_program = os.pipe()
        ends = (to_program, from_tests, to_tests, from_program)
        job = self._job(program, tests, timeout) | {"reads": to_tests, "writes": from_tests}
        with contextlib.ExitStack() as stack:
            folder = None
            if not self.isolated:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="program-"))
            try:
                holder = stack.enter_context(
                    _start(self, "program", folder, stdin=to_program, stdout=from_program)
                )
                tester = stack.enter_context(
                    _start(self, "tests", folder, inherited=(to_tests, from_tests))
                )
            finally:
                for descriptor in ends:
                    os.close(descriptor)
            threading.Thread(target=_write_input, args=(tester, job), daemon=True).start()
            return _judge(holder, tester, timeout)

    def _job(self, program: str, tests: str, timeout: float) -> dict[str, Any]:
        resources = {
            "RLIMIT_CORE": 0,
            "RLIMIT_CPU": math.ceil(timeout) + 1,
            "RLIMIT_FSIZE": self.limits.file_mib * MEBIBYTE,
            "RLIMIT_NOFILE": self.limits.open_files,
            "RLIMIT_NPROC": self.limits.processes,
            "RLIMIT_AS": self.limits.memory_mib * MEBIBYTE,
        }
        resources = {name: value for name, value in resources.items() if value is not None}
        limits = {"seconds": timeout, "resources": resources}
        users = (NOBODY_USER, TESTER_USER) if self.privilege == "nobody_inside" else None
        return {"program": program, "tests": tests, "limits": limits, "user": users}


@contextlib.contextmanager
def _start(
    sandbox: Sandbox,
    role: str,
    folder: str | None,
    stdin: int = subprocess.PIPE,
    stdout: int = subprocess.PIPE,
    inherited: tuple[int, ...] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process and kill it at the end of the block.

    Killing bubblewrap kills the first process of its process namespace, and the kernel then kills
    all others. Without bubblewrap the process group is killed.
    """
    command = [*sandbox.prefix]
    filters: list[int] = []
    if sandbox.filtered:
        filters.append(_filter_pipe())
        command += ["--seccomp", str(filters[0]), "--"]
    command += [sandbox.python, "-I", "-S", "-c", inspect.getsource(driver), role]
    user: dict[str, Any] = {}
    if sandbox.privilege == "nobody_outside":
        user = {"user": NOBODY_USER, "group": NOBODY_USER, "extra_groups": []}
    try:
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin"},
            cwd=folder or "/",
            start_new_session=True,
            pass_fds=(*filters, *inherited),
            **user,
        )
    except OSError as error:
        raise SandboxError(f"{command[0]} could not be started: {error}") from error
    finally:
        for descriptor in filters:
            os.close(descriptor)
    try:
        yield process
    finally:
        _kill(process)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def _filter_pipe() -> int:
    """Return a pipe from which bubblewrap reads the system-call filter (some 900 bytes)."""
    reader, writer = os.pipe()
    os.write(writer, seccomp_filter() or b"")
    os.close(writer)
    return reader


def _write_input(process: subprocess.Popen[bytes], job: dict[str, Any]) -> None:
    """Write a job to a process; the job may be larger than the pipe's buffer."""
    assert process.stdin is not None  # a pipe
    with contextlib.suppress(OSError, ValueError):  # the process ended, or its pipes are closed
        process.stdin.write(json.dumps(job).encode())
        process.stdin.close()


def _has_exited(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait at most `seconds` and return whether the process has exited."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


def _judge(
    holder: subprocess.Popen[bytes], tester: subprocess.Popen[bytes], timeout: float
) -> Outcome:
    """Wait for the end of the tests and return the outcome."""
    assert tester.stdout is not None  # a pipe
    select.select([tester.stdout], [], [], START_SECONDS)
    start = time.monotonic()
    finished = _has_exited(tester, WALL_TIME_FACTOR * timeout)
    stages = {message["stage"]: message for message in map(json.loads, _lines(tester.stdout))}
    if "started" not in stages:
        errors = b" ".join(_read(process.stderr) for process in (holder, tester))
        excerpt = errors.decode(errors="replace").strip()[-300:]
        raise SandboxError(f"the sandbox did not start ({tester.returncode}): {excerpt}")
    if not finished:
        return Outcome(
            "timed_out", f"stopped after {WALL_TIME_FACTOR * timeout:g} s without an end"
        )
    end = stages.get("ended")
    if end is not None and end["status"] != "broken":
        return Outcome(end["status"], end["detail"][:300])
    if end is not None and not _has_exited(holder, END_SECONDS):
        return Outcome("failed", f"no longer answers its tests: {end['detail']}"[:300])
    last = tester if end is None else holder
    number = last.returncode - 128 if last.returncode > 128 else -last.returncode
    if number in _TIME_SIGNALS or (number == 9 and time.monotonic() - start >= timeout):
        return Outcome("timed_out", f"stopped after {timeout:g} s of processor time")
    if number in _SIGNALS:
        return Outcome("crashed", _SIGNALS[number])
    return Outcome("failed", f"left before its tests had ended (exit status {last.returncode})")


def _lines(stream: IO[bytes]) -> list[bytes]:
    return _read(stream).splitlines()


def _read(stream: IO[bytes] | None) -> bytes:
    """Return the current content of a pipe, at most 64 KiB, which is the capacity of a pipe.

    This does not wait for the end of the stream, which a surviving process could delay.
    """
    data = b""
    while stream is not None and len(data) < REPORT_BYTES:
        ready, _, _ = select.select([stream], [], [], 0)
        chunk = os.read(stream.fileno(), REPORT_BYTES - len(data)) if ready else b""
        if not chunk:
            break
        data += chunk
    return data
