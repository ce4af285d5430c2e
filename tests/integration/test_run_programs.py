"""Test that the program which runs generated programs writes whole outcomes or none."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forgetting.benchmarks.programs import Program, describe, read_outcomes
from forgetting.benchmarks.sandbox import search_sandbox
from forgetting.io import read_json, write_json

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow" / "scripts"
needs_sandbox = pytest.mark.skipif(
    search_sandbox()[0] is None, reason=f"no sandbox: {search_sandbox()[1]}"
)
PROGRAMS = [
    Program(
        "made", f"made/{item}", item, sample, f"def f(x): return {text}", f"assert f(2) == {item}"
    )
    for item in range(4)
    for sample, text in enumerate(["x", "x + 1", "1 / 0"])
]


def _command(folder: Path) -> list[str]:
    write_json(folder / "programs.json", describe(PROGRAMS))
    return [
        sys.executable,
        str(SCRIPTS / "run_programs.py"),
        f"--programs={folder / 'programs.json'}",
        "--sandbox=bubblewrap",
        f"--output={folder / 'outcomes.json'}",
    ]


@needs_sandbox
def test_killed_job_gives_the_same_outcomes_again(tmp_path: Path) -> None:
    """After SIGKILL at a random moment, outcomes are whole or absent, and a rerun gives them."""
    outcomes = tmp_path / "outcomes.json"
    command = _command(tmp_path)
    begin = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.monotonic() - begin
    whole = outcomes.read_bytes()
    executed = read_outcomes(outcomes, PROGRAMS)
    passed = [
        (p.item, p.sample) for p, o in zip(PROGRAMS, executed.outcomes, strict=True) if o.passed
    ]
    assert passed == [(2, 0), (3, 1)]
    outcomes.unlink()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(random.uniform(0.3, 0.95) * seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not outcomes.exists() or outcomes.read_bytes() == whole
    subprocess.run(command, check=True, capture_output=True)
    assert outcomes.read_bytes() == whole
    left = {path.name for path in tmp_path.iterdir()}
    files = {"outcomes.json", "programs.json"}
    assert left == files | {f".{name}.sha256" for name in files}


def test_item_without_tests_is_refused(tmp_path: Path) -> None:
    """Any program would pass an item without tests."""
    command = _command(tmp_path)
    described = read_json(tmp_path / "programs.json")
    described["items"][1]["tests"] = " \n"
    write_json(tmp_path / "programs.json", described)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "item 1 of made has no tests" in done.stderr
    assert not (tmp_path / "outcomes.json").exists()
