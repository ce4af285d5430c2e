"""On a SLURM: a whole study, and all that can befall it. See clusters.py for which SLURM.

Whatever happens, the same numbers come out as on one machine without SLURM, nothing is trained
again that was in a checkpoint, and nothing waits for ever.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from support.slurm import (Folder, asked, run_group, job, until)
from support.faults import (assert_same, assert_same_tables, empty, in_training, target)
from forgetting.pipeline.resources.job_costs import (ON_DEVICES, SUBMITTED)

pytestmark = pytest.mark.slurm
TARGET = target()


def test_a_whole_study_ends_in_the_numbers_of_one_machine(
    local: Path, study: Path, tmp_path: Path
) -> None:
    """From nothing to the page: what is heavy under SLURM on a GPU each, the rest here."""
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


def test_a_killed_snakemake_is_started_again(begun: Folder, local: Path) -> None:
    """Its jobs run on; the next one ends them first, so that no two write the same files."""
    with begun.running(TARGET) as snakemake:
        number, step = in_training(begun)
        _killed(snakemake)
    assert begun.queued() == [number]
    told = begun.run(TARGET)
    assert "cancelled, since the snakemake that waited for them was killed" in told
    assert job(number).state == "CANCELLED"
    assert len(begun.jobs("finetune")) == 2
    assert_same(begun, local, step)


@pytest.mark.slow
def test_ctrl_c_cancels_what_was_submitted(begun: Folder, local: Path) -> None:
    """And the same command goes on from the newest checkpoint."""
    with begun.running(TARGET) as snakemake:
        number, step = in_training(begun)
        _interrupted(snakemake)
        until(lambda: not begun.queued())
    assert job(number).state == "CANCELLED"
    begun.run(TARGET)
    assert_same(begun, local, step)


def _cancel(number: str) -> None:
    asked("scancel", number)


def _out_of_time(number: str) -> None:
    asked("scontrol", "update", f"JobId={number}", "TimeLimit=1")


@pytest.mark.slow
@pytest.mark.parametrize(("befalls", "state"), [(_cancel, "CANCELLED"), (_out_of_time, "TIMEOUT")])
def test_a_lost_job_is_submitted_again_with_more_time(
    begun: Folder, local: Path, befalls: Callable[[str], None], state: str
) -> None:
    """Cancelled by the user, or cut off by its time: noticed, told, and tried once more."""
    with begun.running(TARGET) as snakemake:
        number, step = in_training(begun)
        befalls(number)
        assert snakemake.wait(600) == 0, begun.told
    assert f"SLURM status is: '{state}'" in begun.told
    assert job(number).state == state
    first, second = begun.jobs("finetune")
    assert first == number
    assert job(second).minutes == 60  # twice what the first attempt asked for
    assert_same(begun, local, step)


@pytest.mark.slow
def test_a_requeued_job_goes_on(begun: Folder, local: Path) -> None:
    """As after a preemption: SLURM starts the same job again."""
    with begun.running(TARGET) as snakemake:
        number, step = in_training(begun)
        asked("scontrol", "requeue", number)
        assert snakemake.wait(600) == 0, begun.told
    assert [*begun.jobs("finetune")] == [number]
    (log,) = (begun.at / "logs" / "slurm").rglob(f"{number}.log")
    assert log.read_text(encoding="utf-8").count("/lr0.001-wd0: step 3/") == 1, "the log began anew"
    assert_same(begun, local, step)


@pytest.mark.slow
def test_a_node_dies(begun: Folder, local: Path, cluster: Path | None) -> None:
    """SLURM notices, and starts the job on another node."""
    if cluster is None:
        pytest.skip("nothing to crash a node with; FORGETTING_SLURM names programs that can")
    with begun.running(TARGET) as snakemake:
        number, step = in_training(begun)
        node = job(number).node
        subprocess.run([cluster / "crash-node", node], check=True, timeout=60)
        try:
            assert snakemake.wait(600) == 0, begun.told
        finally:
            subprocess.run([cluster / "start-cluster"], check=True, timeout=200)
    assert job(number).node != node
    assert [*begun.jobs("finetune")] == [number]
    assert_same(begun, local, step)


def test_two_nodes_train_what_one_process_trains(local: Path, two_nodes: Folder) -> None:
    """Full fine-tuning, each node with half of every weight: one launcher a node, under srun."""
    folder = two_nodes
    (number,) = folder.jobs("finetune")
    assert "gres/gpu=2" in job(number).resources.split(",")
    steps = asked("sacct", "--noheader", "--parsable2", "--jobs", number, "--format=NTasks,NNodes")
    assert "2|2" in steps.splitlines()
    items, (record,) = run_group(folder.at, "full")
    expected, (alone,) = run_group(local, "full")
    assert (record["processes"], alone["processes"]) == (2, 1)
    # In bfloat16 another order of sums is another rounding; test_parallel.py compares exactly.
    assert record["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-5)
    assert record["losses"] == pytest.approx(alone["losses"], rel=5e-3)
    keys = ["run", "step", "probe", "item", "question", "reference"]
    assert items[keys].equals(expected[keys])
    for name in ("probability", "truth_ratio_arithmetic", "logprob_answer"):
        np.testing.assert_allclose(items[name], expected[name], rtol=0.05, err_msg=name)
