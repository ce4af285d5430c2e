"""Run programs that a model wrote in a sandbox that has proved to work, or not at all.

Each program runs in a sandbox, and its tests run in a second one. Two pipes between them carry
calls and plain values (see `forgetting.benchmarks.sandbox.driver`). The tests' process gives the
verdict.

Covered:

- The verdict. No code of the program runs in the process that judges it. The program cannot see,
  trace, signal or replace that process. It holds no secret that would make it pass, and it does not
  see its tests. Objects that equal everything and replaced built-in functions or modules fail.
- The machine. The program sees no files of the host but a read-only interpreter, and can write
  nothing. It has no network, no sockets but pairs within the process, no second process and no
  locks on files.
- Resources of each side: processor time, waiting time, memory, threads, open files, buffers of
  pipes and sockets. No files can be made, so their number needs no limit.

Not covered:

- Holes in the kernel, in bubblewrap or in the Python interpreter, and timing side channels.
- Decisions that the tests leave to the program: a truth value (`assert f(x)`), a comparison of two
  objects of the program's own classes, answers that can be guessed from the arguments.
- Tests that need more than the program's names, calls, attributes and plain results, such as those
  that inherit from its classes, catch its exception classes or read its source. Correct programs
  fail such tests.
- Processors other than x86-64 and 64-bit ARM, which have no system-call filter.
- `sandbox: none`, where a program can do what the user can.
"""

from forgetting.benchmarks.sandbox.discovery import search_sandbox, unsafe_runner
from forgetting.benchmarks.sandbox.runner import Outcome

__all__ = ["Outcome", "search_sandbox", "unsafe_runner"]
