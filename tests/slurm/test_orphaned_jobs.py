"""Jobs that outlive their Snakemake. Scripts replace the programs of SLURM."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from forgetting.errors import InputError
from forgetting.locks import OWNER_FILE
from forgetting.pipeline.slurm import SUBMITTED_FILE, cancel_orphaned_jobs

RUN = "77f8388a-2830-4ec5-8d0f-610fb311e0e6"
SQUEUE = '#!/bin/sh\n[ -e "{0}/down" ] && exit 1\ncat "{0}/queue"\n'
# Ends all jobs that are its arguments, or none.
SCANCEL = (
    '#!/bin/sh\necho "$@" >> "{0}/cancelled"\n[ -e "{0}/stuck" ] && exit 0\n'
    'for job; do sed -i "/^$job|/d" "{0}/queue"; done\n'
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder from which jobs were submitted, with no record of their studies."""
    for name, text in (("squeue", SQUEUE), ("scancel", SCANCEL)):
        (tmp_path / name).write_text(text.format(tmp_path), encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    at = tmp_path / "work"
    (at / "logs" / "slurm").mkdir(parents=True)
    (at / "results" / "mini").mkdir(parents=True)
    lines = [
        f"11|RUNNING|{RUN}|rule_finetune_wildcards_full_0|{at}",
        f"12|PENDING|lab_{RUN}|rule_evaluate_base|{at}",
        f"13|RUNNING|{RUN}|rule_finetune_wildcards_full_0|{tmp_path}/another",
        f"14|RUNNING|my own job|(null)|{at}",
    ]
    (tmp_path / "queue").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return at


def _end(folder: Path, patience: float = 60.0) -> str:
    results = folder / "results" / "mini"
    return " ".join(cancel_orphaned_jobs(folder, folder / "logs" / "slurm", results, patience))


@contextmanager
def _running(results: Path) -> Iterator[None]:
    """Lock the results of a study as a Snakemake that runs it does."""
    results.mkdir(parents=True, exist_ok=True)
    with (results / OWNER_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_only_jobs_of_snakemake_in_this_folder_are_cancelled(folder: Path) -> None:
    """Jobs of other folders and jobs that the user submitted continue."""
    message = _end(folder)
    assert (folder.parent / "cancelled").read_text(encoding="utf-8") == "11 12\n"
    assert message.startswith("cancelled, since")
    assert "11 (rule_finetune_wildcards_full_0), 12 (rule_evaluate_base)" in message
    assert _end(folder) == ""


def test_jobs_of_another_running_snakemake_are_left_alone(folder: Path) -> None:
    with _running(folder / "results" / "tofu"):
        assert _end(folder).startswith("left alone")
    assert not (folder.parent / "cancelled").exists()
    assert _end(folder).startswith("cancelled")


def test_each_study_cancels_its_own_jobs(folder: Path) -> None:
    """A study cancels jobs that it has a record of, also while another study runs."""
    other = folder / "results" / "tofu"
    other.mkdir()
    (folder / "results" / "mini" / SUBMITTED_FILE).write_text("10\n11\n")
    (other / SUBMITTED_FILE).write_text("12\n")
    with _running(other):
        message = _end(folder)
    assert message.startswith("cancelled, since")
    assert (folder.parent / "cancelled").read_text(encoding="utf-8") == "11\n"
    assert _end(folder) == ""
    (other / SUBMITTED_FILE).unlink()
    with _running(other):
        assert "left alone, as another snakemake may wait for them: SLURM jobs 12" in _end(folder)


def test_squeue_is_not_called_if_nothing_was_submitted(folder: Path) -> None:
    """A study that runs on this machine would otherwise wait for a controller that is down."""
    (folder / "logs" / "slurm").rmdir()
    (folder.parent / "down").touch()
    assert _end(folder) == ""


def test_jobs_that_cannot_be_cancelled_are_reported(folder: Path) -> None:
    (folder.parent / "stuck").touch()
    with pytest.raises(InputError, match="not known to have ended: SLURM jobs 11, 12;"):
        _end(folder, patience=0.0)
    (folder.parent / "down").touch()
    assert "squeue does not answer" in _end(folder)


def test_jobs_of_unknown_state_are_not_taken_for_ended(folder: Path) -> None:
    """The controller stops after scancel, so nothing may be submitted."""
    scancel = folder.parent / "scancel"
    scancel.write_text(f'#!/bin/sh\ntouch "{folder.parent}/down"\n', encoding="utf-8")
    with pytest.raises(InputError, match="not known to have ended: SLURM jobs 11, 12;"):
        _end(folder, patience=0.0)
