"""The fine-tuning program, killed by the kernel and on a disk that is really full.

test_trainer.py ends runs at chosen lines of code. Here processes get SIGKILL at random moments,
also in the middle of writing a checkpoint, and are restarted until they end.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from forgetting.config.data import ColumnsConfig, PromptConfig
from forgetting.config.evaluation import (
    EvaluationConfig,
    SelectionConfig,
    TaskConfig,
    TrainingBenchmarksConfig,
)
from forgetting.config.expand import Method, RunGroupConfig
from forgetting.config.methods import Hyperparameters
from forgetting.config.mitigations import MitigationConfig
from forgetting.config.training import TrainingConfig
from forgetting.digests import is_record
from forgetting.io import write_jsonl, write_table
from support.benchmark_rows import sciq
from support.params import finetune_params
from support.run_groups import record_base
from support.small_disk import small_disk

Rows = list[dict[str, Any]]
ROOT = Path(__file__).resolve().parents[2]
MEASURED = {"training_seconds", "wall_seconds", "tokens_per_second", "peak_memory_gib", "folder"}
FULL = Method(
    name="full",
    kind="full",
    label="full",
    hyperparameters=[Hyperparameters(learning_rate=1e-3), Hyperparameters(learning_rate=3e-3)],
)


class ForkServer:
    """Start the program in forks of one process; see support/fork_server.py."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT / "workflow"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / "fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer()  # the server has imported the program

    def start(self, arguments: list[str], log: Path) -> int:
        """Start the program and return its process id."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"arguments": arguments, "log": str(log)}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def wait(self) -> int:
        """Return the exit status, or minus the signal that ended the program."""
        return self._answer()

    def _answer(self) -> int:
        assert self.process.stdout
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    """Start one server for all tests."""
    fork_server = ForkServer()
    yield fork_server
    fork_server.process.communicate(timeout=60)


@dataclass
class Program:
    """The program with its inputs, and a folder for its outputs."""

    fork_server: ForkServer
    inputs: Path
    config: RunGroupConfig
    folder: Path
    benchmarks: dict[str, Path] = field(default_factory=dict)
    """In-training benchmarks, with their rows."""

    @property
    def state(self) -> Path:
        """Return the folder of runs and checkpoints."""
        return self.folder / "state"

    @property
    def log(self) -> Path:
        """Return the file with the output of the last start."""
        return self.folder.with_suffix(".log")

    def params(self) -> Path:
        """Write the file of the program's parameters."""
        tasks = {name: TaskConfig(num_fewshot=0, limit=6) for name in self.benchmarks}
        benchmarks = TrainingBenchmarksConfig(tasks=tasks, batch_size=2) if tasks else None
        folder = self.folder.with_suffix(".params")
        return finetune_params(folder, self.config, "c", benchmarks, self.benchmarks)

    def start(self) -> int:
        """Start the program and return its process id."""
        options = {
            "params": self.params(),
            "base": self.inputs / "base.json",
            "base-items": self.inputs / "base_items.parquet",
            "data": self.inputs,
            "general": self.inputs / "general.jsonl",
            "state": self.state,
            "items": self.folder / "items.parquet",
            "runs": self.folder / "runs.json",
            "checkpoints": self.folder / "checkpoints.json",
        }
        if not self.config.method.mitigation:
            del options["general"]
        if self.benchmarks:
            options["benchmarks"] = self.folder / "benchmarks.parquet"
        arguments = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
        return self.fork_server.start(arguments, self.log)

    def run(self) -> int:
        """Start the program, wait for its end and return the exit status."""
        self.start()
        return self.fork_server.wait()


@pytest.fixture
def program(
    fork_server: ForkServer, base_folder: Path, rows: Rows, tuning: Method, tmp_path: Path
) -> Program:
    """Return a program with two learning rates, dropout, replay, and four evaluations."""
    inputs = tmp_path / "inputs"
    record_base(inputs / "base.json", base_folder)
    write_table(
        inputs / "base_items.parquet", pd.DataFrame({"probe": ["new"], "probability": [0.0]})
    )
    write_jsonl(inputs / "train.jsonl", rows[:8])
    write_jsonl(inputs / "probes" / "new.jsonl", rows[:2])
    write_jsonl(inputs / "probes" / "old.jsonl", rows[8:])
    write_jsonl(inputs / "general.jsonl", [{"text": f"The harbour of {n}."} for n in range(7)])
    settings = [Hyperparameters(learning_rate=rate, weight_decay=0.1) for rate in (0.01, 0.03)]
    mitigation = MitigationConfig.model_validate(
        {"replay": {"table": "world/general", "ratio": 0.3}}
    )
    config = RunGroupConfig(
        method=tuning.model_copy(update={"hyperparameters": settings, "mitigation": mitigation}),
        seed=3,
        prompt=PromptConfig(),
        training=TrainingConfig(epochs=4.0, batch_size=3, warmup_epochs=0.5),
        evaluation=EvaluationConfig(max_new_tokens=3),
        selection=SelectionConfig(probe="new", metric="probability", threshold=0.02),
        precision="float32",
        knowledge={"new": "new", "old": "old"},
        columns={"world/general": ColumnsConfig()},
    )
    return Program(fork_server, inputs, config, tmp_path / "run")


def _in_folder(program: Program, name: str) -> Program:
    return replace(program, folder=program.folder.with_name(name))


def _run_without_kills(program: Program) -> Program:
    reference = _in_folder(program, "reference")
    assert reference.run() == 0, reference.log.read_text()
    return reference


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _records(program: Program) -> list[dict[str, Any]]:
    """Return the records of the runs without what is measured, and without the commit.

    The commit may change while the test runs, since a developer may edit a tracked file.
    """
    records = json.loads((program.folder / "runs.json").read_text())
    for record in records:
        assert record["machine"].pop("code_revision")
    return [{key: value for key, value in r.items() if key not in MEASURED} for r in records]


def _differences(found: Any, expected: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the values that differ, by their path in nested dictionaries and lists."""
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        found, expected = dict(enumerate(found)), dict(enumerate(expected))
    if not isinstance(found, dict) or not isinstance(expected, dict):
        return {} if found == expected else {path: (found, expected)}
    return {
        name: values
        for key in found.keys() | expected.keys()
        for name, values in _differences(found.get(key), expected.get(key), f"{path}/{key}").items()
    }


def _assert_same_end(program: Program, reference: Program) -> None:
    """Assert that losses, items and weights are bit-identical and no other file is left."""
    records = _records(program)
    differences = _differences(records, _records(reference))
    assert not differences, f"{differences}\n{program.log.read_text()}"
    assert {record["status"] for record in records} == {"ok"}
    for name in ("items", *(["benchmarks"] if reference.benchmarks else [])):
        tables = [pd.read_parquet(p.folder / f"{name}.parquet") for p in (program, reference)]
        assert len(tables[0])
        pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert _files(program.folder) == _files(reference.folder)
    weights = list(reference.state.rglob("*.safetensors"))
    assert len(weights) >= 2
    for file in weights:
        same = program.state / file.relative_to(reference.state)
        assert same.read_bytes() == file.read_bytes(), file


# --- killed -------------------------------------------------------------------------------------


def _kill_when(pid: int, there: Callable[[], bool], delay: float) -> None:
    """Send SIGKILL a delay after a condition becomes true, if it still holds then.

    The process is suspended before the condition is checked again, so that the kill is not late.
    """
    process = psutil.Process(pid)
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if not there():
            time.sleep(0.0005)
            continue
        time.sleep(delay)
        process.suspend()
        while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            time.sleep(0.0005)
        if there():
            process.kill()
            return
        process.resume()


def _kill_condition(
    state: Path, kind: str, draw: random.Random, seconds: float
) -> Callable[[], bool]:
    """Return a condition for a kill: some time after the start, or a file of a kind appears.

    The file is the first or the second of its kind, so that a run advances between kills.
    """
    at = time.monotonic() + draw.uniform(0.0, seconds)
    if kind == "any time":
        return lambda: time.monotonic() > at
    left, seen = draw.randrange(2), set[str]()

    def there() -> bool:
        present = {path.name for path in state.glob(f"*/*/*/*/{kind}")}
        seen.update(present)
        return bool(present) and len(seen) > left

    return there


def _assert_kills_change_nothing(
    program: Program, kinds: list[str], reference: Program, seconds: float
) -> None:
    """Kill the program once for each kind, in this order; whenever it ends, compare its results.

    A program that ends before its kill is started from nothing.
    """
    draw, left = random.Random(0), list(kinds)
    for _ in range(3 * len(kinds)):
        pid = program.start()
        if left:
            _kill_when(
                pid, _kill_condition(program.state, left[0], draw, seconds), draw.uniform(0, 0.02)
            )
        status = program.fork_server.wait()
        if status == 0:
            _assert_same_end(program, reference)
            if not left:
                return
            shutil.rmtree(program.folder)
        else:
            assert status == -signal.SIGKILL, program.log.read_text()
            left.pop(0)
    pytest.fail(f"the program was never killed in the middle of {left[0]}")


def test_a_killed_program_ends_with_the_same_bits(program: Program) -> None:
    """Two kills come within a checkpoint, one within a table, and one at any time."""
    started = time.monotonic()
    reference = _run_without_kills(program)
    kinds = [".step-*", ".items-*.partial", "any time", ".step-*"]
    _assert_kills_change_nothing(program, kinds, reference, time.monotonic() - started)


def test_in_training_benchmarks_are_equal_after_kills(program: Program) -> None:
    """The items of in-training benchmarks are in the tables of the probes."""
    rows = program.inputs / "rows" / "sciq"
    for split in ("validation", "test"):
        write_jsonl(rows / f"{split}.jsonl", sciq(6))
    program.benchmarks = {"sciq": rows}
    started = time.monotonic()
    reference = _run_without_kills(program)
    table = pd.read_parquet(reference.folder / "benchmarks.parquet")
    assert len(table) == 2 * 4 * 6  # runs, evaluations, items
    kinds = [".items-*.partial", ".step-*", "any time"]
    _assert_kills_change_nothing(program, kinds, reference, time.monotonic() - started)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_twenty_kills_change_no_bit(program: Program, kind: str) -> None:
    """Kills come at any time, and within the writing of every kind of file."""
    if kind == "full":
        program.config = program.config.model_copy(update={"method": FULL})
    started = time.monotonic()
    reference = _run_without_kills(program)
    kinds = [".step-*", "any time", ".items-*.partial", "any time", ".run.json.*.partial"] * 4
    _assert_kills_change_nothing(program, kinds, reference, time.monotonic() - started)


# --- a full disk --------------------------------------------------------------------------------


@pytest.fixture
def resize(program: Program) -> Iterator[Callable[[int], None]]:
    """Mount a file system of a size in KiB where the program writes, and resize it."""
    program.folder.mkdir()
    with small_disk(program.folder) as resize:
        yield resize


@pytest.mark.parametrize(
    ("kind", "shares"),
    [("lora", [1, 3, 6, 8]), pytest.param("full", [1, 3], marks=pytest.mark.slow)],
)
def test_a_run_resumes_once_a_full_disk_has_room(
    program: Program, resize: Callable[[int], None], kind: str, shares: list[int]
) -> None:
    """The disk grows step by step: it is full at weights, at tables, at the optimizer's state."""
    if kind == "full":
        program.config = program.config.model_copy(update={"method": FULL})
    reference = _run_without_kills(program)
    needed = sum(path.stat().st_size for path in reference.folder.rglob("*")) // 1024
    for share in shares:
        resize(share * needed // 8)
        assert program.run() == 1
        lines = program.log.read_text().splitlines()
        (error,) = [line for line in lines if not line.startswith(f"{program.config.method.name}/")]
        assert error.startswith(f"error: {program.folder}")
        assert "No space left on device" in error
        hidden = [path for path in program.folder.rglob(".*") if not is_record(path)]
        assert not hidden, "an incomplete file was left"
    resize(8 * needed)
    assert program.run() == 0
    _assert_same_end(program, reference)
