"""Jobs that outlive their snakemake, with programs in the place of SLURM's; see test_slurm.py."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from forgetting.pipeline.slurm import cancel_orphaned_jobs
from forgetting.locks import OWNER_FILE
from forgetting.pipeline.slurm import SUBMITTED_FILE
from forgetting.errors import InputError

RUN = "77f8388a-2830-4ec5-8d0f-610fb311e0e6"
SQUEUE = '#!/bin/sh\n[ -e "{0}/down" ] && exit 1\ncat "{0}/queue"\n'
# Ends all jobs that it is told of, or none.
SCANCEL = (
    '#!/bin/sh\necho "$@" >> "{0}/cancelled"\n[ -e "{0}/stuck" ] && exit 0\n'
    'for job; do sed -i "/^$job|/d" "{0}/queue"; done\n'
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which jobs were submitted, nobody has written down for which study."""
    for name, text in (("squeue", SQUEUE), ("scancel", SCANCEL)):
        (tmp_path / name).write_text(text.format(tmp_path), encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    at = tmp_path / "work"
    (at / "logs" / "slurm").mkdir(parents=True)
    (at / "results" / "mini").mkdir(parents=True)
    lines = [
        f"11|RUNNING|{RUN}|rule_finetune_wildcards_full_0|{at}",
        f"12|PENDING|lab_{RUN}|rule_score_base|{at}",
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
    """A study that another snakemake runs."""
    results.mkdir(parents=True, exist_ok=True)
    with (results / OWNER_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_only_jobs_of_snakemake_in_this_folder_are_ended(folder: Path) -> None:
    """Neither those of other folders nor what the user has submitted by hand."""
    told = _end(folder)
    assert (folder.parent / "cancelled").read_text(encoding="utf-8") == "11 12\n"
    assert told.startswith("cancelled, since")
    assert "11 (rule_finetune_wildcards_full_0), 12 (rule_score_base)" in told
    assert _end(folder) == ""


def test_jobs_are_left_to_another_snakemake_that_may_wait_for_them(folder: Path) -> None:
    with _running(folder / "results" / "tofu"):
        assert _end(folder).startswith("left alone")
    assert not (folder.parent / "cancelled").exists()
    assert _end(folder).startswith("cancelled")


def test_each_study_ends_its_own_jobs(folder: Path) -> None:
    """Those that were submitted for it, also while another runs; never those of another."""
    other = folder / "results" / "tofu"
    other.mkdir()
    (folder / "results" / "mini" / SUBMITTED_FILE).write_text("10\n11\n")
    (other / SUBMITTED_FILE).write_text("12\n")
    with _running(other):
        told = _end(folder)
    assert told.startswith("cancelled, since")
    assert (folder.parent / "cancelled").read_text(encoding="utf-8") == "11\n"
    assert _end(folder) == ""
    (other / SUBMITTED_FILE).unlink()
    with _running(other):
        assert "left alone, as another snakemake may wait for them: SLURM jobs 12" in _end(folder)


def test_where_nothing_was_submitted_slurm_is_not_asked(folder: Path) -> None:
    """A controller that is down would be waited for, also by a study that runs on this machine."""
    (folder / "logs" / "slurm").rmdir()
    (folder.parent / "down").touch()
    assert _end(folder) == ""


def test_what_cannot_be_known_or_ended_is_told(folder: Path) -> None:
    (folder.parent / "stuck").touch()
    with pytest.raises(InputError, match="not known to have ended: SLURM jobs 11, 12;"):
        _end(folder, patience=0.0)
    (folder.parent / "down").touch()
    assert "squeue does not answer" in _end(folder)


def test_jobs_of_which_nobody_tells_are_not_taken_for_ended(folder: Path) -> None:
    """The controller goes away between scancel and the next look: nothing may be submitted."""
    scancel = folder.parent / "scancel"
    scancel.write_text(f'#!/bin/sh\ntouch "{folder.parent}/down"\n', encoding="utf-8")
    with pytest.raises(InputError, match="not known to have ended: SLURM jobs 11, 12;"):
        _end(folder, patience=0.0)
