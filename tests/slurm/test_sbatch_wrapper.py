"""The wrapper of sbatch waits for the controller. Scripts replace the programs of SLURM."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

WRAPPER = Path(__file__).resolve().parents[2] / "profiles" / "slurm" / "bin"
# Prints that the controller is up at its third call.
SCONTROL = """#!/bin/sh
echo pinged >> "{0}/calls"
[ "$(grep -c pinged "{0}/calls")" -ge 3 ] || {{ echo "Slurmctld(primary) at vm is DOWN"; exit 1; }}
echo "Slurmctld(primary) at vm is UP"
"""
SLEEP = '#!/bin/sh\necho "slept $1" >> "{0}/calls"\n'
SBATCH = '#!/bin/sh\necho "sbatch $*" >> "{0}/calls"\necho 17\nexit 3\n'


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Return a PATH with the wrapper twice, as in a job that it submitted, and the scripts."""
    programs = {"scontrol": SCONTROL, "sbatch": SBATCH, "sleep": SLEEP}
    for name, text in programs.items():
        (tmp_path / name).write_text(text.format(tmp_path), encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    return os.pathsep.join([str(WRAPPER), str(WRAPPER), str(tmp_path), os.environ["PATH"]])


def _submit(path: str) -> subprocess.CompletedProcess[str]:
    """Submit a job as the plugin does."""
    command = 'sbatch --parsable --wrap="a job"'
    environment = os.environ | {"PATH": path}
    return subprocess.run(
        command, shell=True, env=environment, capture_output=True, text=True, timeout=60
    )


def test_wrapper_waits_for_the_controller(path: str, tmp_path: Path) -> None:
    """Arguments, output and status of sbatch are unchanged, and it is started once."""
    done = _submit(path)
    assert (done.returncode, done.stdout, done.stderr) == (3, "17\n", "")
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert calls == [*["pinged", "slept 5"] * 2, "pinged", "sbatch --parsable --wrap=a job"]


def test_wrapper_submits_nothing_for_a_killed_snakemake(path: str, tmp_path: Path) -> None:
    """The Snakemake was killed during the wait, and the next one would not know the job."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    environment = os.environ | {"PATH": path, "FORGETTING_SNAKEMAKE": str(gone.pid)}
    done = subprocess.run(["sbatch", "a job"], env=environment, timeout=60, check=False)
    assert done.returncode == 1
    assert "sbatch" not in (tmp_path / "calls").read_text(encoding="utf-8")


def test_wrapper_does_not_start_itself(path: str, tmp_path: Path) -> None:
    """PATH may spell the folder of the wrapper in another way."""
    (tmp_path / "sbatch").unlink()
    odd = f"{WRAPPER}/:{path}"
    environment = os.environ | {"PATH": odd}
    done = subprocess.run(["sbatch"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 127


def test_wrapper_does_not_wait_without_scontrol(path: str, tmp_path: Path) -> None:
    """The wrapper needs only common shell programs."""
    (tmp_path / "scontrol").unlink()
    for name in ("sh", "dirname", "tr", "grep", "paste"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    assert _submit(f"{WRAPPER}:{tmp_path}").returncode == 3
    assert "slept" not in (tmp_path / "calls").read_text(encoding="utf-8")


def test_wrapper_stops_waiting_for_the_controller(path: str, tmp_path: Path) -> None:
    """After the last attempt sbatch reports the error."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    assert _submit(path).returncode == 3
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert calls == ["slept 5"] * 199 + ["sbatch --parsable --wrap=a job"]


def test_wrapper_records_submitted_jobs(path: str, tmp_path: Path) -> None:
    """The record has job numbers without the cluster's name; the output is unchanged."""
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
