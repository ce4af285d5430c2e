"""Find a sandbox for programs that a model wrote: bubblewrap, or none.

A sandboxed program has its own network, process table and users, and sees only a read-only
interpreter of the machine. It can write no file. Its time, memory and threads are limited.
`search_sandbox` tries the ways to build such a sandbox here and returns the first one that passes
an experiment. If none passes, programs are not run. Only `unsafe_runner` runs them unprotected, and
a user must request it by name.

`forgetting.benchmarks.sandbox` documents what is covered and what is not.
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

TRIAL_SECONDS = 20.0  # limit of trials that should pass, since the machine may be busy

# How the sandboxed process loses its rights. An ordinary user's process runs in a user namespace
# without rights. Root becomes `nobody` first, because the kernel does not apply a limit on
# processes to root, not even inside a user namespace. If nobody cannot read the interpreter (one
# under /root), root builds the sandbox and the driver becomes `nobody` inside it.
_NOT_ROOT: tuple[Privilege, ...] = ("user",)
_ROOT: tuple[Privilege, ...] = ("nobody_outside", "nobody_inside")


@functools.cache
def search_sandbox() -> tuple[Sandbox | None, str]:
    """Return the first sandbox that passes the trials and a reason, or None and all reasons."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return None, "bubblewrap (the program `bwrap`) is not installed"
    reasons = []
    for candidate in candidates(bwrap):
        reason = find_weakness(candidate)
        if reason is None:
            return candidate, f"{candidate.name} held in a trial"
        reasons.append(f"{candidate.name}: {reason}")
    return None, "; ".join(reasons) or "no Python interpreter to run the programs with"


def unsafe_runner() -> Sandbox:
    """Return a runner without a sandbox: a plain subprocess with time and resource limits.

    Programs can read and delete this user's files and use the network. The study must set
    `sandbox: none`; use it on disposable machines only. There is no limit on processes, because it
    would count all processes of the user.
    """
    limits = replace(Limits(), processes=None)
    return Sandbox("none: programs run unprotected", sys.executable, limits=limits)


def candidates(bwrap: str) -> Iterator[Sandbox]:
    """Yield ways to build a sandbox here; those that show the least of the machine come first.

    The system's interpreter is under /usr, which programs see anyway. The last candidate is the
    interpreter that runs this module, with its installation folder.
    """
    features = _features(bwrap)
    own = str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())
    shown_folders: dict[str, str | None] = {}
    for python in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if os.access(python, os.X_OK):
            shown_folders.setdefault(str(Path(python).resolve()), None)
    own_folder = None if own.startswith("/usr/") else str(Path(sys.base_prefix).resolve())
    shown_folders.setdefault(own, own_folder)
    for python, shown in shown_folders.items():
        for privilege in _ROOT if os.geteuid() == 0 else _NOT_ROOT:
            yield Sandbox(
                name=f"bubblewrap ({privilege.replace('_', ' ')}, {python})",
                python=python,
                prefix=(bwrap, *_arguments(features, privilege, shown)),
                privilege=privilege,
                filtered=seccomp_filter() is not None,
            )


def _features(bwrap: str) -> frozenset[str]:
    """Return the options of this bubblewrap; releases since 0.4 differ."""
    process = subprocess.run([bwrap, "--help"], capture_output=True, text=True, check=False)
    words = (process.stdout + process.stderr).split()
    return frozenset(word for word in words if word.startswith("--"))


def _arguments(features: frozenset[str], privilege: Privilege, shown: str | None) -> list[str]:
    """Return bubblewrap's arguments: own namespaces, no rights or environment, read-only files."""
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
        # By default bubblewrap may create parent folders that only their owner can read.
        for parent in reversed(Path(shown).parents[:-1]):
            arguments += ["--dir", str(parent)]
        arguments += ["--ro-bind", shown, shown]
    # bubblewrap leaves these writable. The memory file systems /dev and /tmp do not limit the
    # number of files, and in /proc a process may escape the OOM killer (oom_score_adj).
    arguments += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    for writable in ("/proc", "/dev", "/tmp"):
        arguments += ["--remount-ro", writable]
    return [*arguments, "--chdir", "/tmp", "--remount-ro", "/"]


def find_weakness(sandbox: Sandbox) -> str | None:
    """Return why a sandbox fails its trials, or None: it must run, refuse, isolate and limit."""
    try:
        if not sandbox.run_program("f = abs", "assert f(-2) == 2", TRIAL_SECONDS).passed:
            return "a correct program does not pass"
        for wrong in ("f = int", "import sys; sys.exit(0)", "import os; os._exit(0)"):
            if sandbox.run_program(wrong, "assert f(-2) == 2").passed:
                return f"a wrong program passes: {wrong}"
        with tempfile.TemporaryDirectory(prefix="canary-") as folder:
            canary = Path(folder, "canary")
            canary.write_text("visible")
            Path(folder).chmod(0o755)  # otherwise rights, not the sandbox, exclude `nobody`
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
    """Return a program that passes only if it cannot reach the host."""
    sibling = f"{Path(sandbox.python).parent}/trial"
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
             "/proc/self/oom_score_adj", {sibling!r}):
    try:
        open(path, "w")
    except OSError:
        continue
    raise AssertionError(path + " can be written")
"""


def _limit_trial(limits: Limits) -> str:
    """Return a program that passes only if memory, file size, processes and threads are limited."""
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
