"""Messages of Snakemake about jobs."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

from snakemake_interface_logger_plugins.common import LogEvent

from forgetting.pipeline import JobMessages


def send(messages: JobMessages, event: LogEvent, **values: Any) -> Any:
    """Return the record of a message after the filter has changed it."""
    record = logging.makeLogRecord({"event": event, **values})
    assert messages.filter(record)
    return record


def test_reasons_name_few_files_in_order() -> None:
    reason = "Missing output files: d, c, b, a; Input files updated by another job: f, e"
    record = send(JobMessages(), LogEvent.JOB_INFO, reason=reason)
    expected = "Missing output files: a, b and 2 others; Input files updated by another job: e, f"
    assert record.reason == expected
    params = "Params have changed since last execution: before: 1, 2, 3, 4 now: 5"
    assert send(JobMessages(), LogEvent.JOB_INFO, reason=params).reason == params


PROGRAM = """
import logging
from forgetting.pipeline import JobMessages
from snakemake_interface_logger_plugins.common import LogEvent

messages = JobMessages()
for event, values in [
    (LogEvent.JOB_ERROR, {"jobid": 1, "log": ["failed.log"]}),
    (LogEvent.JOB_ERROR, {"jobid": 2, "log": ["retried.log"]}),
    (LogEvent.JOB_ERROR, {"jobid": 3, "log": ["missing.log"]}),
    (LogEvent.JOB_FINISHED, {"job_id": 2}),
]:
    messages.filter(logging.makeLogRecord({"event": event, **values}))
messages.print_errors_at_exit()
print("last message of Snakemake", flush=True)
"""


def test_error_of_a_failed_job_is_the_last_line(tmp_path: Path) -> None:
    (tmp_path / "failed.log").write_text("step 1\nerror: no rows\n\n")
    (tmp_path / "retried.log").write_text("error: killed\n")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    lines = done.stdout.splitlines()
    assert lines == ["last message of Snakemake", "failed.log: error: no rows"]
