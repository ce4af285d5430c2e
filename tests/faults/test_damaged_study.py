"""A whole study whose files are damaged or deleted one after another."""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from forgetting.digests import file_damage, visible_files
from support.damage import flip, truncate
from support.slurm import STUDY, Folder

pytestmark = pytest.mark.slow

RESULTS = Path("results/damaged")
STUDY_FILE = Path("damaged.yaml")
"""In the working folder: by another path, a copy of the study would be another study."""
TIMES = ["seconds", "tokens_per_second", "peak_memory_gib"]
TABLES = ("runs", "trajectory", "items", "selection", "benchmarks", "benchmark_responses")
SMALL = STUDY | {
    "title": "Damaged",
    "training": STUDY["training"] | {"epochs": 3},
    "methods": [
        {"method": "lora", "rank": 2, "learning_rate": [4e-3]},
        {"method": "full", "learning_rate": [2e-4]},
    ],
    "benchmarks": {"dataset": "world", "tasks": {"humaneval": {"limit": 2, "max_new_tokens": 8}}},
}


class Study(Folder):
    """The study in a folder of its own."""

    def start(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run snakemake to its end, however it ends."""
        return subprocess.run(
            self.command(*options, profile=None),
            cwd=self.at,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def configure(self, **changes: object) -> None:
        """Change sections of the study."""
        (self.at / self.study).write_text(
            yaml.safe_dump(SMALL | changes, sort_keys=False), encoding="utf-8"
        )

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the tables without durations."""
        tables = {
            name: pd.read_parquet(self.at / RESULTS / "tables" / f"{name}.parquet")
            for name in TABLES
        }
        tables["runs"] = tables["runs"].drop(columns=TIMES)
        return tables


def _same(found: dict[str, pd.DataFrame], expected: dict[str, pd.DataFrame]) -> None:
    for name, table in expected.items():
        pd.testing.assert_frame_equal(found[name], table)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Return the study after one run."""
    at = tmp_path_factory.mktemp("study")
    study = Study(at, STUDY_FILE)
    study.configure()
    done = study.start()
    assert done.returncode == 0, done.stdout[-6000:]
    return study


@pytest.fixture
def study(finished: Study, tmp_path: Path) -> Study:
    """Return a copy that a test may damage; hard links are preserved."""
    subprocess.run(["cp", "-a", finished.at, tmp_path / "study"], check=True)
    return Study(tmp_path / "study", STUDY_FILE)


# --- the state is deleted -----------------------------------------------------------------------


@pytest.fixture
def without_state(study: Study) -> Study:
    """Delete the state, which the README allows."""
    shutil.rmtree(study.at / RESULTS / "state")
    return study


def _weights(study: Study) -> set[str]:
    folder = study.at / RESULTS / "selected"
    return {str(path.relative_to(folder)) for path in visible_files(folder)}


def test_finished_study_without_state_has_nothing_to_do(without_state: Study) -> None:
    assert "Nothing to be done" in without_state.start().stdout


def test_seed_is_added_without_state(without_state: Study) -> None:
    expected, weights = without_state.tables(), _weights(without_state)
    without_state.configure(seeds=[0, 1])
    done = without_state.start()
    assert done.returncode == 0, done.stdout[-6000:]
    tables = without_state.tables()
    assert set(tables["selection"]["seed"]) == {0, 1}
    first = tables["items"].merge(expected["items"][["run"]].drop_duplicates(), on="run")
    pd.testing.assert_frame_equal(
        first.sort_values(["run", "step", "probe", "item"], ignore_index=True),
        expected["items"].sort_values(["run", "step", "probe", "item"], ignore_index=True),
    )
    assert _weights(without_state) > weights


def test_another_rule_selects_without_state(without_state: Study) -> None:
    rule = {**STUDY["selection"], "hyperparameters": "smallest-lr"}
    without_state.configure(selection=rule)
    done = without_state.start()
    assert done.returncode == 0, done.stdout[-6000:]
    assert set(without_state.tables()["selection"]["status"]) <= {"selected", "last"}


@pytest.mark.parametrize("output", ["selected/full", "selection/full.json"])
def test_removed_selection_is_made_again_without_state(without_state: Study, output: str) -> None:
    expected, weights = without_state.tables(), _weights(without_state)
    path = without_state.at / RESULTS / output
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = without_state.start(str(RESULTS / "selected/full/index.json"), "reports/tradeoff.html")
    assert done.returncode == 0, done.stdout[-6000:]
    _same(without_state.tables(), expected)
    assert _weights(without_state) == weights


def test_weights_are_kept_with_a_partial_state(study: Study) -> None:
    """The selection is refused by name, and the only weights are not deleted."""
    weights = _weights(study)
    for run in (study.at / RESULTS / "state" / "full").glob("seed0/*/*"):
        shutil.rmtree(run)
    (study.at / RESULTS / "selection/full.json").unlink()
    done = study.start(str(RESULTS / "selection/full.json"))
    assert done.returncode == 1
    (line,) = {line for line in done.stdout.splitlines() if line.startswith("error: ")}
    assert _weights(study) == weights - {"full/index.json"}
    command = re.search(r"`([^`]+)`", line)
    assert command
    subprocess.run(command[1], shell=True, check=True, cwd=study.at)
    assert study.start(str(RESULTS / "selection/full.json")).returncode == 0
    assert _weights(study) == weights


# --- files are damaged ---------------------------------------------------------------------------


DAMAGED: list[tuple[Callable[[Path], None], str, str]] = [
    (flip, "tables/trajectory.parquet", "reports/*.html"),
    (truncate, "benchmarks/base/outcomes.json", "tables/study.json"),
    (flip, "selection/full.json", "tables/study.json"),
    (flip, "selected/lora-r2/seed0/adapter_model.safetensors", "benchmarks/lora-r2/seed0/*"),
    (Path.unlink, "selected/full/seed0/config.json", "benchmarks/full/seed0/*"),
    (truncate, "data/train.jsonl", "runs/full/seed0/runs.json"),
    (flip, "base/model/model.safetensors", "base/items.parquet"),
]
"""Damage, damaged file, and the outputs that are then made again."""


def test_commands_in_messages_repair_the_study(study: Study) -> None:
    """Each damage is reported once; its command and a rerun give equal tables."""
    expected = study.tables()
    for damaging, name, again in DAMAGED:
        path = study.at / RESULTS / name
        damaging(path)
        for output in [*study.at.glob(again), *(study.at / RESULTS).glob(again)]:
            output.unlink()
        done = study.start()
        assert done.returncode == 1, name
        lines = {line for line in done.stdout.splitlines() if line.startswith("error: ")}
        assert len(lines) == 1, done.stdout[-3000:]
        assert str(RESULTS / name) in min(lines)
        assert "Traceback" not in done.stdout
        command = re.search(r"`([^`]+)`", min(lines))
        assert command
        subprocess.run(command[1], shell=True, check=True, cwd=study.at)
        done = study.start()
        assert done.returncode == 0, done.stdout[-6000:]
        _same(study.tables(), expected)
        assert file_damage(path) is None


# --- killed -------------------------------------------------------------------------------------


def test_last_jobs_killed_at_any_time_end_alike(study: Study) -> None:
    """Snakemake and its job are killed together while tables and page are made."""
    expected, draw = study.tables(), random.Random(0)
    for name in ("benchmarks/base/outcomes.json", "tables/study.json", "tables/items.parquet"):
        (study.at / RESULTS / name).unlink()
        for _ in range(3):
            with (study.at / "log").open("ab") as log:
                process = subprocess.Popen(
                    study.command("--nolock", profile=None),
                    cwd=study.at,
                    env=study.environment(),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            time.sleep(draw.uniform(4, 12))
            if process.poll() is None:
                subprocess.run(["kill", f"-{signal.SIGKILL}", "--", f"-{process.pid}"], check=False)
            process.wait()
        done = study.start("--nolock", "--rerun-incomplete")
        assert done.returncode == 0, done.stdout[-6000:]
        _same(study.tables(), expected)
    assert not [*(study.at / RESULTS).rglob("*.partial")]
