"""Start finetune.py many times at the price of one import: fork for every start.

The server reads requests from standard input: one JSON object a line, with the arguments of the
program and the file for its output. It answers with the process id, and at the end with the exit
status. A child is an ordinary process, which can be stopped and killed. Its disk is slow, so that
there is time to kill it while it writes.
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
    """Sync as slowly as a hard disk."""
    time.sleep(0.005)
    SYNC(handle)


def run(arguments: list[str], log: str) -> int:
    """Run the program and return its exit status, as the interpreter would."""
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
