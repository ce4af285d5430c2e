"""Where programs that a model wrote may run: bubblewrap, or nowhere.

A sandboxed program sees its own network, process table and users and a read-only interpreter,
and nothing else of the machine. It can write no file. It may use a bounded amount of time, memory
and threads. `search_sandbox` tries the ways in which that can be had
here, and returns the first one that proves by experiment that it holds; if there is none,
programs are not run. `unsafe_runner` is the exception that a user has to ask for by name.

What is covered and what is not: see `forgetting.benchmarks.sandbox`.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from forgetting.benchmarks.sandbox.runner import MEBIBYTE, Limits, Privilege, Sandbox, SandboxError
from forgetting.benchmarks.sandbox.seccomp import seccomp_filter

TRIAL_SECONDS = 20.0  # for what should pass; the machine may be busy

# The way in which the sandboxed process loses its rights. An ordinary user's process lives in
# a user namespace that gives it none. Root becomes `nobody` first, because the kernel does not
# hold root to a limit on processes, not even inside a user namespace. Where nobody cannot read
# the interpreter (one that lives under /root), root builds the sandbox and the driver turns
# into `nobody` inside it.
_NOT_ROOT: tuple[Privilege, ...] = ("user",)
_ROOT: tuple[Privilege, ...] = ("nobody_outside", "nobody_inside")


@functools.cache
def search_sandbox() -> tuple[Sandbox | None, str]:
    """(sandbox, why): the first candidate that passes the probe, or None and all reasons."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return None, "bubblewrap (the program `bwrap`) is not installed"
    reasons = []
    for candidate in _candidates(bwrap):
        reason = _weakness(candidate)
        if reason is None:
            return candidate, f"{candidate.name} held in a trial"
        reasons.append(f"{candidate.name}: {reason}")
    return None, "; ".join(reasons) or "no Python interpreter to run the programs with"


def unsafe_runner() -> Sandbox:
    """No sandbox: a plain subprocess with a time limit and resource limits.

    Programs can read and delete this user's files and use the network. It is for machines
    that can be lost, and only where the configuration says `sandbox: none`. There is no limit
    on processes, since it would count all those of the user.
    """
    limits = replace(Limits(), processes=None)
    return Sandbox("none: programs run unprotected", sys.executable, limits=limits)


def _candidates(bwrap: str) -> Iterator[Sandbox]:
    """Ways to build a sandbox here, the least revealing interpreter first.

    The system's interpreter lies under /usr, which is shown to programs anyway. Otherwise the
    one that runs this module is taken, with the folder it was installed in.
    """
    features = _features(bwrap)
    own = str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())
    found: dict[str, str | None] = {}
    for python in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if os.access(python, os.X_OK):
            found.setdefault(str(Path(python).resolve()), None)
    found.setdefault(own, None if own.startswith("/usr/") else str(Path(sys.base_prefix).resolve()))
    for python, shown in found.items():
        for privilege in _ROOT if os.geteuid() == 0 else _NOT_ROOT:
            yield Sandbox(
                name=f"bubblewrap ({privilege.replace('_', ' ')}, {python})",
                python=python,
                prefix=(bwrap, *_arguments(features, privilege, shown)),
                privilege=privilege,
                filtered=seccomp_filter() is not None,
            )


def _features(bwrap: str) -> frozenset[str]:
    """Options that this bubblewrap knows; releases since 0.4 differ."""
    told = subprocess.run([bwrap, "--help"], capture_output=True, text=True, check=False)
    words = (told.stdout + told.stderr).split()
    return frozenset(word for word in words if word.startswith("--"))


def _arguments(features: frozenset[str], privilege: Privilege, shown: str | None) -> list[str]:
    """bubblewrap's arguments: own namespaces, no rights, no environment, a read-only view."""
    arguments = ["--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if privilege == "nobody_inside":
        arguments += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
        arguments += ["--unshare-cgroup-try", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        arguments += ["--unshare-all", "--unshare-user"]
        arguments += ["--disable-userns"] if "--disable-userns" in features else []
    if "--clearenv" in features:
        arguments += ["--clearenv", "--setenv", "PATH", "/usr/bin:/bin"]
    arguments += ["--ro-bind", "/usr", "/usr"]
    for folder in map(Path, ("/bin", "/sbin", "/lib", "/lib32", "/lib64")):
        if folder.is_symlink():
            arguments += ["--symlink", str(folder.readlink()), str(folder)]
        elif folder.is_dir():
            arguments += ["--ro-bind", str(folder), str(folder)]
    if shown:
        # Left to itself, bubblewrap may make the folders above it for their owner only.
        for above in reversed(Path(shown).parents[:-1]):
            arguments += ["--dir", str(above)]
        arguments += ["--ro-bind", shown, shown]
    # What bubblewrap leaves writable is closed: /dev and /tmp, whose memory file systems limit no
    # number of files, and /proc, where a process may raise its chance to be spared (oom_score_adj).
    arguments += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    for writable in ("/proc", "/dev", "/tmp"):
        arguments += ["--remount-ro", writable]
    return [*arguments, "--chdir", "/tmp", "--remount-ro", "/"]


def _weakness(sandbox: Sandbox) -> str | None:
    """Why the sandbox cannot be trusted, or None: it must run, refuse, isolate and limit."""
    try:
        if not sandbox.run_program("f = abs", "assert f(-2) == 2", TRIAL_SECONDS).passed:
            return "a correct program does not pass"
        for wrong in ("f = int", "import sys; sys.exit(0)", "import os; os._exit(0)"):
            if sandbox.run_program(wrong, "assert f(-2) == 2").passed:
                return f"a wrong program passes: {wrong}"
        with tempfile.TemporaryDirectory(prefix="canary-") as folder:
            canary = Path(folder, "canary")
            canary.write_text("visible")
            Path(folder).chmod(0o755)  # else `nobody` is kept out by rights, not by the sandbox
            trial = _isolation_trial(str(canary), sandbox)
            isolated = sandbox.run_program(trial, timeout=TRIAL_SECONDS)
        if not isolated.passed:
            return f"programs are not isolated ({isolated.detail})"
        limited = sandbox.run_program(_limit_trial(sandbox.limits), timeout=TRIAL_SECONDS)
        if not limited.passed:
            return f"programs are not limited ({limited.detail})"
        if sandbox.run_program("while True: pass", timeout=0.1).status != "timed_out":
            return "an endless program is not stopped"
    except SandboxError as error:
        return str(error)
    return None


def _isolation_trial(canary: str, sandbox: Sandbox) -> str:
    """A program that passes only where it can reach nothing of the host."""
    beside = f"{Path(sandbox.python).parent}/trial"
    return f"""
import os
assert not os.path.exists({canary!r}), "files of the host can be read"
assert not os.path.exists("/etc/shadow"), "/etc of the host can be read"
devices = [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line]
assert devices == ["lo"], "there is a network"
assert set(os.environ) <= {{"PATH", "PWD", "LC_CTYPE"}}, "the environment can be read"
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
assert os.getuid() != 0, "programs are root"
for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
    held = int(status[kind], 16)
    assert held == 0 or kind == "CapInh", "programs have capabilities: " + kind
assert status["NoNewPrivs"].strip() == "1", "programs can gain rights"
assert {not sandbox.filtered} or status["Seccomp"].strip() == "2", "system calls are not filtered"
assert sum(name.isdigit() for name in os.listdir("/proc")) <= 3, "other processes can be seen"
for path in ("/usr/trial", "/trial", "/dev/trial", "/dev/shm/trial", "/tmp/trial",
             "/proc/self/oom_score_adj", {beside!r}):
    try:
        open(path, "w")
    except OSError:
        continue
    raise AssertionError(path + " can be written")
"""


def _limit_trial(limits: Limits) -> str:
    """A program that passes only where memory, file size, processes and threads are bounded."""
    return f"""
import _thread, os, time
try:
    held = bytearray({limits.memory_mib + 64} * {MEBIBYTE})
except MemoryError:
    pass
else:
    raise AssertionError("memory is not limited")
try:
    os.ftruncate(os.memfd_create("trial"), {(limits.file_mib + 1) * MEBIBYTE})
except OSError:
    pass
else:
    raise AssertionError("file size is not limited")
children = []
try:
    for _ in range({2 * (limits.processes or 0)}):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        children.append(child)
except OSError:
    pass
else:
    raise AssertionError("processes are not limited")
finally:
    for child in children:
        os.kill(child, 9)
try:
    for _ in range({2 * (limits.processes or 8)}):
        _thread.start_new_thread(time.sleep, (60,))
except RuntimeError:
    pass
else:
    raise AssertionError("threads are not limited")
"""
