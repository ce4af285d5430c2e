"""A SLURM cluster for tests, and a study that takes half a minute there.

The cluster is the one whose `sinfo` answers. Without one, FORGETTING_SLURM names a folder with
three programs: `start-cluster` starts a cluster on this machine or restarts its dead nodes,
`crash-node NODE` kills all processes of a node, and `stop-cluster --wipe` ends the cluster. They
write into the folder that SLURM_LAB names. SNAKEMAKE_SLURM_PARTITIONS names a file with the
partitions of another site.
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
        "epochs": 30,  # long enough for a fault in the middle
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
    """Write the study and return its file; `full` are keys of the method `full`."""
    methods = [STUDY["methods"][0], STUDY["methods"][1] | full]
    return _written(path, STUDY | {"methods": methods})


def write_sweep(path: Path) -> Path:
    """Write a study of 34 run groups of one short run, more than the profile submits at a time."""
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


def run_program(*command: str) -> str:
    """Run a program that must succeed, and return its output."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def cluster_answers() -> bool:
    """Return whether a SLURM cluster answers."""
    if shutil.which("sbatch") is None:
        return False
    try:
        return bool(subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=20).stdout)
    except subprocess.TimeoutExpired:  # SLURM_CONF names a file that is not there
        return False


def shut_down() -> None:
    """End the controller and the accounting; nodes and jobs continue."""
    run_program("scontrol", "shutdown", "slurmctld")
    run_program("sacctmgr", "--immediate", "shutdown")
    until(lambda: "DOWN" in _pinged())


def _pinged() -> str:
    """Return the output of `scontrol ping`, whose status is not 0 if the controller is down."""
    command = ["scontrol", "ping"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout


@dataclass(frozen=True)
class Job:
    """A job in the accounting of SLURM."""

    number: str
    state: str
    limit: str
    resources: str
    node: str

    @property
    def minutes(self) -> int:
        """The time limit in minutes."""
        hours, minutes, _ = self.limit.rsplit("-", 1)[-1].split(":")
        return 60 * int(hours) + int(minutes)


@dataclass(frozen=True)
class Folder:
    """A working folder in which a study is run."""

    at: Path
    study: Path

    def command(self, *options: str, profile: str | None = "slurm") -> list[str]:
        """Return the command of a user, with shorter waits for SLURM."""
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
        """Return the environment with one thread and without variables of Snakemake."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SNAKEMAKE", "SLURM_J")) or key.endswith("SLURM_PARTITIONS")
        }
        kept.pop("PYTHONPATH", None)
        path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
        return kept | {"PATH": path, "OMP_NUM_THREADS": "1"}

    def run(self, *options: str, profile: str | None = "slurm") -> str:
        """Run Snakemake, which must succeed, and return its output."""
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
        """Run Snakemake in the background until the block ends, with its output in a file."""
        with (self.at / "output").open("ab") as output:
            snakemake = subprocess.Popen(
                self.command(*options),
                cwd=self.at,
                env=self.environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                # A background job of a shell and its children would ignore Ctrl-C.
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
    def output(self) -> str:
        """The output of Snakemake in the background."""
        return (self.at / "output").read_text(encoding="utf-8")

    def jobs(self, rule: str) -> dict[str, str]:
        """Return the wildcards of all jobs of a rule with a log, by job number in order."""
        logs = (self.at / "logs" / "slurm" / f"rule_{rule}").rglob("*.log")
        found = {path.stem: path.parent.name for path in logs}
        return dict(sorted(found.items(), key=lambda pair: int(pair[0])))

    def queued(self) -> list[str]:
        """Return the numbers of this folder's pending and running jobs."""
        lines = run_program("squeue", "--noheader", "--format=%A|%Z").splitlines()
        return [line.split("|")[0] for line in lines if line.endswith(f"|{self.at}")]

    def cancel(self) -> None:
        """Cancel all jobs of this folder."""
        if numbers := self.queued():
            run_program("scancel", *numbers)
            until(lambda: not self.queued())

    def newest_step(self, method: str = "lora-r4") -> int:
        """Return the step of the newest complete checkpoint of a method's first run, or 0."""
        runs = self.at / STATE / method / "seed0" / FIRST[method]
        found = [path.parent.name for path in runs.glob("*/step-*/progress.json")]
        return max((int(name.removeprefix("step-")) for name in found), default=0)

    def finished_runs(self, method: str = "lora-r4") -> list[Path]:
        """Return the records of a method's finished runs."""
        return [*(self.at / STATE / method).rglob("run.json")]

    def log(self, method: str = "lora-r4") -> str:
        """Return the log of the last training job of a method."""
        path = self.at / "logs" / NAME / "finetune" / f"{method}-seed0.log"
        return path.read_text(encoding="utf-8")

    def logged_steps(self, run: str, method: str = "lora-r4") -> list[int]:
        """Return the steps of a run in that log."""
        lines = [line for line in self.log(method).splitlines() if f"/{run}: step " in line]
        return [int(line.split(": step ")[1].split("/")[0]) for line in lines]

    def forget(self, method: str) -> None:
        """Remove state and results of a method."""
        for part in ("state", "runs"):
            shutil.rmtree(self.at / RESULTS / part / method)


def job(number: str) -> Job:
    """Return a job as soon as the accounting of SLURM has it."""
    fields = "JobIDRaw,State,Timelimit,AllocTRES,NodeList"
    command = ("sacct", "-X", "--noheader", "--parsable2", "--jobs", number, "--format", fields)
    until(lambda: bool(run_program(*command).strip()))
    number, state, *rest = run_program(*command).splitlines()[-1].split("|")
    return Job(number, state.split()[0], *rest)


def until(holds: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.05)


def run_group(folder: Path, method: str = "lora-r4") -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Return items and records of a run group without durations, machine and folder."""
    at = folder / RESULTS / "runs" / method / "seed0"
    records = json.loads((at / "runs.json").read_text(encoding="utf-8"))
    measured = {"training_seconds", "wall_seconds", "tokens_per_second", "peak_memory_gib"}
    for record in records:
        for key in (*measured, "machine", "folder"):
            record.pop(key, None)
    return pd.read_parquet(at / "items.parquet"), records
