"""Whole studies on a SLURM cluster, and failures of their jobs; support/slurm.py finds the cluster.

After every failure the numbers equal those of one machine without SLURM, no step before a
checkpoint is repeated, and no job waits forever.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from forgetting.pipeline.resources.job_costs import ON_DEVICES, SUBMITTED
from support.faults import assert_same, assert_same_tables, empty, in_training, target
from support.slurm import Folder, job, run_group, run_program, until

pytestmark = pytest.mark.slurm
TARGET = target()


def test_study_on_slurm_equals_study_on_one_machine(
    local: Path, study: Path, tmp_path: Path
) -> None:
    """Heavy jobs run under SLURM, each on a GPU; the others run locally."""
    folder = empty(tmp_path / "work", study)
    folder.run()
    assert (folder.at / "reports" / "tradeoff.html").is_file()
    assert_same_tables(folder.at, local)
    logs = folder.at / "logs" / "slurm"
    rules = {path.name.removeprefix("rule_") for path in logs.iterdir()}
    assert rules == {"pretrain_base", "evaluate_base", "finetune", "benchmark", "benchmark_base"}
    assert rules <= {*SUBMITTED}
    for rule in rules:
        numbers = folder.jobs(rule)
        assert len({*numbers.values()}) == len(numbers), "a job was submitted twice"
        for number in numbers:
            assert job(number).state == "COMPLETED"
            assert ("gres/gpu=1" in job(number).resources) == (rule in ON_DEVICES)
    assert set(folder.jobs("finetune").values()) == {"lora-r4_0", "full_0"}
    assert "Nothing to be done" in folder.run("--dry-run")


def _killed(snakemake: subprocess.Popen[bytes]) -> None:
    snakemake.kill()
    snakemake.wait()


def _interrupted(snakemake: subprocess.Popen[bytes]) -> None:
    snakemake.send_signal(signal.SIGINT)
    assert snakemake.wait(120) != 0


def test_restart_cancels_jobs_of_a_killed_snakemake(begun: Folder, local: Path) -> None:
    """The jobs continue without it, and two jobs would write the same files."""
    with begun.running(TARGET) as snakemake:
        number, step = in_training(begun)
        _killed(snakemake)
    assert begun.queued() == [number]
    output = begun.run(TARGET)
    assert "cancelled, since the snakemake that waited for them was killed" in output
    assert job(number).state == "CANCELLED"
    assert len(begun.jobs("finetune")) == 2
    assert_same(begun, local, step)


@pytest.mark.slow
def test_ctrl_c_cancels_submitted_jobs(begun: Folder, local: Path) -> None:
    """The same command resumes from the newest checkpoint."""
    with begun.running(TARGET) as snakemake:
        number, step = in_training(begun)
        _interrupted(snakemake)
        until(lambda: not begun.queued())
    assert job(number).state == "CANCELLED"
    begun.run(TARGET)
    assert_same(begun, local, step)


def _cancel(number: str) -> None:
    run_program("scancel", number)


def _out_of_time(number: str) -> None:
    run_program("scontrol", "update", f"JobId={number}", "TimeLimit=1")


@pytest.mark.slow
@pytest.mark.parametrize(("end_job", "state"), [(_cancel, "CANCELLED"), (_out_of_time, "TIMEOUT")])
def test_a_lost_job_is_submitted_again_with_more_time(
    begun: Folder, local: Path, end_job: Callable[[str], None], state: str
) -> None:
    """The user cancels the job, or it reaches its time limit."""
    with begun.running(TARGET) as snakemake:
        number, step = in_training(begun)
        end_job(number)
        assert snakemake.wait(600) == 0, begun.output
    assert f"SLURM status is: '{state}'" in begun.output
    assert job(number).state == state
    first, second = begun.jobs("finetune")
    assert first == number
    assert job(second).minutes == 60  # twice what the first attempt run_program for
    assert_same(begun, local, step)


@pytest.mark.slow
def test_requeued_job_resumes(begun: Folder, local: Path) -> None:
    """SLURM restarts the same job, as after a preemption."""
    with begun.running(TARGET) as snakemake:
        number, step = in_training(begun)
        run_program("scontrol", "requeue", number)
        assert snakemake.wait(600) == 0, begun.output
    assert [*begun.jobs("finetune")] == [number]
    (log,) = (begun.at / "logs" / "slurm").rglob(f"{number}.log")
    assert log.read_text(encoding="utf-8").count("/lr0.001-wd0: step 3/") == 1, (
        "the log was truncated"
    )
    assert_same(begun, local, step)


@pytest.mark.slow
def test_job_resumes_after_a_node_failure(begun: Folder, local: Path, cluster: Path | None) -> None:
    """SLURM restarts the job on another node."""
    if cluster is None:
        pytest.skip("nothing to crash a node with; FORGETTING_SLURM names programs that can")
    with begun.running(TARGET) as snakemake:
        number, step = in_training(begun)
        node = job(number).node
        subprocess.run([cluster / "crash-node", node], check=True, timeout=60)
        try:
            assert snakemake.wait(600) == 0, begun.output
        finally:
            subprocess.run([cluster / "start-cluster"], check=True, timeout=200)
    assert job(number).node != node
    assert [*begun.jobs("finetune")] == [number]
    assert_same(begun, local, step)


def test_two_nodes_train_like_one_process(local: Path, two_nodes: Folder) -> None:
    """In full fine-tuning each node has half of every weight; srun starts a launcher per node."""
    folder = two_nodes
    (number,) = folder.jobs("finetune")
    assert "gres/gpu=2" in job(number).resources.split(",")
    steps = run_program(
        "sacct", "--noheader", "--parsable2", "--jobs", number, "--format=NTasks,NNodes"
    )
    assert "2|2" in steps.splitlines()
    items, (record,) = run_group(folder.at, "full")
    expected, (alone,) = run_group(local, "full")
    assert (record["processes"], alone["processes"]) == (2, 1)
    # bfloat16 rounds sums of another order differently; test_distributed.py compares exactly.
    assert record["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-5)
    assert record["losses"] == pytest.approx(alone["losses"], rel=5e-3)
    keys = ["run", "step", "probe", "item", "question", "reference"]
    assert items[keys].equals(expected[keys])
    for name in ("probability", "truth_ratio_arithmetic", "logprob_answer"):
        np.testing.assert_allclose(items[name], expected[name], rtol=0.05, err_msg=name)
