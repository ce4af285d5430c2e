"""Runs one program inside the sandbox; reports how it ended. Standard library only.

The sandbox cannot see this package: the text of this file is handed to the interpreter on
its command line (`python3 -I -S -c TEXT`). It must therefore stay self-contained.

Standard input carries one JSON object: {"program", "nonce", "seconds", "limits":
{"address_space", "processor_seconds", "file_size", "open_files", "processes"}, "user"}.
Standard output is a pipe to the runner. Two JSON lines go there: {"stage": "started"} before
the program, and afterwards {"stage": "ended", "nonce", "status", "detail", "seconds"}. A
program that leaves early (sys.exit, os._exit, a signal) never gets to the second line, and
one that prints it has to guess the nonce.

The nonce guards against programs that end early or print. It does not guard against one
written to deceive its tests (an object that equals everything, or a walk through this
process): tests and program share an interpreter, as in every HumanEval scorer.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any


def _limit(kind: int, value: int | None) -> None:
    if value is not None:
        resource.setrlimit(kind, (value, value))


def _apply_limits(limits: dict[str, Any], user: int | None) -> None:
    """Give up root (if we were started as root), then set what a program may use."""
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, limits["processor_seconds"])
    _limit(resource.RLIMIT_FSIZE, limits["file_size"])
    _limit(resource.RLIMIT_NOFILE, limits["open_files"])
    _limit(resource.RLIMIT_NPROC, limits["processes"])
    _limit(resource.RLIMIT_AS, limits["address_space"])


def _silence() -> int:
    """Point the standard streams at /dev/null; return a private copy of the report pipe.

    What a program prints is not scored, and must not fill the pipe.
    """
    report = os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)
    return report


def _say(report: int, **message: object) -> None:
    os.write(report, json.dumps(message).encode() + b"\n")


def _run(program: str) -> tuple[str, str]:
    """(status, detail) of a program run in empty globals, as code_eval runs it."""
    try:
        exec(compile(program, "<program>", "exec"), {})
    except MemoryError:
        return "out_of_memory", "MemoryError"
    except BaseException as error:  # SystemExit and KeyboardInterrupt are failures, too
        try:
            text = str(error)[:200]
        except BaseException:
            text = ""
        return "failed", f"{type(error).__name__}: {text}".removesuffix(": ")
    return "passed", ""


def main() -> None:
    """Read the job, run it, report, and leave without running what the program registered."""
    job = json.loads(sys.stdin.buffer.read())
    _apply_limits(job["limits"], job["user"])
    report = _silence()
    nonce, allowed = job.pop("nonce"), job["seconds"]
    _say(report, stage="started")
    begin = time.monotonic()
    clock, say, leave = time.monotonic, _say, os._exit
    status, detail = _run(job.pop("program"))
    seconds = clock() - begin
    if status == "passed" and seconds > allowed:
        status, detail = "timed_out", f"took {seconds:.1f} s, {allowed:g} s are allowed"
    say(report, stage="ended", nonce=nonce, status=status, detail=detail, seconds=seconds)
    leave(0)


if __name__ == "__main__":
    main()
