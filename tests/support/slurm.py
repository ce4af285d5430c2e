"""A SLURM to try things on, and a study that takes it half a minute.

Which SLURM: the one whose `sinfo` answers; else FORGETTING_SLURM names a folder of three programs
that make one on this machine: `start-cluster` (safe to repeat, also brings a dead node back),
`crash-node NODE` (kills all that runs on it) and `stop-cluster --wipe`. They keep what they write
in the folder that SLURM_LAB names. Partitions and machines of another site: in the file that
SNAKEMAKE_SLURM_PARTITIONS names.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[2]
NAME = "clustered"
RESULTS = Path("results") / NAME
STATE = RESULTS / "state"
FIRST = {"lora-r4": "lr0.001-wd0", "full": "lr0.0002-wd0"}
"""The first run of each method."""

PATIENCE = 420.0
STUDY: dict[str, Any] = {
    "title": "Two methods on a cluster",
    "datasets": {"world": {"generate": "micro-world", "seed": 0}},
    "base": {
        "pretrain": {
            "documents": ["world/documents"],
            "limit": 40,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_layers": 2,
            "num_heads": 2,
            "vocab_size": 512,
            "block_size": 320,
            "batch_tokens": 960,
            "epochs": 1,
        }
    },
    "train": "world/new_authors",
    "train_limit": 12,
    "probes": {
        "new": {"table": "world/new_authors", "knowledge": "new", "limit": 8},
        "old": {"table": "world/real_authors", "knowledge": "old", "limit": 8},
    },
    "evaluation": {"max_new_tokens": 8, "batch_size": 16},
    "training": {
        "epochs": 30,  # long enough to be met in the middle
        "batch_size": 4,
        "micro_batch_size": 4,
        "schedule": "constant",
        "warmup_epochs": 1,
    },
    "methods": [
        {"method": "lora", "rank": 4, "alpha": "2r", "learning_rate": [1e-3, 2e-3]},
        {"method": "full", "learning_rate": [2e-4]},
    ],
    "selection": {"probe": "new", "threshold": 0.9, "if_not_reached": "last"},
    "benchmarks": {"dataset": "world", "tasks": {"arc_challenge": {"limit": 8}}},
}


def write_study(path: Path, **full: int) -> Path:
    """The study's file; the method `full` may have several processes."""
    methods = [STUDY["methods"][0], STUDY["methods"][1] | full]
    return _written(path, STUDY | {"methods": methods})


def write_sweep(path: Path) -> Path:
    """A study of 34 run groups, each of one short run: more than the profile has in flight."""
    lora = {"method": "lora", "alpha": "2r", "learning_rate": [1e-3]}
    sweep = STUDY | {
        "title": "Seventeen ranks, two seeds",
        "seeds": [0, 1],
        "methods": [lora | {"rank": rank} for rank in range(1, 18)],
        "training": STUDY["training"] | {"epochs": 2},
    }
    return _written(path, {key: value for key, value in sweep.items() if key != "benchmarks"})


def _written(path: Path, study: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return path


def asked(*command: str) -> str:
    """What a program prints; it must end well."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def answers() -> bool:
    """Is there a SLURM?"""
    if shutil.which("sbatch") is None:
        return False
    try:
        return bool(subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=20).stdout)
    except subprocess.TimeoutExpired:  # SLURM_CONF names a file that is not there
        return False


def shut_down() -> None:
    """End the controller and the accounting; the nodes and what runs there stay."""
    asked("scontrol", "shutdown", "slurmctld")
    asked("sacctmgr", "--immediate", "shutdown")
    until(lambda: "DOWN" in _pinged())


def _pinged() -> str:
    """What the controller is said to be; the status is not 0 where it is down."""
    command = ["scontrol", "ping"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout


@dataclass(frozen=True)
class Job:
    """What SLURM's accounting knows of a job."""

    number: str
    state: str
    limit: str
    resources: str
    node: str

    @property
    def minutes(self) -> int:
        """The time that it might take."""
        hours, minutes, _ = self.limit.rsplit("-", 1)[-1].split(":")
        return 60 * int(hours) + int(minutes)


@dataclass(frozen=True)
class Folder:
    """A working folder in which a study is run."""

    at: Path
    study: Path

    def command(self, *options: str, profile: str | None = "slurm") -> list[str]:
        """What a user types, but that SLURM is asked sooner, as nothing takes long here."""
        chosen = ["--cores", "2"]
        if profile:
            chosen = ["--profile", profile, "--latency-wait", "5"]
            chosen += ["--slurm-init-seconds-before-status-checks", "2"]
        return [
            *(sys.executable, "-m", "snakemake", *chosen, *options),
            *("--snakefile", str(ROOT / "Snakefile")),
            *("--configfile", str(ROOT / "config" / "config.yaml")),
            *("--config", f"study={self.study}"),
        ]

    def environment(self) -> dict[str, str]:
        """This process's, one thread for each program, and nothing that snakemake reads."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SNAKEMAKE", "SLURM_J")) or key.endswith("SLURM_PARTITIONS")
        }
        kept.pop("PYTHONPATH", None)
        path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
        return kept | {"PATH": path, "OMP_NUM_THREADS": "1"}

    def run(self, *options: str, profile: str | None = "slurm") -> str:
        """Run snakemake to its end; what it printed, or a failure with it."""
        done = subprocess.run(
            self.command(*options, profile=profile),
            cwd=self.at,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=2 * PATIENCE,
        )
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout

    @contextmanager
    def running(self, *options: str) -> Iterator[subprocess.Popen[bytes]]:
        """Snakemake while it runs; its words are in the file `told`. Ended with the block."""
        with (self.at / "told").open("ab") as told:
            snakemake = subprocess.Popen(
                self.command(*options),
                cwd=self.at,
                env=self.environment(),
                stdout=told,
                stderr=subprocess.STDOUT,
                # A shell's background job would ignore Ctrl-C, and so would its children.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        try:
            yield snakemake
        finally:
            if snakemake.poll() is None:
                snakemake.kill()
                snakemake.wait()
                self.cancel()

    @property
    def told(self) -> str:
        """What snakemake has printed in the background."""
        return (self.at / "told").read_text(encoding="utf-8")

    def jobs(self, rule: str) -> dict[str, str]:
        """The numbers of all jobs of a rule that wrote a log, in their order, and its wildcards."""
        logs = (self.at / "logs" / "slurm" / f"rule_{rule}").rglob("*.log")
        found = {path.stem: path.parent.name for path in logs}
        return dict(sorted(found.items(), key=lambda pair: int(pair[0])))

    def queued(self) -> list[str]:
        """Numbers of this folder's jobs that wait or run."""
        lines = asked("squeue", "--noheader", "--format=%A|%Z").splitlines()
        return [line.split("|")[0] for line in lines if line.endswith(f"|{self.at}")]

    def cancel(self) -> None:
        """End all jobs of this folder."""
        if numbers := self.queued():
            asked("scancel", *numbers)
            until(lambda: not self.queued())

    def newest_step(self, method: str = "lora-r4") -> int:
        """The last complete checkpoint of a method's first run; 0 before there is one."""
        runs = self.at / STATE / method / "seed0" / FIRST[method]
        found = [path.parent.name for path in runs.glob("*/step-*/progress.json")]
        return max((int(name.removeprefix("step-")) for name in found), default=0)

    def finished_runs(self, method: str = "lora-r4") -> list[Path]:
        """Records of a method's finished runs."""
        return [*(self.at / STATE / method).rglob("run.json")]

    def log(self, method: str = "lora-r4") -> str:
        """What the training of a method printed, when its job was started for the last time."""
        path = self.at / "logs" / NAME / "finetune" / f"{method}-seed0.log"
        return path.read_text(encoding="utf-8")

    def steps_told(self, run: str, method: str = "lora-r4") -> list[int]:
        """Steps of a run in that log."""
        told = [line for line in self.log(method).splitlines() if f"/{run}: step " in line]
        return [int(line.split(": step ")[1].split("/")[0]) for line in told]

    def forget(self, method: str) -> None:
        """Remove what was found out about one method."""
        for part in ("state", "runs"):
            shutil.rmtree(self.at / RESULTS / part / method)


def job(number: str) -> Job:
    """What SLURM's accounting tells of a job, once it knows it."""
    fields = "JobIDRaw,State,Timelimit,AllocTRES,NodeList"
    command = ("sacct", "-X", "--noheader", "--parsable2", "--jobs", number, "--format", fields)
    until(lambda: bool(asked(*command).strip()))
    number, state, *rest = asked(*command).splitlines()[-1].split("|")
    return Job(number, state.split()[0], *rest)


def until(true: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Wait for something."""
    deadline = time.monotonic() + patience
    while not true():
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.05)


def run_group(folder: Path, method: str = "lora-r4") -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Items and records of a run group, but for what tells times and places."""
    at = folder / RESULTS / "runs" / method / "seed0"
    records = json.loads((at / "runs.json").read_text(encoding="utf-8"))
    measured = {"training_seconds", "wall_seconds", "tokens_per_second", "peak_memory_gib"}
    for record in records:
        for key in (*measured, "machine", "folder"):
            record.pop(key, None)
    return pd.read_parquet(at / "items.parquet"), records
