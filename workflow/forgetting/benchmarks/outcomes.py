"""Were the programs of a model run, and might they be now? What a plan tells before any job."""

from __future__ import annotations

import json
import shutil
from itertools import takewhile
from pathlib import Path


def has_bubblewrap() -> bool:
    """Is bubblewrap in the path? Whether it works, `search_sandbox` finds out in a second."""
    return shutil.which("bwrap") is not None


def was_run(outcomes: Path) -> bool:
    """Do the outcomes that `execute_programs` wrote, if it did, come from programs that were run?

    Only the lines before the list are read, since of many samples it is long.
    """
    if not outcomes.is_file():
        return False
    with outcomes.open(encoding="utf-8") as file:
        head = "".join(takewhile(lambda line: '"outcomes": [' not in line, file))
    try:
        return json.loads(head.rstrip().rstrip(",") + "}")["sandbox"] is not None
    except (ValueError, KeyError, TypeError):
        return False  # damaged: whoever reads the outcomes tells of it
