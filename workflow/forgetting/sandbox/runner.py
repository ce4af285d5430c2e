"""Runs programs in a sandbox that `forgetting.sandbox` has found, and tells how they ended."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import secrets
import select
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import IO, Any, Literal

from forgetting.sandbox import driver
from forgetting.sandbox.filter import seccomp_filter

Status = Literal["passed", "failed", "timed_out", "out_of_memory", "crashed"]
Privilege = Literal["user", "nobody_outside", "nobody_inside"]

NOBODY = 65534
MEBIBYTE = 2**20
START_SECONDS = 30.0  # for the sandbox and the interpreter to come up on a busy machine
GRACE_SECONDS = 0.3  # to report an end that came in time, before a program is killed
REPORT_BYTES = 65536
_SIGNALS = {6: "aborted", 9: "killed", 11: "segmentation fault", 24: "processor time used up"}


class SandboxError(RuntimeError):
    """The sandbox itself did not work, so that nothing can be said about the program."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. Memory is per process; a program may have few processes."""

    memory_mib: int = 512
    file_mib: int = 1
    scratch_mib: int = 16
    open_files: int = 64
    processes: int | None = 8  # and threads


@dataclass(frozen=True)
class Outcome:
    """How a program ended. `detail` is a short excerpt of the reason, `seconds` its own time."""

    status: Status
    detail: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the program came to its end, tests included, without an exception."""
        return self.status == "passed"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Sandbox:
    """One way to run programs: the interpreter, what stands before it, and the limits."""

    name: str
    python: str
    prefix: tuple[str, ...] = ()
    privilege: Privilege = "user"
    filtered: bool = False
    limits: Limits = field(default_factory=Limits)

    @property
    def isolated(self) -> bool:
        """Whether anything stands between a program and this machine."""
        return bool(self.prefix)

    def run_program(self, program: str, timeout: float = 3.0) -> Outcome:
        """Run a program (tests included) for at most `timeout` seconds of its own time.

        Raises `SandboxError` if the sandbox itself does not come up. That is tried twice, and
        then once with a harmless program: one that swallows its own report fails alone.
        """
        for _ in range(2):
            with contextlib.suppress(SandboxError):
                return self._attempt(program, timeout)
        self._attempt("pass", timeout)
        return Outcome("crashed", "left no report")

    def run_programs(
        self, programs: Sequence[str], workers: int = 2, timeout: float = 3.0
    ) -> list[Outcome]:
        """Outcomes in the order of the programs, each run in a sandbox of its own.

        Programs that are the same, letter by letter, are run once.
        """
        different = list(dict.fromkeys(programs))
        with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
            ends = pool.map(lambda program: self.run_program(program, timeout), different)
            outcomes = dict(zip(different, ends, strict=True))
        return [outcomes[program] for program in programs]

    def _attempt(self, program: str, timeout: float) -> Outcome:
        nonce = secrets.token_hex(16)
        with (
            tempfile.TemporaryDirectory(prefix="program-") as folder,
            tempfile.TemporaryFile() as job,
        ):
            job.write(json.dumps(self._job(program, nonce, timeout)).encode())
            job.seek(0)
            where = None if self.isolated else folder
            with _started(self, job, where) as process:
                finished = _wait(process, timeout + GRACE_SECONDS)
                report, errors = _read(process.stdout), _read(process.stderr)
        return _outcome(report, errors, process.returncode, nonce, timeout, finished)

    def _job(self, program: str, nonce: str, timeout: float) -> dict[str, Any]:
        limits = {
            "address_space": self.limits.memory_mib * MEBIBYTE,
            "processor_seconds": int(timeout + GRACE_SECONDS) + 1,
            "file_size": self.limits.file_mib * MEBIBYTE,
            "open_files": self.limits.open_files,
            "processes": self.limits.processes,
        }
        user = NOBODY if self.privilege == "nobody_inside" else None
        job = {"program": program, "nonce": nonce, "seconds": timeout, "limits": limits}
        return job | {"user": user}


@contextlib.contextmanager
def _started(
    sandbox: Sandbox, job: IO[bytes], folder: str | None
) -> Iterator[subprocess.Popen[bytes]]:
    """The running process; whatever happens, it is gone when the block is left.

    Killing bubblewrap kills the first process in its process namespace, and with that one
    the kernel kills all the others. Without bubblewrap the process group is what can be had.
    """
    command = [*sandbox.prefix]
    inherited: list[int] = []
    if sandbox.filtered:
        inherited.append(_filter_pipe())
        command += ["--seccomp", str(inherited[0]), "--"]
    command += [sandbox.python, "-I", "-S", "-c", inspect.getsource(driver)]
    nobody: dict[str, Any] = {}
    if sandbox.privilege == "nobody_outside":
        nobody = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    try:
        process = subprocess.Popen(
            command,
            stdin=job,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin"},
            cwd=folder or "/",
            start_new_session=True,
            pass_fds=inherited,
            **nobody,
        )
    except OSError as error:
        raise SandboxError(f"{command[0]} could not be started: {error}") from error
    finally:
        for descriptor in inherited:
            os.close(descriptor)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def _filter_pipe() -> int:
    """A pipe from which bubblewrap reads the system-call filter (it is some 900 bytes)."""
    reader, writer = os.pipe()
    os.write(writer, seccomp_filter() or b"")
    os.close(writer)
    return reader


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the process ended in time, counted from its first word; it is killed if not."""
    assert process.stdout is not None  # it is a pipe
    select.select([process.stdout], [], [], START_SECONDS)
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
        return False


def _read(stream: IO[bytes] | None) -> bytes:
    """What is in a pipe now, at most 64 KiB: a pipe holds no more, and nobody drained it.

    It does not wait for the end of the stream, which a surviving process could withhold.
    """
    data = b""
    while stream is not None and len(data) < REPORT_BYTES:
        ready, _, _ = select.select([stream], [], [], 0)
        chunk = os.read(stream.fileno(), REPORT_BYTES - len(data)) if ready else b""
        if not chunk:
            break
        data += chunk
    return data


def _outcome(
    report: bytes, errors: bytes, code: int, nonce: str, timeout: float, finished: bool
) -> Outcome:
    messages = [message for line in report.splitlines() if (message := _parsed(line))]
    started = any(message.get("stage") == "started" for message in messages)
    ended = next((m for m in messages if m.get("nonce") == nonce), None)
    if not finished:
        if not started:
            raise SandboxError(f"no program was started within {START_SECONDS:g} s")
        return Outcome("timed_out", f"stopped after {timeout:g} s", timeout)
    if not started:
        excerpt = errors.decode(errors="replace").strip()[-300:]
        raise SandboxError(f"the sandbox ended with status {code}: {excerpt}")
    if ended is not None:
        return Outcome(ended["status"], str(ended["detail"])[:300], float(ended["seconds"]))
    number = code - 128 if code > 128 else -code
    if number == 24:
        return Outcome("timed_out", _SIGNALS[number], timeout)
    if number in _SIGNALS:
        return Outcome("crashed", _SIGNALS[number])
    return Outcome("failed", f"left before its tests had ended (exit status {code})")


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None
