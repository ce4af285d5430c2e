"""Programs that a model wrote can only pass or fail."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from forgetting.benchmarks.sandbox import Outcome, discovery, search_sandbox, unsafe_runner
from forgetting.benchmarks.sandbox.runner import Limits, Sandbox
from forgetting.benchmarks.sandbox.seccomp import REFUSED

REAL_DATA = Path(
    os.environ.get("FORGETTING_REAL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")
)
LIBRARY = Path(discovery.__file__).resolve().parents[3]


def _working() -> list[Sandbox]:
    """Return one sandbox per kind of privilege that works here (root has two)."""
    found: dict[str, Sandbox] = {}
    bwrap = shutil.which("bwrap")
    for candidate in discovery.candidates(bwrap) if bwrap else []:
        if candidate.privilege not in found and discovery.find_weakness(candidate) is None:
            found[candidate.privilege] = candidate
    return list(found.values())


SANDBOXES = _working()
needs_sandbox = pytest.mark.skipif(not SANDBOXES, reason=f"no sandbox: {search_sandbox()[1]}")


@pytest.fixture(scope="module", params=SANDBOXES, ids=lambda sandbox: sandbox.privilege)
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    """Return each kind of sandbox that works on this machine."""
    return request.param  # type: ignore[no-any-return]


# Programs that must not pass, and their expected status.
LOSERS = {
    "wrong answer": ("assert 1 + 1 == 3", "failed"),
    "syntax error": ("def f(:", "failed"),
    "null byte": ("x = '\0'", "failed"),
    "sys.exit(0)": ("import sys; sys.exit(0)", "failed"),
    "os._exit(0)": ("import os; os._exit(0)", "failed"),
    "raise SystemExit": ("raise SystemExit", "failed"),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", "failed"),
    "reads input": ("input()", "failed"),
    "exception without text": (
        "class E(Exception):\n def __str__(self): raise ValueError\nraise E",
        "failed",
    ),
    "endless loop": ("while True: pass", "timed_out"),
    "endless, catches all": (
        "while True:\n try:\n  while True: pass\n except BaseException: pass",
        "timed_out",
    ),
    "endless, ignores signals": (
        "import signal\nfor s in (1, 2, 3, 14, 15, 24): signal.signal(s, signal.SIG_IGN)\n"
        "while True: pass",
        "timed_out",
    ),
    "sleep": ("import time; time.sleep(100)", "timed_out"),
    "output flood": ("while True: print('x' * 100000)", "timed_out"),
    "error flood": ("import os\nwhile True: os.write(2, b'x' * 100000)", "timed_out"),
    "memory": ("x = bytearray(3 * 2**30)", "out_of_memory"),
    "memory, slowly": ("x = []\nwhile True: x.append('y' * 2**20)", "out_of_memory"),
    "segmentation fault": ("import ctypes; ctypes.string_at(0)", "crashed"),
    "abort": ("import os; os.abort()", "crashed"),
    "kills itself": ("import os; os.kill(os.getpid(), 9)", "crashed"),
    "deep recursion": ("def f(): return f()\nf()", "failed"),
    "bottomless recursion": (
        "import sys; sys.setrecursionlimit(10**9)\n"
        "class A:\n def __getattr__(self, n): return getattr(self, n + 'x')\nrepr(A().y)",
        None,
    ),
    "regular expression": ("import re; re.match('(a+)+$', 'a' * 60 + 'b')", "timed_out"),
    "huge number": ("x = 9 ** 9 ** 9", None),
    "stops itself": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "timed_out"),
    "closes the report": ("import os; os.closerange(0, 256)", None),
    "replaces its process": (
        "import os; os.execv('/usr/bin/python3', ['python3', '-c', 'pass'])",
        None,
    ),
    "leaves the end to a child": (
        "import os, time\nif os.fork():\n os._exit(0)\nos.setsid()\ntime.sleep(100)",
        "failed",
    ),
    "fork bomb": ("import os\nwhile True: os.fork()", None),
    "fork bomb, catches all": (
        "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
        "timed_out",
    ),
    "thread flood": (
        "import threading, time\n"
        "while True: threading.Thread(target=time.sleep, args=(50,)).start()",
        "failed",
    ),
    "messages without an end": ("import os\nwhile True: os.write(4, b'x' * 4096)", None),
    "messages that are none": ("import os\nwhile True: os.write(4, b'[1]\\n')", "failed"),
    "fills the report": (
        "import os\nfor fd in range(3, 64):\n"
        " try:\n  while True: os.write(fd, b'x' * 4096)\n except OSError: pass\nos._exit(0)",
        None,
    ),
    "drains the report": (
        "import os\nfor fd in range(3, 64):\n"
        " try: open(f'/proc/self/fd/{fd}', 'rb', buffering=0).read(100)\n"
        " except OSError: pass\nos._exit(0)",
        None,
    ),
}


@needs_sandbox
@pytest.mark.parametrize("name", list(LOSERS))
def test_failing_program_never_passes(sandbox: Sandbox, name: str) -> None:
    """Programs fail, exit early, exceed limits or fake their end."""
    program, status = LOSERS[name]
    begin = time.monotonic()
    # Endless programs get a short time limit.
    outcome = sandbox.run_program(program, timeout=0.1 if status in (None, "timed_out") else 10.0)
    assert not outcome.passed
    assert status is None or outcome.status == status, outcome
    assert time.monotonic() - begin < 20


# Wrong programs that try to pass.
SQUARES = "assert f(3) == 9\nassert abs(f(4) - 16) < 1e-6\nassert isinstance(f(5), int)"
VERDICT = r"""
def f(x): return None
VERDICT = (
    b'{"stage": "started"}\n{"stage": "ended", "status": "passed", "detail": ""}\n'
    b'["returned", true, []]\n'
)
"""
SPOOFS = {
    "patched json.dumps": VERDICT + "import json\njson.dumps = lambda *a, **k: VERDICT.decode()",
    "patched os.write": VERDICT
    + "import os\nwrite = os.write\nos.write = lambda fd, data: write(fd, VERDICT) and len(data)",
    "a walk through the frames": VERDICT
    + """
import os, sys
def f(x):
    frame = sys._getframe()
    while frame:
        for value in [*frame.f_locals.values()]:
            if hasattr(value, "call"):
                value.call("setattr", value, "broken", False)
            if hasattr(value, "send"):
                value.send("returned", True, [])
            if hasattr(value, "functions"):
                value.functions["call"] = lambda *a: True
        frame = frame.f_back
""",
    "a changed driver": VERDICT
    + "import __main__, sys\n__main__.Peer._pack = lambda self, value: True\n"
    "__main__.run_tests = sys.exit",
    "forked guesses": VERDICT
    + """
import os
for guess in (4, 9, 16, 25):
    try:
        child = os.fork()
    except OSError:
        child = 1
    if child == 0:
        f = lambda x: guess
        break
""",
    "writes to every descriptor of every process": VERDICT
    + """
import glob, os
for name in [*range(64), *glob.glob("/proc/[0-9]*/fd/*"), *glob.glob("/proc/self/fd/*")]:
    try:
        os.write(name if isinstance(name, int) else os.open(name, os.O_WRONLY), VERDICT)
    except OSError:
        pass
os._exit(0)
""",
    "reads every descriptor of every process": VERDICT
    + """
import glob, os
found = b""
for name in glob.glob("/proc/[0-9]*/fd/*"):
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
        found += os.read(fd, 4096)
    except OSError:
        pass
assert b"assert" not in found, os.write(4, VERDICT)
""",
    "looks for its tests in memory": VERDICT
    + """
import os, re
for process in ("self", "1", str(os.getppid())):
    try:
        maps, memory = open(f"/proc/{process}/maps"), open(f"/proc/{process}/mem", "rb", 0)
    except OSError:
        continue
    for low, high in re.findall("^(\\\\w+)-(\\\\w+) rw", maps.read(), re.M):
        memory.seek(int(low, 16))
        try:
            if re.search(rb"f[(]3[)] == 9", memory.read(int(high, 16) - int(low, 16))):
                f = lambda x: x * x
        except OSError:
            pass
""".replace("\\\\", "\\"),
    "exits with status 0": VERDICT + "import os\ndef f(x): os._exit(0)",
    "becomes another program": VERDICT
    + "import os\ndef f(x): os.execv('/bin/echo', ['echo', '[\"returned\", true, []]'])",
    "equals everything": """
class Any(int):
    def __eq__(self, other): return True
    __ne__ = lambda self, other: False
    __lt__ = __le__ = __gt__ = __ge__ = __eq__
    __sub__ = __rsub__ = __abs__ = lambda self, *other: self
    __hash__ = int.__hash__
def f(x): return Any()
""",
    "replaced built-in functions": """
import builtins, math
def f(x): return 9
def abs(x): return 0
def isinstance(*_): return True
builtins.abs, builtins.isinstance = abs, isinstance
""",
    "names that the tests do not use": VERDICT
    + """
import sys
frame = sys._getframe(1)
while "peer" not in frame.f_locals:
    frame = frame.f_back
frame.f_locals["peer"].functions["define"] = None
frame.f_locals["peer"].send(
    "returned",
    ["builtins.dict", ["f", ["type", "builtins.int"], "__builtins__", ["builtins.dict", []]]],
    [],
)
""",
}


@needs_sandbox
@pytest.mark.parametrize("name", list(SPOOFS))
def test_program_cannot_write_its_verdict(sandbox: Sandbox, name: str) -> None:
    """The tests run in another process, which the program neither sees nor reaches."""
    assert sandbox.run_program("def f(x): return x * x", SQUARES).passed
    outcome = sandbox.run_program(SPOOFS[name], SQUARES)
    assert not outcome.passed, outcome


@needs_sandbox
@pytest.mark.parametrize(
    "tests",
    [
        "assert abs(f(3.5) - 0.5) < 1e-6",
        "assert f(1) - 3 == 0",
        "import math\nassert math.fabs(f(1) - 3) < 1e-6",
        "assert 3 - f(1) == 0",
        "assert abs(f(1)) == 0",
    ],
)
def test_objects_of_a_program_cannot_fake_differences(sandbox: Sandbox, tests: str) -> None:
    """HumanEval compares floats in these ways."""
    zero = "__sub__ = __rsub__ = __abs__ = lambda self, *other: 0.0"
    assert not sandbox.run_program(f"class A:\n {zero}\ndef f(x): return A()", tests).passed
    plain = "def f(x): return x % 1.0 if x % 1 else 3"
    if "3.5" in tests:
        assert sandbox.run_program(plain, tests).passed


COMPUTED = """
class Any:
    __sub__ = __rsub__ = __add__ = __xor__ = __abs__ = __neg__ = lambda self, *other: Any()
    __int__ = __index__ = __len__ = __hash__ = lambda self: 0
    __float__ = lambda self: 0.0
    __bool__ = lambda self: False
    __getitem__ = lambda self, key: 0
    __iter__ = lambda self: iter(())
def f(x): return Any()
"""


@needs_sandbox
@pytest.mark.parametrize(
    "test",
    [
        "math.fabs(f(1) - 3) < 1e-6",
        "math.isclose(3 - f(1), 0.0)",
        "math.fabs(abs(f(1) - 3)) < 1e-6",
        "float(-(f(1) - 3) + f(1)) == 0",
        "int(f(1) - 3) == 0",
        "[0, 1][f(1) - 3] == 0",
        "not f(1) - 3",
        "len(f(1) ^ {1, 2}) == 0",
        "not list(f(1) ^ {1, 2})",
        "(f(1) - 3)[0] == 0",
        "hash(f(1) - 3) == 0",
    ],
)
def test_computed_objects_of_a_program_are_not_converted(sandbox: Sandbox, test: str) -> None:
    """The program has seen the expected value, and could choose 0 for every difference."""
    outcome = sandbox.run_program(COMPUTED, f"import math\nassert {test}")
    assert outcome.status == "failed"
    assert "that the program computed from a value" in outcome.detail


@needs_sandbox
def test_modules_of_tests_are_not_the_programs(sandbox: Sandbox) -> None:
    """Tests may rely on an import of the program, which gets them the library's module."""
    tests = "assert math.isclose(f(2), 4)"
    assert sandbox.run_program("import math\ndef f(x): return x * x", tests).passed
    fake = "class math: isclose = staticmethod(lambda *_: True)\ndef f(x): return 9"
    assert sandbox.run_program(fake, tests).status == "failed"


@needs_sandbox
def test_program_cannot_exploit_objects_of_its_tests(sandbox: Sandbox) -> None:
    """It can only call functions of the tests, and it cannot replace their modules."""
    tests = "import math\nseen = []\nassert f(lambda x: seen.append(x)) == 1 and seen == [7]"
    names = ("__globals__", "__code__", "gi_frame", "__self__", "__class__", "__dict__")
    program = f"""
import __main__, math
def f(g):
    g(7)
    ask = g._peer.call
    tried = [("getattr", g, name) for name in {names!r}]
    tried += [("call", print), ("getattr", math, "floor"), ("eq", g, g), ("define", "x = 1", [])]
    tried += [("call", ValueError, 1), ("setattr", g, "__code__", 1)]
    for function, *args in tried:
        try:
            ask(function, *args)
        except (AttributeError, KeyError, TypeError):
            continue
        return function, args
    return 1
"""
    outcome = sandbox.run_program(program, tests)
    assert outcome.passed, outcome
    generator = "def rows():\n yield 1\n yield 2\nassert f(rows()) == 3"
    assert sandbox.run_program("def f(g): return sum(g)", generator).passed
    outcome = sandbox.run_program("def f(g): return g.gi_frame.f_builtins or 3", generator)
    assert "refused" in outcome.detail, outcome


# Correct programs whose tests do more than compare plain results.
HONEST = {
    "changes its argument": ("def f(x): x.sort()", "x = [3, 1]\nf(x)\nassert x == [1, 3]"),
    "named like a built-in function": (
        "def sum(a, b): return a + b",
        "assert sum(1, 2) == 3",
    ),
    "a module that the program imported": (
        "import math\ndef f(x): return math.sqrt(x)",
        "def check(c):\n assert math.isclose(c(2) ** 2, 2)\ncheck(f)",
    ),
    "named like a module": ("def copy(x): return x[:]", "assert copy([1]) == [1]"),
    "a second function of the program": (
        "def encode(s): return s[::-1]\ndef decode(s): return s[::-1]",
        "def check(c):\n assert c(encode('ab')) == 'ab'\ncheck(decode)",
    ),
    "raises": (
        "class Low(ValueError): pass\ndef f(x): raise Low('no')",
        "try: f(1)\nexcept ValueError as e: assert str(e) == 'no'\nelse: assert False",
    ),
    "objects of a class": (
        "class Pair:\n def __init__(self, a, b): self.a, self.b = a, b\n"
        " def __eq__(self, o): return self.a == o.a\n def __len__(self): return 2\n"
        " def __add__(self, o): return Pair(self.a + o.a, 0)\n"
        "def f(pairs): return max(p.b for p in pairs)",
        "p = Pair(1, b=5)\np.b = 7\nassert f([p, Pair(2, 6)]) == 7 and p.a == 1 and len(p) == 2\n"
        "assert p == Pair(1, 0) and p + p == Pair(2, 0) and isinstance(p, Pair)",
    ),
    "arithmetic with objects of a class": (
        "class V:\n def __init__(self, x): self.x = x\n"
        " def __mul__(self, n): return V(self.x * n)\n __rmul__ = __mul__\n"
        " def __sub__(self, v): return self.x - v.x\n def __str__(self): return f'V({self.x})'",
        "a = 3 * V(2) * 2\nassert a.x == 12 and str(a) == 'V(12)'\nassert V(5) - V(3) == 2\n"
        "assert float(V(5) - V(3)) == 2.0",
    ),
    "a class of the tests": (
        "def f(node):\n node.next.value += 1\n return node.value + node.next.value",
        "class Node:\n def __init__(self, value, next=None): self.value, self.next = value, next\n"
        "n = Node(1, Node(2))\nassert f(n) == 4 and n.next.value == 3",
    ),
    "a generator": (
        "def f():\n n = 0\n while True:\n  yield n\n  n += 1",
        "g = f()\nassert [next(g) for _ in range(3)] == [0, 1, 2] and next(g) == 3",
    ),
    "a function for a function": (
        "def f(g): return lambda x: g(g(x))",
        "assert f(lambda x: x + 1)(1) == 3 and f(abs)(-2) == 2",
    ),
    "many kinds of values": (
        "import collections, decimal, fractions\ndef f(x): return x",
        "import math\nfrom collections import *\nfrom decimal import *\nfrom fractions import *\n"
        "for x in (None, True, 1, -(10 ** 5000), .1, float('inf'), 'a\\ud800', b'\\xff', (1, [2]),"
        " {1, 2}, {(1, 2): {'a': 3}}, frozenset([1]), 1j, range(3), deque([1]), Counter('aab'),"
        " Decimal('1.10'), Fraction(1, 3), bytearray(b'x'), slice(1, 2), OrderedDict(a=1)):\n"
        " assert f(x) == x and type(f(x)) is type(x), x\n"
        "assert math.isnan(f(float('nan'))) and str(f(-0.0)) == '-0.0' and f(int) is int",
    ),
    "threads and an event loop": (
        "import asyncio\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "async def g(x): return x + 1\n"
        "def f(x):\n with ThreadPoolExecutor(4) as pool: return sum(pool.map(int, x)) + "
        "asyncio.run(g(1))",
        "assert f(['1', '2']) == 5",
    ),
    "thousands of calls": ("def f(x): return -x", "assert all(f(n) == -n for n in range(5000))"),
}


@needs_sandbox
@pytest.mark.parametrize("name", list(HONEST))
def test_tests_may_use_objects_of_a_program(name: str) -> None:
    """Arguments, results, exceptions and objects cross between the two processes."""
    outcome = SANDBOXES[0].run_program(*HONEST[name])
    assert outcome.passed, outcome
    program, tests = HONEST[name]
    assert not SANDBOXES[0].run_program(program, f"{tests}\nassert False").passed


@needs_sandbox
def test_time_limits_count_processor_time(sandbox: Sandbox) -> None:
    """A program that waits longer than its limit passes; one that computes longer does not."""
    waits = "import time\ndef f(): time.sleep(0.3)"
    assert sandbox.run_program(waits, "f()", timeout=0.15).passed
    computes = "import time\ndef f():\n while time.process_time() < 2: pass"
    assert sandbox.run_program(computes, "f()", timeout=0.15).status == "timed_out"
    assert sandbox.run_program("", "while True: pass", timeout=0.15).status == "timed_out"


# Attacks that pass only if the sandbox prevented them.
CONTAINED = {
    "network": """
import socket
for family, address in ((socket.AF_INET, ("1.1.1.1", 53)), (socket.AF_INET6, ("2606::1", 53))):
    try:
        socket.socket(family, socket.SOCK_DGRAM).connect(address)
    except OSError:
        continue
    raise AssertionError("there is a way out")
""",
    "files of the host": """
import os
for path in ("/etc/shadow", "/etc/passwd", "/root", "/home", "/var", "/work", "/sys", "/run"):
    assert not os.path.exists(path) or not os.listdir(path), path
""",
    "makes files, folders and links anywhere": """
import os
mounts = [line.split()[1] for line in open("/proc/self/mounts")]
assert "/tmp" in mounts and "/dev" in mounts and "/proc" in mounts
for folder in (*mounts, "/usr", "/usr/bin", "/bin", "/lib", "/dev/shm", "/dev/pts", os.getcwd()):
    path = f"{folder}/x"
    for make in (
        lambda: open(path, "w"),
        lambda: os.open(folder, os.O_TMPFILE | os.O_WRONLY),
        lambda: os.mkdir(path),
        lambda: os.symlink("/etc/shadow", path),
        lambda: os.mkfifo(path),
    ):
        try:
            make()
        except OSError:
            continue
        raise AssertionError(path)
""",
    "descriptors that were inherited": """
import glob, os
for name in glob.glob("/proc/self/fd/*") + glob.glob("/proc/1/fd/*"):
    try:
        target = os.readlink(name)
    except OSError:
        continue
    assert target.startswith(("pipe:", "anon_inode:")) or target == "/dev/null", (name, target)
""",
    "sockets of every family": """
import socket
for family in range(64):
    for make in (socket.socket, socket.socketpair):
        for kind in (1, 2, 3, 5):
            try:
                made = make(family, kind)
            except OSError as error:
                assert error.errno == 1, (family, error)
                continue
            assert make is socket.socketpair and family == socket.AF_UNIX, family
""",
    "buffers of sockets and pipes": """
import fcntl, os, socket
total, kept = 0, []
try:
    while True:
        pair = socket.socketpair()
        kept += pair
        for one in pair:
            one.setblocking(False)
            try:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**24)
            except OSError:
                pass
            try:
                while True:
                    total += one.send(bytes(2**16))
            except BlockingIOError:
                pass
except OSError:
    pass
assert total < 16 * 2**20, total
kept.clear()
reader, writer = os.pipe()
try:
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 2**20)
except OSError:
    pass
assert fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ) <= 2**16
""",
    "locks on files of the host": """
import fcntl, sys
for path in (sys.executable, "/usr/bin/python3", "/dev/null"):
    file = open(path)
    for lock in (
        lambda: fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB),
        lambda: fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB),
        lambda: fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK),
        lambda: fcntl.fcntl(file, 37, bytes(32)),
    ):
        try:
            lock()
        except OSError as error:
            assert error.errno == 1, error
            continue
        raise AssertionError(path)
""",
    "its place in the line of those to be killed": """
for name in ("oom_score_adj", "oom_adj", "comm", "coredump_filter", "timerslack_ns"):
    for process in ("self", "1"):
        try:
            open(f"/proc/{process}/{name}", "w").write("1")
        except OSError:
            continue
        raise AssertionError(name)
""",
    "second processes": """
import os, subprocess
spawn = lambda: os.posix_spawn("/bin/true", ["true"], {})
for start in (os.fork, spawn, lambda: subprocess.run(["true"])):
    try:
        child = start()
    except OSError as error:
        assert error.errno == 1, error
        continue
    raise AssertionError(start) if child else os._exit(0)
""",
    "kernel settings": """
for path in ("/proc/sys/kernel/hostname", "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger"):
    try:
        open(path, "w").write("x")
    except OSError:
        continue
    raise AssertionError(path)
""",
    "memory without a name": """
import os
fd = os.memfd_create("x")
try:
    os.ftruncate(fd, 64 * 2**20)
except OSError:
    pass
else:
    raise AssertionError
""",
    "limits raised again": """
import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE,
             resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE):
    try:
        resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):
        continue
    raise AssertionError(kind)
""",
    "becomes root": """
import os
for change in (os.setuid, os.setgid):
    try:
        change(0)
    except OSError:
        continue
    raise AssertionError
assert 0 not in os.getresuid() + os.getresgid()
""",
    "the parent's memory and environment": """
import os
for pid in (1, os.getppid()):
    for name in ("mem", "environ", "root/etc/shadow", "cwd/../etc/shadow"):
        try:
            found = open(f"/proc/{pid}/{name}", "rb").read(4096)
        except OSError:
            continue
        assert b"SECRET" not in found and b"root:" not in found, name
""",
    "devices of the host": """
import os
for name in ("mem", "kmem", "port", "kvm", "fuse", "kmsg", "sda", "vda", "nvidia0", "loop0"):
    assert not os.path.exists(f"/dev/{name}"), name
try:
    os.mknod("/tmp/device", 0o20600, os.makedev(1, 1))
except OSError:
    pass
else:
    raise AssertionError("made a device")
""",
    "types into a terminal": """
import fcntl, os, termios
for name in ("/dev/tty", "/dev/console", "/dev/pts/0"):
    try:
        fcntl.ioctl(os.open(name, os.O_RDWR), termios.TIOCSTI, b"x")
    except OSError:
        continue
    raise AssertionError(name)
""",
    "raw packets": """
import socket
for family, kind in ((socket.AF_INET, socket.SOCK_RAW), (socket.AF_PACKET, socket.SOCK_RAW)):
    try:
        socket.socket(family, kind, 1)
    except OSError:
        continue
    raise AssertionError(family)
""",
    "a user namespace by clone": """
import ctypes, os, platform
libc = ctypes.CDLL(None, use_errno=True)
number = {"x86_64": 56, "aarch64": 220}[platform.machine()]
found = libc.syscall(number, 0x10000000 | 17, None, None, None, None)
if found == 0:
    os._exit(0)
assert found == -1, "made a namespace"
""",
    "becomes root by a set-user-id program": """
import subprocess
for command in (["su", "-c", "id"], ["mount", "-t", "tmpfs", "x", "/tmp"], ["passwd", "-S"]):
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=3)
    except OSError:
        continue
    assert done.returncode != 0, command
""",
    "kills everything": "import os\ntry: os.kill(-1, 9)\nexcept OSError: pass",
    "kills the parent": "import os\ntry: os.kill(os.getppid(), 9)\nexcept OSError: pass",
    "large output is fine": "print('x' * 10**7)",
    "breaks the driver's tools": """
import atexit, os, sys, time
os._exit = time.monotonic = None
atexit.register(sys.exit, 1)
""",
}

SYSTEM_CALLS = {
    # name: arguments of libc's function; each must be refused
    "mount": '(b"none", b"/tmp", b"tmpfs", 0, None)',
    "umount2": '(b"/proc", 2)',
    "unshare": "(0x10000000,)",
    "setns": "(0, 0)",
    "chroot": '(b"/tmp",)',
    "ptrace": "(16, 1, 0, 0)",
    "personality": "(0x0040000,)",
    "shmget": "(0, 1 << 20, 0o1600)",
    "msgget": "(0, 0o1600)",
    "semget": "(0, 1, 0o1600)",
    "process_vm_readv": "(1, None, 0, None, 0, 0)",
}


@needs_sandbox
@pytest.mark.parametrize("name", list(CONTAINED))
def test_hostile_program_is_contained(
    sandbox: Sandbox, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attacks on the machine fail."""
    monkeypatch.setenv("TOKEN", "SECRET")
    outcome = sandbox.run_program(CONTAINED[name], timeout=5.0)
    assert outcome.passed, outcome


@needs_sandbox
@pytest.mark.parametrize("name", list(SYSTEM_CALLS))
def test_system_call_is_refused(sandbox: Sandbox, name: str) -> None:
    """Parts of the kernel that a small function does not need return an error."""
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"assert libc.{name}{SYSTEM_CALLS[name]} == -1, 'not refused'\n"
        "assert ctypes.get_errno() == 1, ctypes.get_errno()"
    )
    outcome = sandbox.run_program(program, timeout=5.0)
    assert outcome.passed, outcome


@needs_sandbox
def test_every_refused_system_call_is_refused_by_number(sandbox: Sandbox) -> None:
    """Every number of the filter is called directly."""
    column = {"x86_64": 0, "aarch64": 1}[os.uname().machine]
    numbers = {name: both[column] for name, both in REFUSED.items()}
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"for name, number in {numbers!r}.items():\n"
        "    ctypes.set_errno(0)\n"
        "    assert libc.syscall(number, 0, 0, 0, 0, 0, 0) == -1, name\n"
        "    assert ctypes.get_errno() == 1, (name, ctypes.get_errno())\n"
    )
    outcome = sandbox.run_program(program, timeout=5.0)
    assert outcome.passed, outcome


@needs_sandbox
def test_environment_is_not_visible(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the caller reaches a program."""
    monkeypatch.setenv("HF_TOKEN", "SECRET")
    program = "import os; assert set(os.environ) <= {'PATH', 'PWD', 'LC_CTYPE'}, dict(os.environ)"
    outcome = sandbox.run_program(program)
    assert outcome.passed, outcome


@needs_sandbox
def test_canary_file_is_not_visible(sandbox: Sandbox, tmp_path: Path) -> None:
    """A world-readable file and the working folder do not exist in the sandbox."""
    canary = tmp_path / "canary"
    canary.write_text("visible")
    canary.chmod(0o644)
    for path in (str(canary), str(Path.cwd()), __file__):
        outcome = sandbox.run_program(f"import os; assert not os.path.exists({path!r})")
        assert outcome.passed, outcome


@needs_sandbox
def test_services_of_the_host_are_unreachable(sandbox: Sandbox) -> None:
    """Ports of the loopback device and abstract sockets of the host are not visible."""
    name = f"\0forgetting-{secrets.token_hex(4)}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as hidden:
        hidden.bind(name)
        hidden.listen()
        program = f"""
import socket
for family, address in ((socket.AF_INET, {server.getsockname()!r}), (socket.AF_UNIX, {name!r})):
    try:
        socket.socket(family).connect(address)
    except OSError:
        continue
    raise AssertionError(address)
"""
        outcome = sandbox.run_program(program)
    assert outcome.passed, outcome


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """Start a process of the host as the user of sandboxed programs."""
    nobody = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    process = subprocess.Popen(["sleep", "60"], **nobody)  # type: ignore[call-overload]
    yield process
    process.kill()
    process.wait()


@needs_sandbox
def test_processes_of_the_host_survive(
    sandbox: Sandbox, bystander: subprocess.Popen[bytes]
) -> None:
    """Programs can neither see nor signal processes outside, even of their own user."""
    program = f"""
import os
os.kill(-1, 9) if len([n for n in os.listdir('/proc') if n.isdigit()]) > 2 else None
try:
    os.kill({bystander.pid}, 9)
except OSError:
    pass
"""
    sandbox.run_program(program)
    assert bystander.poll() is None


@needs_sandbox
@pytest.mark.parametrize("ending", ["pass", "time.sleep(100)"])
def test_processes_do_not_outlive_a_program(sandbox: Sandbox, ending: str) -> None:
    """Threads and the process die with the sandbox, after a pass and after a timeout."""
    mark = secrets.token_hex(5)
    program = f"""
import ctypes, threading, time
ctypes.CDLL(None).prctl(15, b"{mark}", 0, 0, 0)
threading.Thread(target=time.sleep, args=(100,)).start()
{ending}
"""
    sandbox.run_program(program, "import time; time.sleep(0.2)", timeout=0.1)
    deadline = time.monotonic() + 5
    while (left := _named(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def _named(name: str) -> list[str]:
    found = []
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text().strip() == name:
                found.append(comm.parent.name)
        except OSError:
            continue
    return found


@needs_sandbox
def test_detail_names_the_reason(sandbox: Sandbox) -> None:
    """The detail is a short excerpt of the error."""
    assert sandbox.run_program("assert 0, 'seven'").detail == "AssertionError: seven"
    assert len(sandbox.run_program("raise ValueError('x' * 10**6)").detail) <= 300
    slow = sandbox.run_program("while True: pass", timeout=0.2)
    assert slow.status == "timed_out" and "0.2 s of processor time" in slow.detail
    assert sandbox.run_program("f = 1", "assert f == 2, 'not two'").detail.endswith("not two")


@needs_sandbox
def test_outcomes_keep_the_order_of_programs(sandbox: Sandbox) -> None:
    """Outcomes have the order of the programs, whichever finishes first."""
    programs = [(f"import time; time.sleep({0.2 - n / 50}); n = {n}", "n % 3") for n in range(9)]
    programs = [(program, f"assert {tests}") for program, tests in programs]
    outcomes = sandbox.run_programs(programs, workers=3)
    assert [outcome.passed for outcome in outcomes] == [bool(n % 3) for n in range(9)]


def test_equal_programs_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal answers of a model share one run."""
    run: list[str] = []

    def run_program(_: Sandbox, program: str, tests: str, timeout: float) -> Outcome:
        run.append(program)
        return Outcome("passed" if program == "a" else "failed")

    monkeypatch.setattr(Sandbox, "run_program", run_program)
    outcomes = Sandbox("trial", "python").run_programs([(x, "") for x in "abaab"], workers=1)
    assert run == ["a", "b"]
    assert [outcome.passed for outcome in outcomes] == [True, False, True, True, False]


def test_running_programs_imports_no_model_library() -> None:
    """The program imports no large package, so a job starts fast."""
    script = LIBRARY / "scripts" / "run_programs.py"
    program = (
        f"import runpy, sys; runpy.run_path({str(script)!r})\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    environment = {"PYTHONPATH": str(LIBRARY), "PATH": os.environ["PATH"]}
    output = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert "forgetting" in output.split()
    assert not {"torch", "transformers", "lm_eval", "pandas", "numpy"} & set(output.split())


def _without(prefix: list[str], *words: str) -> list[str]:
    for start in range(len(prefix)):
        if prefix[start : start + len(words)] == list(words):
            return prefix[:start] + prefix[start + len(words) :]
    raise AssertionError(f"{words} is not among the arguments")


@needs_sandbox
def test_find_weakness_rejects_missing_isolation() -> None:
    """It finds a network, visible files, writable folders and environment variables."""
    whole = SANDBOXES[0]
    prefix = list(whole.prefix)

    def reason(changed: list[str]) -> str:
        return discovery.find_weakness(replace(whole, prefix=tuple(changed))) or "accepted"

    assert "network" in reason([prefix[0], *prefix[1:], "--share-net"])
    for folder in ("/dev", "/tmp", "/proc"):
        assert f"{folder}/" in reason(_without(prefix, "--remount-ro", folder))
    assert "/etc of the host" in reason([prefix[0], "--ro-bind", "/etc", "/etc", *prefix[1:]])
    assert "environment" in reason([*prefix, "--setenv", "TOKEN", "x"])
    assert "files of the host" in reason([*prefix, "--ro-bind", "/tmp", "/tmp"])


@needs_sandbox
def test_find_weakness_rejects_missing_limits() -> None:
    """It finds missing limits and a missing interpreter."""
    whole = SANDBOXES[0]
    no_processes = replace(whole, limits=replace(Limits(), processes=None))
    assert "limited" in (discovery.find_weakness(no_processes) or "accepted")
    assert discovery.find_weakness(replace(whole, python="/usr/bin/no-python")) is not None
    assert "files of the host" in (discovery.find_weakness(unsafe_runner()) or "accepted")


def test_search_sandbox_needs_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason names the missing program."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    search_sandbox.cache_clear()
    try:
        assert search_sandbox() == (None, "bubblewrap (the program `bwrap`) is not installed")
    finally:
        search_sandbox.cache_clear()


def test_search_sandbox_reports_a_failing_bubblewrap(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The reason is bubblewrap's message, for example that user namespaces are forbidden."""
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1")
    broken.chmod(0o755)
    tmp_path.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(broken))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    search_sandbox.cache_clear()
    try:
        found, why = search_sandbox()
        assert found is None and "No permissions to create new namespace" in why
    finally:
        search_sandbox.cache_clear()


@needs_sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can try how it is for another user")
def test_ordinary_user_has_a_sandbox(tmp_path: Path) -> None:
    """A user without rights has a sandbox that prevents the same attacks."""
    if not os.access("/usr/bin/python3", os.X_OK):
        pytest.skip("there is no interpreter that every user can read")
    folder = Path("/tmp", f"sandbox-{secrets.token_hex(4)}", "forgetting")
    shutil.copytree(LIBRARY / "forgetting", folder, ignore=shutil.ignore_patterns("__pycache__"))
    program = """
import json, sys
from forgetting.benchmarks.sandbox import search_sandbox
found, why = search_sandbox()
assert found is not None and found.privilege == 'user', why
pairs = json.load(sys.stdin)
outcomes = found.run_programs([tuple(pair) for pair in pairs], workers=2, timeout=5)
print(json.dumps([outcome.status for outcome in outcomes]))
"""
    pairs = [(spoof, SQUARES) for spoof in SPOOFS.values()]
    pairs += [(attack, "") for attack in CONTAINED.values()]
    try:
        done = subprocess.run(
            ["/usr/bin/python3", "-c", program],
            env={"PYTHONPATH": str(folder.parent), "PATH": os.environ["PATH"]},
            input=json.dumps(pairs),
            cwd="/",
            user=12345,
            group=12345,
            extra_groups=[],
            capture_output=True,
            text=True,
        )
    finally:
        shutil.rmtree(folder.parent)
    if done.returncode and "permission" in done.stderr.lower():
        pytest.skip(f"users may not create namespaces here: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    ended = dict(zip([*SPOOFS, *CONTAINED], json.loads(done.stdout), strict=True))
    assert [name for name in SPOOFS if ended[name] == "passed"] == []
    assert [name for name in CONTAINED if ended[name] != "passed"] == []


def test_unsafe_runner_has_limits() -> None:
    """It limits time and memory, gives correct verdicts, and claims no isolation."""
    runner = unsafe_runner()
    assert not runner.isolated and "unprotected" in runner.name
    assert runner.run_program("import os\nassert os.path.exists('/')").passed
    assert runner.run_program("assert False").status == "failed"
    assert runner.run_program("import os; os._exit(0)").status == "failed"
    assert runner.run_program("while True: pass", timeout=0.3).status == "timed_out"
    if sys.platform == "linux":
        assert runner.run_program("x = bytearray(3 * 2**30)").status == "out_of_memory"
    outcome = runner.run_program("import os; assert 'HOME' not in os.environ")
    assert outcome.passed, outcome


@pytest.mark.real_data
@needs_sandbox
@pytest.mark.skipif(
    not (REAL_DATA / "humaneval").is_dir(), reason=f"there is no real data in {REAL_DATA}"
)
def test_humaneval_solutions_pass_and_nonsense_fails() -> None:
    """All 164 published solutions pass, and none of 164 bodies `return 1` does."""
    lines = (REAL_DATA / "humaneval" / "test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]

    def pairs(body: str | None) -> list[tuple[str, str]]:
        return [
            (
                f"{row['prompt']}{body or row['canonical_solution']}",
                f"{row['test']}\ncheck({row['entry_point']})",
            )
            for row in rows
        ]

    right = SANDBOXES[0].run_programs(pairs(None), workers=2, timeout=10)
    wrong = SANDBOXES[0].run_programs(pairs("    return 1\n"), workers=2, timeout=10)
    assert [row["task_id"] for row, o in zip(rows, right, strict=True) if not o.passed] == []
    assert [row["task_id"] for row, o in zip(rows, wrong, strict=True) if o.passed] == []
