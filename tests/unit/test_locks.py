"""Locks: studies never share a folder of results, and no job or download runs twice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from forgetting.errors import InputError
from forgetting.locks import (
    JOBS_LOCK,
    OWNER_FILE,
    check_no_running_jobs,
    check_owner,
    is_locked,
    lock_downloads,
    study_origin,
)
from forgetting.study.load import load_study
from support.slurm import STUDY

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "workflow"
HOLD = """
import sys, time
from pathlib import Path
from forgetting.locks import lock_results
lock_results(Path(sys.argv[1]), sys.argv[2])
print("held", flush=True)
time.sleep(600)
"""


def _write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(STUDY, sort_keys=False), encoding="utf-8")
    return path


@contextmanager
def _held(folder: Path, study: str) -> Iterator[subprocess.Popen[str]]:
    """Lock a folder of results in another process, as a snakemake does."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), study],
        env=os.environ | {"PYTHONPATH": str(LIBRARY)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_results_are_locked_until_the_process_ends(tmp_path: Path) -> None:
    """A killed process leaves no lock."""
    folder = tmp_path / "results" / "own"
    command = [sys.executable, "-c", HOLD, str(folder), "own"]
    environment = os.environ | {"PYTHONPATH": str(LIBRARY)}
    with _held(folder, "own"):
        assert is_locked(folder)
        second = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert second.returncode
        assert f"{folder}: another snakemake runs this study here" in second.stderr
    assert not is_locked(folder)
    with _held(folder, "own"):
        assert is_locked(folder)


def test_running_jobs_of_a_killed_snakemake_are_reported(tmp_path: Path) -> None:
    """A job holds a lock, so that the next snakemake does not start a second one."""
    program = (
        "import sys, time\n"
        "from forgetting.errors import reports_input_errors\n"
        "@reports_input_errors\n"
        "def main(argv=None):\n"
        "    print('runs', flush=True)\n"
        "    time.sleep(600)\n"
        "main()\n"
    )
    environment = {"PYTHONPATH": str(LIBRARY), "FORGETTING_JOBS_LOCK": str(tmp_path / JOBS_LOCK)}
    check_no_running_jobs(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        process.stdout.readline()
        with pytest.raises(InputError, match="jobs of a snakemake that was killed still run"):
            check_no_running_jobs(tmp_path, patience=0.1)
        process.kill()
    check_no_running_jobs(tmp_path)


def test_study_files_of_one_name_do_not_share_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first keeps the folder as long as its file exists."""
    monkeypatch.chdir(tmp_path)
    first, second = _write(Path("a/own.yaml")), _write(Path("b/own.yml"))
    folder, studies = Path("results/own"), Path("config/studies")
    with _held(folder, study_origin(first, studies)):
        pass
    check_owner(folder, study_origin(first.resolve(), studies))
    with pytest.raises(InputError) as error:
        check_owner(folder, study_origin(second, studies))
    assert str(error.value) == (
        "study=b/own.yml: results/own holds the results of a/own.yaml, which has the same name; "
        "rename one of the two files, or move the folder away"
    )
    with pytest.raises(InputError, match=r"holds the results of a/own\.yaml"):
        check_owner(folder, "own")  # of config/studies
    first.rename("renamed.yaml")
    check_owner(folder, study_origin(second, studies))


def test_names_that_differ_by_case_do_not_share_results(tmp_path: Path) -> None:
    (tmp_path / "results" / "Own").mkdir(parents=True)
    check_owner(tmp_path / "results" / "Own", "Own.yaml")
    with pytest.raises(InputError, match=r"some file systems take that for .*Own"):
        check_owner(tmp_path / "results" / "own", "own.yaml")


def test_results_without_a_readable_owner_are_continued(tmp_path: Path) -> None:
    """The owner is missing, or a crash truncated it."""
    check_owner(tmp_path, "own.yaml")
    (tmp_path / OWNER_FILE).write_text('{"stu')
    check_owner(tmp_path, "own.yaml")


@pytest.mark.parametrize(
    ("file", "config", "other"),
    [
        ("own/mini.yml", {}, "mini.yaml"),
        ("own/mini.yaml", {}, "mini.yaml"),
        ("own/MINI.yaml", {}, "mini.yaml"),
        ("own/mini-tiny.yaml", {}, "mini.yaml"),
        ("studies/mini-tiny.yaml", {}, "mini.yaml"),
        ("studies/mini.yaml", {"scale": "tiny"}, "mini-tiny.yaml"),
    ],
)
def test_name_of_another_study_is_refused(
    file: str, config: dict[str, str], other: str, tmp_path: Path
) -> None:
    """Studies of the workflow keep their names, at both scales."""
    studies = tmp_path / "studies"
    _write(studies / other)
    path = _write(tmp_path / file)
    with pytest.raises(InputError) as error:
        load_study({"study": str(path), **config}, studies)
    assert f"like those of {studies / other}; rename your file" in str(error.value)


def test_study_named_tradeoff_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is the page of the last study that ran; rename"):
        load_study({"study": str(_write(tmp_path / "Tradeoff.yaml"))}, tmp_path / "studies")


def test_second_download_of_a_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Snakemake removes the target of a download first, also while others read it."""
    monkeypatch.chdir(tmp_path)
    model = "resources/models/owner/name/revision"
    program = HOLD.replace(
        "lock_results(Path(sys.argv[1]), sys.argv[2])", "lock_downloads(sys.argv[1:])"
    )
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            program.replace("import lock_results", "import lock_downloads"),
            model,
        ],
        env=os.environ | {"PYTHONPATH": str(LIBRARY)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        process.stdout.readline()
        lock_downloads(["resources/models/owner/other/revision"])
        with pytest.raises(InputError, match=f"{model}: another snakemake downloads it"):
            lock_downloads([model])
        process.kill()
    lock_downloads([model])
