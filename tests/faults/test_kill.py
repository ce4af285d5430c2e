"""The fine-tuning program, killed by the kernel and on a disk that is really full.

test_train.py ends runs at chosen lines of code; here processes get SIGKILL at moments that nobody
chose, also in the middle of writing a checkpoint, and are started again until they end.
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
from forgetting.config.evaluation import EvaluationConfig, TaskConfig, TrainingBenchmarksConfig
from forgetting.config.expand import Method, RunGroupConfig
from forgetting.config.methods import Hyperparameters
from forgetting.config.mitigations import MitigationConfig
from forgetting.config.selection import SelectionConfig
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


class Nursery:
    """Starts the program; see nursery.py."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT / "workflow"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "nursery.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer()  # It has imported what it needs.

    def start(self, arguments: list[str], log: Path) -> int:
        """The process id of a new start."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"arguments": arguments, "log": str(log)}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def wait(self) -> int:
        """The exit status, or minus the signal that ended it."""
        return self._answer()

    def _answer(self) -> int:
        assert self.process.stdout
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """One for all tests, closed at the end."""
    nursery = Nursery()
    yield nursery
    nursery.process.communicate(timeout=60)


@dataclass
class Program:
    """The program with all that it reads, and a folder for what it writes."""

    nursery: Nursery
    inputs: Path
    spec: RunGroupConfig
    folder: Path
    asked: dict[str, Path] = field(default_factory=dict)
    """Benchmarks of every evaluation, with their rows."""

    @property
    def state(self) -> Path:
        """Where runs and checkpoints lie."""
        return self.folder / "state"

    @property
    def log(self) -> Path:
        """What the last start printed."""
        return self.folder.with_suffix(".log")

    def params(self) -> Path:
        """Write the file of the program's parameters."""
        tasks = {name: TaskConfig(num_fewshot=0, limit=6) for name in self.asked}
        benchmarks = TrainingBenchmarksConfig(tasks=tasks, batch_size=2) if tasks else None
        folder = self.folder.with_suffix(".params")
        return finetune_params(folder, self.spec, "c", benchmarks, self.asked)

    def start(self) -> int:
        """The process id of a new start."""
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
        if not self.spec.method.mitigation:
            del options["general"]
        if self.asked:
            options["benchmarks"] = self.folder / "benchmarks.parquet"
        arguments = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
        return self.nursery.start(arguments, self.log)

    def run(self) -> int:
        """Start it and wait for the end; the exit status."""
        self.start()
        return self.nursery.wait()


@pytest.fixture
def program(
    nursery: Nursery, base_folder: Path, rows: Rows, tuning: Method, tmp_path: Path
) -> Program:
    """Two learning rates with dropout and replay for four epochs, and an evaluation in each."""
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
    spec = RunGroupConfig(
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
    return Program(nursery, inputs, spec, tmp_path / "run")


def _elsewhere(program: Program, name: str) -> Program:
    return replace(program, folder=program.folder.with_name(name))


def _uninterrupted(program: Program) -> Program:
    reference = _elsewhere(program, "reference")
    assert reference.run() == 0, reference.log.read_text()
    return reference


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _records(program: Program) -> list[dict[str, Any]]:
    records = json.loads((program.folder / "runs.json").read_text())
    return [{key: value for key, value in r.items() if key not in MEASURED} for r in records]


def _same_end(program: Program, reference: Program) -> None:
    """Losses, items and weights are equal bit for bit, and nothing else is left on the disk."""
    assert _records(program) == _records(reference)
    assert {record["status"] for record in _records(program)} == {"ok"}
    for name in ("items", *(["benchmarks"] if reference.asked else [])):
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
    """SIGKILL some time after something appears and before it goes, if the process lives to see it.

    The process is stopped before it is looked at again, so that it is killed there and not later.
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


def _moment(state: Path, kind: str, draw: random.Random, seconds: float) -> Callable[[], bool]:
    """Tells when to kill: some time after the start, or when a file of a kind is being written.

    With some luck not the first such file, so that a run gets on between two kills.
    """
    at = time.monotonic() + draw.uniform(0.0, seconds)
    if kind == "any time":
        return lambda: time.monotonic() > at
    left, seen = draw.randrange(2), set[str]()

    def there() -> bool:
        found = {path.name for path in state.glob(f"*/*/*/*/{kind}")}
        seen.update(found)
        return bool(found) and len(seen) > left

    return there


def _kill_again_and_again(
    program: Program, kinds: list[str], reference: Program, seconds: float
) -> None:
    """One kill of each kind, in this order; a program that ends before it is started from nothing.

    Whenever it ends, it must have ended like the one that was not killed.
    """
    draw, left = random.Random(0), list(kinds)
    for _ in range(3 * len(kinds)):
        pid = program.start()
        if left:
            _kill_when(pid, _moment(program.state, left[0], draw, seconds), draw.uniform(0, 0.02))
        status = program.nursery.wait()
        if status == 0:
            _same_end(program, reference)
            if not left:
                return
            shutil.rmtree(program.folder)
        else:
            assert status == -signal.SIGKILL, program.log.read_text()
            left.pop(0)
    pytest.fail(f"the program was never killed in the middle of {left[0]}")


def test_a_killed_program_ends_like_one_that_was_not(program: Program) -> None:
    """Two kills in the middle of a checkpoint, one while a table is written, one at any time."""
    started = time.monotonic()
    reference = _uninterrupted(program)
    kinds = [".step-*", ".items-*.partial", "any time", ".step-*"]
    _kill_again_and_again(program, kinds, reference, time.monotonic() - started)


def test_what_is_asked_along_is_the_same_after_kills(program: Program) -> None:
    """Items of benchmarks at every evaluation, as they lie beside those of the probes."""
    rows = program.inputs / "rows" / "sciq"
    for split in ("validation", "test"):
        write_jsonl(rows / f"{split}.jsonl", sciq(6))
    program.asked = {"sciq": rows}
    started = time.monotonic()
    reference = _uninterrupted(program)
    table = pd.read_parquet(reference.folder / "benchmarks.parquet")
    assert len(table) == 2 * 4 * 6  # runs, evaluations, items
    kinds = [".items-*.partial", ".step-*", "any time"]
    _kill_again_and_again(program, kinds, reference, time.monotonic() - started)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_twenty_kills_change_no_bit(program: Program, kind: str) -> None:
    """At any time, and within the writing of whatever is written."""
    if kind == "full":
        program.spec = program.spec.model_copy(update={"method": FULL})
    started = time.monotonic()
    reference = _uninterrupted(program)
    kinds = [".step-*", "any time", ".items-*.partial", "any time", ".run.json.*.partial"] * 4
    _kill_again_and_again(program, kinds, reference, time.monotonic() - started)


# --- a full disk --------------------------------------------------------------------------------


@pytest.fixture
def resize(program: Program) -> Iterator[Callable[[int], None]]:
    """Mounts a file system of so many KiB where the program writes, or changes its size."""
    program.folder.mkdir()
    with small_disk(program.folder) as resize:
        yield resize


@pytest.mark.parametrize(
    ("kind", "shares"),
    [("lora", [1, 3, 6, 8]), pytest.param("full", [1, 3], marks=pytest.mark.slow)],
)
def test_a_full_disk_is_told_and_once_there_is_room_the_run_goes_on(
    program: Program, resize: Callable[[int], None], kind: str, shares: list[int]
) -> None:
    """Room is made bit by bit: the disk is full at weights, at tables, at the optimizer's state."""
    if kind == "full":
        program.spec = program.spec.model_copy(update={"method": FULL})
    reference = _uninterrupted(program)
    needed = sum(path.stat().st_size for path in reference.folder.rglob("*")) // 1024
    for share in shares:
        resize(share * needed // 8)
        assert program.run() == 1
        told = program.log.read_text().splitlines()
        (error,) = [line for line in told if not line.startswith(f"{program.spec.method.name}/")]
        assert error.startswith(f"error: {program.folder}")
        assert "No space left on device" in error
        hidden = [path for path in program.folder.rglob(".*") if not is_record(path)]
        assert not hidden, "something half written was left"
    resize(8 * needed)
    assert program.run() == 0
    _same_end(program, reference)
