"""Driver of the two processes in the sandbox: one holds the program, the other its tests.

The sandbox cannot import this package. The interpreter gets the text of this file on its command
line (`python3 -I -S -c TEXT ROLE`). The file must therefore be self-contained and use the standard
library only.

ROLE `tests` reads a job from standard input, one JSON object: {"program", "tests", "seconds",
"limits", "user", "reads", "writes"}. `reads` and `writes` are the descriptors of two pipes to the
process with ROLE `program`, whose other ends are its standard input and output. The tests' process
writes two JSON lines to its standard output: {"stage": "started"} before the program runs, and
{"stage": "ended", "status", "detail"} afterwards.

The program's process runs the program and answers calls. The tests' process gets the names that the
tests use, as values or as `Remote` objects, calls them, and compares the results itself. So no code
of the program runs where the verdict is made.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import operator
import os
import resource
import signal
import symtable
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

MESSAGE_BYTES = 16 * 2**20

# Copied types: a function that splits a value into parts, and one that builds a value from them.
_Parts = tuple[Callable[[Any], Iterable[Any]], Callable[[Any, list[Any]], Any]]


def _pairs(value: Any) -> list[Any]:
    return [part for pair in value.items() for part in pair]


def _build(kind: Any, parts: list[Any]) -> Any:
    return kind(*parts)


_SEQUENCE: _Parts = (list, lambda kind, parts: kind(parts))
_MAPPING: _Parts = (_pairs, lambda kind, parts: kind(zip(parts[::2], parts[1::2], strict=True)))
_COPIED: dict[str, _Parts] = {
    **{f"builtins.{name}": _SEQUENCE for name in ("list", "tuple", "set", "frozenset")},
    "builtins.dict": _MAPPING,
    "builtins.bytes": (lambda v: [v.hex()], lambda kind, parts: kind.fromhex(*parts)),
    "builtins.bytearray": (lambda v: [v.hex()], lambda kind, parts: kind.fromhex(*parts)),
    "builtins.complex": (lambda v: [v.real, v.imag], _build),
    "builtins.range": (lambda v: [v.start, v.stop, v.step], _build),
    "builtins.slice": (lambda v: [v.start, v.stop, v.step], _build),
    "collections.deque": _SEQUENCE,
    "collections.OrderedDict": _MAPPING,
    "collections.Counter": (_pairs, lambda kind, parts: kind(_MAPPING[1](dict, parts))),
    "decimal.Decimal": (lambda v: [str(v)], _build),
    "fractions.Fraction": (lambda v: [v.numerator, v.denominator], _build),
    "datetime.date": (lambda v: [v.year, v.month, v.day], _build),
    "datetime.timedelta": (lambda v: [v.days, v.seconds, v.microseconds], _build),
}
_TYPES = {"builtins.int", "builtins.float", "builtins.str", "builtins.bool", "builtins.object"}
_TYPES |= {*_COPIED} | {
    f"builtins.{name}"
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, BaseException)
}
# If the program imported one of these modules and the tests use it, the tests' process imports it
# too. None of them runs text as code or reads files.
_MODULES = """bisect cmath collections copy datetime decimal fractions functools hashlib heapq
itertools json math operator random re statistics string typing"""

# What one process may call in the other, by name.
_COMPARISONS = "eq ne lt le gt ge"
_ARITHMETIC = "add and floordiv lshift matmul mod mul or pow rshift sub truediv xor"
_OPERATORS = f"{_COMPARISONS} {_ARITHMETIC} abs delitem getitem index invert neg pos setitem"
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, f"__{name}__") for name in _OPERATORS.split()},
    **{f.__name__: f for f in (bool, float, getattr, hash, int, isinstance, iter, len, next)},
    **{f.__name__: f for f in (repr, reversed, setattr, str)},
    "call": lambda function, /, *args, **keywords: function(*args, **keywords),
}
# What a program may call on an object of the tests.
_ALLOWED = {"call", "getattr", "iter", "len", "next", "setattr"}


class Broken(BaseException):
    """The other process is gone or sends nonsense. Tests must not catch it."""


class Remote:
    """An object of the other process, where all operations on it are executed.

    It equals no object of this process, because the other process must not decide whether a result
    is right. For the same reason an object that was computed from a value of this process, such as
    a difference, is not converted to a number.
    """

    __slots__ = ("_is_computed", "_number", "_peer")

    def __init__(self, peer: Peer, number: int, is_computed: bool = False) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_is_computed", is_computed)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Call the object with these arguments."""
        return self._peer.call("call", self, *args, **keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._peer.call("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.call("setattr", self, name, value)

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Remote) and self._peer.call("isinstance", value, self) is True


_COMPUTATIONS = {*_ARITHMETIC.split(), "abs", "invert", "neg", "pos"}
_CONVERSIONS = {"bool", "float", "getitem", "hash", "index", "int", "iter", "len", "reversed"}


def _computed(name: str, result: Any, operand: Remote, *others: Any) -> Any:
    """Return a result of arithmetic, or raise `TypeError` if the program could choose it.

    The program computes the result. A plain number for an object of its own could be 0 for every
    difference. Then `abs(f(x) - y) < 1e-6` would hold for any f.
    """
    foreign = any(not isinstance(other, Remote) or other._is_computed for other in others)
    is_computed = operand._is_computed or foreign
    if name in _COMPUTATIONS:
        if isinstance(result, Remote):
            return Remote(result._peer, result._number, is_computed)
        if is_computed or not others:
            raise TypeError(f"{name} of an object of the program gives a plain value")
    return result


def _relayed(name: str) -> Callable[..., Any]:
    def call(self: Remote, *args: Any) -> Any:
        if self._is_computed and name in _CONVERSIONS:
            # Otherwise math.fabs(f(x) - y) could be 0 for any f.
            raise TypeError(f"{name} of an object that the program computed from a value")
        return _computed(name, self._peer.call(name, self, *args), self, *args)

    return call


def _reflected(name: str) -> Callable[..., Any]:
    return lambda self, other: _computed(name, self._peer.call(name, other, self), self, other)


def _compared(name: str) -> Callable[..., Any]:
    return lambda self, other: (
        self._peer.call(name, self, other) if isinstance(other, Remote) else NotImplemented
    )


for _name in _FUNCTIONS.keys() - {"call", "getattr", "setattr", "isinstance"}:
    _method = _compared if _name in _COMPARISONS.split() else _relayed
    setattr(Remote, f"__{_name}__", _method(_name))
for _name in _ARITHMETIC.split():
    setattr(Remote, f"__r{_name}__", _reflected(_name))


class Peer:
    """The other process. Both may call each other; a caller serves calls while it waits."""

    def __init__(self, reads: int, writes: int, trusts: bool) -> None:
        self._reads, self._writes, self._trusts = os.fdopen(reads, "rb"), writes, trusts
        self._lent: list[Any] = []
        self._numbers: dict[int, int] = {}
        self.broken = False
        self.functions = dict(_FUNCTIONS)

    def call(self, name: str, /, *args: Any, **keywords: Any) -> Any:
        """Call a function of the other process and return its result or raise its error.

        Arguments that it changes in place are changed here as well.
        """
        packed = {key: self._pack(value) for key, value in keywords.items()}
        self.send("call", name, [self._pack(value) for value in args], packed)
        while True:
            kind, *content = self.receive()
            try:
                if kind == "call":
                    self.serve(*content)
                    continue
                if kind == "returned":
                    result, changed = content
                    for position, value in changed:
                        _overwrite(args[position], self._unpack(value))
                    return self._unpack(result)
                base, own, values = content
                raised = _error(base, own, [self._unpack(value) for value in values])
            except Exception as error:
                raise self._break(f"{type(error).__name__}: {error}") from None
            raise raised

    def serve(self, name: str, packed: list[Any], keywords: dict[str, Any]) -> None:
        """Execute a call of the other process and send the answer."""
        answer: list[Any]
        try:
            self._check(name, packed)
            args = [self._unpack(value) for value in packed]
            more = {key: self._unpack(value) for key, value in keywords.items()}
            result = self.functions[name](*args, **more)
            after = [
                (position, self._pack(value))
                for position, value in enumerate(args)
                if isinstance(value, (list, dict, set, bytearray))
            ]
            changed = [[position, new] for position, new in after if new != packed[position]]
            answer = ["returned", self._pack(result), changed]
        except Broken:
            raise
        except MemoryError:
            answer = ["raised", "MemoryError", "MemoryError", []]
        except BaseException as error:  # SystemExit and KeyboardInterrupt, too
            answer = ["raised", *self._describe(error)]
        self.send(*answer)

    def send(self, *message: Any) -> None:
        """Send one message, a line of JSON."""
        data = memoryview(json.dumps(message).encode() + b"\n")
        try:
            while data:
                data = data[os.write(self._writes, data) :]
        except OSError as error:
            raise self._break(str(error)) from None

    def receive(self) -> Any:
        """Return the next message."""
        if self.broken:
            raise Broken("gone")
        line = self._reads.readline(MESSAGE_BYTES)
        if not line.endswith(b"\n"):
            raise self._break("too long a message" if line else "gone")
        try:
            kind, *content = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            raise self._break("not a message") from None
        if kind not in ("call", "returned", "raised", "ready"):
            raise self._break("not a message")
        return [kind, *content]

    def _break(self, reason: str) -> Broken:
        self.broken = True
        return Broken(reason)

    def _check(self, name: str, packed: list[Any]) -> None:
        """Raise `TypeError` unless the other process may make this call."""
        if self._trusts:
            return
        if name not in _ALLOWED or not packed or packed[0][0] != "yours":
            raise TypeError(f"{name} is refused")
        lent = self._unpack(packed[0])
        if name in ("getattr", "setattr") and (
            str(packed[1]).startswith("_")
            or isinstance(lent, ModuleType)
            or not hasattr(lent, "__dict__")
        ):
            raise TypeError(f"{name} of {packed[1]} is refused")

    def _pack(self, value: Any) -> Any:
        """Return a value as JSON: a copy if it is plain, otherwise a number that refers to it."""
        kind = type(value)
        if value is None or kind in (bool, float, str):
            return value
        if kind is int:
            return value if abs(value) < 2**63 else ["int", hex(value)]
        if kind is Remote:
            return ["yours", value._number]
        if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
            return ["builtins.tuple", [self._pack(part) for part in value]]
        name = _name_of(kind)
        name = "builtins.dict" if name == "collections.defaultdict" else name
        if name in _COPIED:
            return [name, [self._pack(part) for part in _COPIED[name][0](value)]]
        if kind is ModuleType and value.__name__ in _MODULES.split():
            return ["module", value.__name__]
        if isinstance(value, type) and _name_of(value) in _TYPES:
            return ["type", _name_of(value)]
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._lent)
            self._lent.append(value)
        return ["mine", self._numbers[id(value)]]

    def _unpack(self, packed: Any) -> Any:
        """Return the value that the other process packed."""
        if not isinstance(packed, list):
            return packed
        kind, content = packed
        if kind == "int":
            return int(content, 16)
        if kind == "mine":
            return Remote(self, int(content))
        if kind == "yours":
            return self._lent[content]
        if kind == "module" and content in _MODULES.split():
            return importlib.import_module(content)
        if kind == "type" and content in _TYPES:
            return _find(content)
        return _COPIED[kind][1](_find(kind), [self._unpack(part) for part in content])

    def _describe(self, error: BaseException) -> list[Any]:
        """Return an exception as its nearest built-in class, its name and its arguments."""
        base = next(kind.__name__ for kind in type(error).__mro__ if _name_of(kind) in _TYPES)
        try:
            return [base, type(error).__name__, [self._pack(value) for value in error.args]]
        except Exception:
            return [base, type(error).__name__, []]


def _name_of(kind: type) -> str:
    """Return the dotted name of a class; Python calls the program's own classes built-in."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    own = kind.__module__ == "builtins" and getattr(builtins, kind.__name__, None) is not kind
    return f"program.{name}" if own else name


def _find(name: str) -> Any:
    module, _, attribute = name.partition(".")
    return getattr(importlib.import_module(module), attribute)


def _error(base: str, own: str, args: list[Any]) -> BaseException:
    kind = getattr(builtins, base)
    if not issubclass(kind, BaseException):
        raise TypeError(base)
    if own != base:
        kind = type(str(own), (kind,), {})
    try:
        return kind(*args)  # type: ignore[no-any-return]
    except TypeError:  # such as UnicodeDecodeError, which needs five arguments
        return Exception(own)


def _overwrite(old: Any, new: Any) -> None:
    if type(old) is not type(new):
        raise TypeError("an argument changed its type")
    if isinstance(old, (list, bytearray)):
        old[:] = new
    else:
        old.clear()
        old.update(new)


def _names_of_program(tests: str) -> list[str]:
    """Return the names that tests use and do not define.

    Built-in functions are the tests' own, so that a program cannot replace its checks. The
    exception is tests that use no other name of the program, such as of a function called `sum`.
    """
    used: set[str] = set()
    defined: set[str] = set()
    tables = [symtable.symtable(tests, "<tests>", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if table.get_type() == "module" or symbol.is_global():
                name = symbol.get_name()
                used |= {name} if symbol.is_referenced() else set()
                own = symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
                defined |= {name} if own else set()
    names = {name for name in used - defined if not name.startswith("__")}
    return sorted(names - vars(builtins).keys() or names)


def _modules_of_tests(tests: str) -> set[str]:
    """Return the modules that tests do not use in another way, such as a function called `copy`."""
    nodes = [*ast.walk(ast.parse(tests))]
    owners = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    other = {n.id for n in nodes if isinstance(n, ast.Name) and id(n) not in owners}
    return {*_MODULES.split()} - other


def _apply_limits(limits: dict[str, Any], user: int | None) -> None:
    """Give up root, if this process has it, and set the resource limits.

    The timer counts processor time, so a busy machine fails no program. A process can ignore its
    signal, but not the limit in whole seconds.
    """
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    for name, value in limits["resources"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    signal.setitimer(signal.ITIMER_PROF, limits["seconds"])


def _silence() -> tuple[int, int]:
    """Point the standard streams at /dev/null; return private copies of input and output.

    The output of a program is not scored and must not fill a pipe.
    """
    private = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)
    return private


def hold_program() -> None:
    """Run the program and answer calls until the other process ends."""
    peer = Peer(*_silence(), trusts=True)

    def define(program: str, names: list[str]) -> dict[str, Any]:
        namespace: dict[str, Any] = {}
        try:
            exec(compile(program, "<program>", "exec"), namespace)
        except BaseException:
            namespace.clear()  # frees memory for the answer after a MemoryError
            raise
        return {name: namespace[name] for name in names if name in namespace}

    peer.functions["define"] = define
    _, limits, user = peer.receive()
    _apply_limits(limits, user)
    peer.send("ready")
    while True:
        _, *content = peer.receive()
        peer.serve(*content)


def run_tests() -> None:
    """Run the tests on the program of the other process and report the outcome."""
    job = json.loads(sys.stdin.buffer.read())
    _, report = _silence()
    peer = Peer(job["reads"], job["writes"], trusts=False)

    def write_report(**message: Any) -> None:
        os.write(report, json.dumps(message).encode() + b"\n")

    peer.send("ready", job["limits"], job["user"] and job["user"][0])
    peer.receive()
    _apply_limits(job["limits"], job["user"] and job["user"][1])
    write_report(stage="started")
    status, detail = "passed", ""
    try:
        names = _names_of_program(job["tests"])
        defined = peer.call("define", job["program"], names)
        namespace = {name: defined[name] for name in names if name in defined}
        for name in namespace.keys() & _modules_of_tests(job["tests"]):
            namespace[name] = importlib.import_module(name)  # not an object of the program
        exec(compile(job["tests"], "<tests>", "exec"), namespace)
    except MemoryError:
        status, detail = "out_of_memory", "MemoryError"
    except Broken as error:
        detail = str(error)
    except BaseException as error:  # SystemExit and KeyboardInterrupt are failures, too
        try:
            text = str(error)[:200]
        except BaseException:
            text = ""
        status, detail = "failed", f"{type(error).__name__}: {text}".removesuffix(": ")
    write_report(stage="ended", status="broken" if peer.broken else status, detail=detail)
    os._exit(0)


if __name__ == "__main__":
    {"program": hold_program, "tests": run_tests}[sys.argv[1]]()
