"""What befalls a cluster, on a real SLURM: its controller, its memory, its disk, others' jobs.

As in test_slurm.py, the numbers are those of one machine, and nothing is trained again.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
import yaml

from support.slurm import (RESULTS, Folder, asked, job, shut_down, until)
from support.small_disk import small_disk
from support.faults import (assert_same, assert_same_tables, assert_same_weights, empty, in_training, target, without)
from forgetting.digests import is_record

pytestmark = pytest.mark.slurm


def _again(cluster: Path) -> None:
    """Start what of the cluster is not running."""
    subprocess.run([cluster / "start-cluster"], check=True, timeout=200)


def _breakable(cluster: Path | None) -> Path:
    if cluster is None:
        pytest.skip("nothing to break a cluster with; FORGETTING_SLURM names programs that can")
    return cluster


@pytest.mark.parametrize(
    "befalls", ["requeued", pytest.param("a node dies", marks=pytest.mark.slow)]
)
def test_a_training_over_two_nodes_goes_on(
    two_nodes: Folder, local: Path, cluster: Path | None, tmp_path: Path, befalls: str
) -> None:
    """Ended in the middle on both, it ends in the same losses, items and weights."""
    folder = without("full", local, tmp_path / "begun", two_nodes.study)
    with folder.running(target("full")) as snakemake:
        number, step = in_training(folder, "full")
        nodes = asked("scontrol", "show", "hostnames", job(number).node).split()
        assert len(nodes) == 2
        if befalls == "requeued":
            asked("scontrol", "requeue", number)
        else:
            subprocess.run([_breakable(cluster) / "crash-node", nodes[1]], check=True, timeout=60)
        try:
            assert snakemake.wait(600) == 0, folder.told
        finally:
            if befalls == "a node dies":
                _again(_breakable(cluster))
    assert [*folder.jobs("finetune")] == [number]
    assert_same(folder, two_nodes.at, step, "full")
    assert_same_weights(folder, two_nodes.at, "full")


@pytest.mark.slow
def test_the_controller_and_the_accounting_are_away_for_a_while(
    local: Path, study: Path, cluster: Path | None, tmp_path: Path
) -> None:
    """While jobs run, end, and others wait for them: the study ends, and no job runs twice."""
    tools = _breakable(cluster)
    folder = empty(tmp_path / "work", study)
    with folder.running() as snakemake:
        until(lambda: folder.newest_step() >= 6)
        shut_down()
        try:
            time.sleep(45)
        finally:
            _again(tools)
        assert snakemake.wait(600) == 0, folder.told
    assert_same_tables(folder.at, local)
    for rule in ("pretrain_base", "evaluate_base", "finetune", "benchmark", "benchmark_base"):
        numbers = folder.jobs(rule)
        assert len({*numbers.values()}) == len(numbers), "a job was submitted twice"
        assert {job(number).state for number in numbers} == {"COMPLETED"}


@pytest.mark.slow
def test_a_job_is_submitted_when_the_controller_is_back(
    begun: Folder, local: Path, cluster: Path | None
) -> None:
    """A restart of it takes minutes on a large cluster, and jobs become ready meanwhile."""
    tools = _breakable(cluster)
    shut_down()
    try:
        with begun.running(target()) as snakemake:
            time.sleep(45)
            _again(tools)
            assert snakemake.wait(600) == 0, begun.told
    finally:
        _again(tools)
    (number,) = begun.jobs("finetune")
    assert job(number).minutes == 30  # of a first attempt
    assert_same(begun, local, 0)


@pytest.mark.slow
def test_a_preempted_job_goes_on(
    begun: Folder, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a partition of which another one takes what it needs; SLURM starts the job again."""
    shown = subprocess.run(["scontrol", "show", "partition", "low"], capture_output=True, text=True)
    if "PreemptMode=REQUEUE" not in shown.stdout:
        pytest.skip("there is no partition `low` whose jobs are requeued for those of others")
    site = yaml.safe_load((begun.at / "slurm" / "partitions.yaml").read_text(encoding="utf-8"))
    site["partitions"] = {"low": site["partitions"]["gpu"]}
    (tmp_path / "low.yaml").write_text(yaml.safe_dump(site), encoding="utf-8")
    monkeypatch.setenv("SNAKEMAKE_SLURM_PARTITIONS", str(tmp_path / "low.yaml"))
    with begun.running(target()) as snakemake:
        number, step = in_training(begun)
        other = ["sbatch", "--parsable", "--partition=gpu", "--nodes=4", "--gres=gpu:8"]
        other += [f"--chdir={tmp_path}", f"--output={tmp_path}/other.log", "--wrap=sleep 5"]
        first = asked(*other).strip()
        assert snakemake.wait(600) == 0, begun.told
    assert job(first).state == "COMPLETED"
    assert [*begun.jobs("finetune")] == [number]
    (log,) = (begun.at / "logs" / "slurm").rglob(f"{number}.log")
    assert "DUE TO PREEMPTION" in log.read_text(encoding="utf-8")
    assert_same(begun, local, step)


@pytest.mark.slow
def test_a_job_without_memory_is_tried_again_with_more(begun: Folder, local: Path) -> None:
    """The kernel ends what outgrows the job's memory; the log says so, and what was tried next."""
    told = begun.run(target(), "--set-resources", "finetune:mem_mb=600*attempt")
    first, second = begun.jobs("finetune")
    assert "mem=600M" in job(first).resources
    assert "mem=1200M" in job(second).resources
    state = job(first).state
    assert state in {"OUT_OF_MEMORY", "FAILED"}  # as the site watches memory, by the kernel or not
    assert f"SLURM status is: '{state}'" in told
    (log,) = (begun.at / "logs" / "slurm").rglob(f"{first}.log")
    words = log.read_text(encoding="utf-8").lower()
    assert "oom-kill" in words or "memory limit" in words
    assert_same(begun, local, 0)


@pytest.mark.slow
def test_a_full_disk_is_told_and_once_there_is_room_the_study_goes_on(
    begun: Folder, local: Path, tmp_path: Path
) -> None:
    """Where all results lie, of all nodes."""
    results = begun.at / RESULTS
    results.rename(tmp_path / "made")
    results.mkdir()
    with small_disk(results, 100_000) as resize:
        subprocess.run(["cp", "-a", f"{tmp_path}/made/.", str(results)], check=True)
        used = sum(path.stat().st_blocks for path in results.rglob("*")) // 2
        resize(used + 200)
        with begun.running(target()) as snakemake:
            assert snakemake.wait(600) != 0, begun.told
        (error,) = [line for line in begun.log().splitlines() if line.startswith("error: ")]
        assert error.startswith(f"error: {RESULTS}/state/")
        assert "No space left on device" in error and "make room there" in error
        assert error in begun.told
        step = begun.newest_step()
        assert step > 0, "there was no room for the first checkpoint"
        hidden = {path.name for path in results.rglob(".*") if not is_record(path)}
        assert hidden <= {".snakemake_timestamp"}
        resize(100_000)
        begun.run(target())
        assert_same(begun, local, step)
