"""The program that is found in the place of sbatch; with programs in the place of SLURM's."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PATIENT = Path(__file__).resolve().parents[2] / "profiles" / "slurm" / "bin"
# Tells that the controller is up when it is asked for the third time.
SCONTROL = """#!/bin/sh
echo asked >> "{0}/told"
[ "$(grep -c asked "{0}/told")" -ge 3 ] || {{ echo "Slurmctld(primary) at vm is DOWN"; exit 1; }}
echo "Slurmctld(primary) at vm is UP"
"""
SLEEP = '#!/bin/sh\necho "slept $1" >> "{0}/told"\n'
SBATCH = '#!/bin/sh\necho "sbatch $*" >> "{0}/told"\necho 17\nexit 3\n'


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A path of programs: the patient one twice, as in a job that was submitted by it, SLURM's."""
    programs = {"scontrol": SCONTROL, "sbatch": SBATCH, "sleep": SLEEP}
    for name, text in programs.items():
        (tmp_path / name).write_text(text.format(tmp_path), encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    return os.pathsep.join([str(PATIENT), str(PATIENT), str(tmp_path), os.environ["PATH"]])


def _submit(path: str) -> subprocess.CompletedProcess[str]:
    """As SLURM's plugin does."""
    command = 'sbatch --parsable --wrap="a job"'
    environment = os.environ | {"PATH": path}
    return subprocess.run(
        command, shell=True, env=environment, capture_output=True, text=True, timeout=60
    )


def test_a_controller_that_is_away_is_waited_for(path: str, tmp_path: Path) -> None:
    """What sbatch is told, prints, and how it ends, is as without; it is started once."""
    done = _submit(path)
    assert (done.returncode, done.stdout, done.stderr) == (3, "17\n", "")
    told = (tmp_path / "told").read_text(encoding="utf-8").splitlines()
    assert told == [*["asked", "slept 5"] * 2, "asked", "sbatch --parsable --wrap=a job"]


def test_of_a_snakemake_that_was_killed_nothing_is_submitted(path: str, tmp_path: Path) -> None:
    """It waited for the controller meanwhile; the next snakemake would not know of the job."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    environment = os.environ | {"PATH": path, "FORGETTING_SNAKEMAKE": str(gone.pid)}
    done = subprocess.run(["sbatch", "a job"], env=environment, timeout=60, check=False)
    assert done.returncode == 1
    assert "sbatch" not in (tmp_path / "told").read_text(encoding="utf-8")


def test_it_does_not_start_itself_for_ever(path: str, tmp_path: Path) -> None:
    """Where the path names its folder in another way."""
    (tmp_path / "sbatch").unlink()
    odd = f"{PATIENT}/:{path}"
    environment = os.environ | {"PATH": odd}
    done = subprocess.run(["sbatch"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 127


def test_without_the_means_to_ask_nothing_is_waited_for(path: str, tmp_path: Path) -> None:
    """Where there is no scontrol: the programs of a shell are all else that it takes."""
    (tmp_path / "scontrol").unlink()
    for name in ("sh", "dirname", "tr", "grep", "paste"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    assert _submit(f"{PATIENT}:{tmp_path}").returncode == 3
    assert "slept" not in (tmp_path / "told").read_text(encoding="utf-8")


def test_a_controller_that_stays_away_is_not_waited_for_for_ever(path: str, tmp_path: Path) -> None:
    """sbatch then tells of it."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    assert _submit(path).returncode == 3
    told = (tmp_path / "told").read_text(encoding="utf-8").splitlines()
    assert told == ["slept 5"] * 199 + ["sbatch --parsable --wrap=a job"]


def test_what_is_submitted_is_written_down(path: str, tmp_path: Path) -> None:
    """The number, without the cluster's name; what is printed stays as it is."""
    submitted = tmp_path / "slurm-jobs.txt"
    environment = os.environ | {"PATH": path, "FORGETTING_SUBMITTED": str(submitted)}
    for answer, status in (("17", 0), ("18;lab", 0), ("", 1)):
        script = f'#!/bin/sh\n[ "$1" = "a job" ] && printf "%s" "{answer}"\nexit {status}\n'
        (tmp_path / "sbatch").write_text(script)
        done = subprocess.run(
            ["sbatch", "a job"], env=environment, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout.strip()) == (status, answer)
    assert submitted.read_text().split() == ["17", "18"]
