"""The command of `make plan`, which plans the jobs of a study."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _forecast(*options: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "forgetting.pipeline.resources.forecast_cli", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "workflow")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_forecast_needs_no_gpu_and_no_download(tmp_path: Path) -> None:
    """The command of `make plan` lists all jobs that Snakemake plans."""
    (tmp_path / "config").symlink_to(ROOT / "config")
    output = tmp_path / "forecast.json"
    done = _forecast("study=tofu-phi-1.5", "--gpus", "32", "--output", str(output), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(output.read_text())
    assert numbers["jobs"]["finetune"] == 15
    assert (numbers["gpus"], numbers["device"]) == (32, "H100")
    assert sum(numbers["shares"].values()) == pytest.approx(1.0)
    first = done.stdout.splitlines()[0]
    assert first.startswith(f"tofu-phi-1.5: 61 jobs, {numbers['gpu_hours']:.1f} GPU-hours; ")
    for word in ("finetune lora-r512", "benchmark", "GPU-hours by stage: ", "download 2.9 GB"):
        assert word in done.stdout
    assert not list(tmp_path.glob("re*"))


def test_invalid_option_is_reported_in_one_line() -> None:
    for options, message in {
        ("study=nowhere",): "study=nowhere: there is no ",
        ("--device", "H300", "study=mini"): "device: H300 is not known",
    }.items():
        done = _forecast(*options)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr
