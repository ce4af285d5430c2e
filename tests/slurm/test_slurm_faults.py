"""Failures of a SLURM cluster: nodes, controller, memory, disk, and preemption.

As in test_slurm.py, the numbers equal those of one machine, and no step is repeated.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
import yaml

from forgetting.digests import is_record
from support.faults import (
    assert_same,
    assert_same_tables,
    assert_same_weights,
    empty,
    in_training,
    target,
    without,
)
from support.slurm import RESULTS, Folder, job, run_program, shut_down, until
from support.small_disk import small_disk

pytestmark = pytest.mark.slurm


def _repair(cluster: Path) -> None:
    """Start the parts of the cluster that do not run."""
    subprocess.run([cluster / "start-cluster"], check=True, timeout=200)


def _breakable(cluster: Path | None) -> Path:
    if cluster is None:
        pytest.skip("nothing to break a cluster with; FORGETTING_SLURM names programs that can")
    return cluster


@pytest.mark.parametrize("fault", ["requeue", pytest.param("node failure", marks=pytest.mark.slow)])
def test_training_on_two_nodes_resumes(
    two_nodes: Folder, local: Path, cluster: Path | None, tmp_path: Path, fault: str
) -> None:
    """Losses, items and weights equal those of a training without a fault."""
    folder = without("full", local, tmp_path / "begun", two_nodes.study)
    with folder.running(target("full")) as snakemake:
        number, step = in_training(folder, "full")
        nodes = run_program("scontrol", "show", "hostnames", job(number).node).split()
        assert len(nodes) == 2
        if fault == "requeue":
            run_program("scontrol", "requeue", number)
        else:
            subprocess.run([_breakable(cluster) / "crash-node", nodes[1]], check=True, timeout=60)
        try:
            assert snakemake.wait(600) == 0, folder.output
        finally:
            if fault == "node failure":
                _repair(_breakable(cluster))
    assert [*folder.jobs("finetune")] == [number]
    assert_same(folder, two_nodes.at, step, "full")
    assert_same_weights(folder, two_nodes.at, "full")


@pytest.mark.slow
def test_study_survives_an_outage_of_the_controller(
    local: Path, study: Path, cluster: Path | None, tmp_path: Path
) -> None:
    """Controller and accounting are down while jobs run, end and wait. No job runs twice."""
    tools = _breakable(cluster)
    folder = empty(tmp_path / "work", study)
    with folder.running() as snakemake:
        until(lambda: folder.newest_step() >= 6)
        shut_down()
        try:
            time.sleep(45)
        finally:
            _repair(tools)
        assert snakemake.wait(600) == 0, folder.output
    assert_same_tables(folder.at, local)
    for rule in ("pretrain_base", "evaluate_base", "finetune", "benchmark", "benchmark_base"):
        numbers = folder.jobs(rule)
        assert len({*numbers.values()}) == len(numbers), "a job was submitted twice"
        assert {job(number).state for number in numbers} == {"COMPLETED"}


@pytest.mark.slow
def test_submission_waits_for_the_controller(
    begun: Folder, local: Path, cluster: Path | None
) -> None:
    """On a large cluster a restart of the controller takes minutes."""
    tools = _breakable(cluster)
    shut_down()
    try:
        with begun.running(target()) as snakemake:
            time.sleep(45)
            _repair(tools)
            assert snakemake.wait(600) == 0, begun.output
    finally:
        _repair(tools)
    (number,) = begun.jobs("finetune")
    assert job(number).minutes == 30  # of a first attempt
    assert_same(begun, local, 0)


@pytest.mark.slow
def test_preempted_job_resumes(
    begun: Folder, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of another partition preempts the job, which SLURM requeues."""
    shown = subprocess.run(["scontrol", "show", "partition", "low"], capture_output=True, text=True)
    if "PreemptMode=REQUEUE" not in shown.stdout:
        pytest.skip("no partition `low` with preemption by requeueing")
    site = yaml.safe_load((begun.at / "slurm" / "partitions.yaml").read_text(encoding="utf-8"))
    site["partitions"] = {"low": site["partitions"]["gpu"]}
    (tmp_path / "low.yaml").write_text(yaml.safe_dump(site), encoding="utf-8")
    monkeypatch.setenv("SNAKEMAKE_SLURM_PARTITIONS", str(tmp_path / "low.yaml"))
    with begun.running(target()) as snakemake:
        number, step = in_training(begun)
        other = ["sbatch", "--parsable", "--partition=gpu", "--nodes=4", "--gres=gpu:8"]
        other += [f"--chdir={tmp_path}", f"--output={tmp_path}/other.log", "--wrap=sleep 5"]
        first = run_program(*other).strip()
        assert snakemake.wait(600) == 0, begun.output
    assert job(first).state == "COMPLETED"
    assert [*begun.jobs("finetune")] == [number]
    (log,) = (begun.at / "logs" / "slurm").rglob(f"{number}.log")
    assert "DUE TO PREEMPTION" in log.read_text(encoding="utf-8")
    assert_same(begun, local, step)


@pytest.mark.slow
def test_job_out_of_memory_is_retried_with_more(begun: Folder, local: Path) -> None:
    """The kernel or SLURM ends the job, as its log says, and the next attempt has more memory."""
    output = begun.run(target(), "--set-resources", "finetune:mem_mb=600*attempt")
    first, second = begun.jobs("finetune")
    assert "mem=600M" in job(first).resources
    assert "mem=1200M" in job(second).resources
    state = job(first).state
    assert state in {"OUT_OF_MEMORY", "FAILED"}  # depends on how the site limits memory
    assert f"SLURM status is: '{state}'" in output
    (log,) = (begun.at / "logs" / "slurm").rglob(f"{first}.log")
    words = log.read_text(encoding="utf-8").lower()
    assert "oom-kill" in words or "memory limit" in words
    assert_same(begun, local, 0)


@pytest.mark.slow
def test_study_resumes_once_a_full_disk_has_room(
    begun: Folder, local: Path, tmp_path: Path
) -> None:
    """The shared disk with all results is full."""
    results = begun.at / RESULTS
    results.rename(tmp_path / "made")
    results.mkdir()
    with small_disk(results, 100_000) as resize:
        subprocess.run(["cp", "-a", f"{tmp_path}/made/.", str(results)], check=True)
        used = sum(path.stat().st_blocks for path in results.rglob("*")) // 2
        resize(used + 200)
        with begun.running(target()) as snakemake:
            assert snakemake.wait(600) != 0, begun.output
        (error,) = [line for line in begun.log().splitlines() if line.startswith("error: ")]
        assert error.startswith(f"error: {RESULTS}/state/")
        assert "No space left on device" in error and "free some space there" in error
        assert error in begun.output
        step = begun.newest_step()
        assert step > 0, "there was no room for the first checkpoint"
        hidden = {path.name for path in results.rglob(".*") if not is_record(path)}
        assert hidden <= {".snakemake_timestamp"}
        resize(100_000)
        begun.run(target())
        assert_same(begun, local, step)
