"""Start finetune.py many times at the price of one: import it once, fork for every start.

Reads requests from standard input, one JSON object a line with the program's arguments and the file
that takes its output; answers with the process id, and with the exit status once it has ended. A
child is a process like any other: it can be stopped and killed. Its disk is slow, so that there is
time to kill it while it writes.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback

from scripts import finetune

SYNC = os.fsync


def slow_sync(handle: int) -> None:
    """As on a disk that turns."""
    time.sleep(0.005)
    SYNC(handle)


def run(arguments: list[str], log: str) -> int:
    """The program's exit status, as the interpreter would give it."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.fsync = slow_sync
    try:
        finetune.main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    print(os.getpid(), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(run(request["arguments"], request["log"]))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
