"""Where programs that a model wrote are run: found, tried and then trusted, or not used at all.

Each program runs in a sandbox, and its tests run in a second one. Two pipes between them carry
calls and plain values (see `forgetting.benchmarks.sandbox.driver`); the verdict comes from the
tests' side.

Covered:

- The verdict. No code of the program runs in the process that judges it. The program cannot see,
  trace, signal or replace that process, holds no secret that would make it pass, and does not see
  its tests. Objects that equal everything and replaced built-in functions or modules do not pass.
- The machine. No files of the host but a read-only interpreter, nothing that can be written, no
  network, no sockets but pairs within the process, no second process, no locks on files.
- Resources, of each side: processor time, waiting time, memory, threads, open files, buffers of
  pipes and sockets. No files can be made, so that their number needs no limit.

Not covered:

- Holes in the kernel, in bubblewrap or in the Python interpreter, and what can be learned from
  the time that the processor takes.
- What the tests themselves leave to the program: a truth value (`assert f(x)`), a comparison of
  two objects of the program's own classes, the answers that can be guessed from the arguments.
- Tests that need more of a program than its names, calls, attributes and plain results, such as
  those that inherit from its classes, catch its exception classes, or read its source; a correct
  program fails them.
- Machines with processors other than x86-64 and 64-bit ARM: there is no system-call filter there.
- `sandbox: none`, where a program can do what the user can.
"""

from forgetting.benchmarks.sandbox.discovery import search_sandbox, unsafe_runner
from forgetting.benchmarks.sandbox.runner import Outcome

__all__ = ["Outcome", "search_sandbox", "unsafe_runner"]
