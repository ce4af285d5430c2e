"""The forecast of a study: schedule, correction by finished runs, comparison with measurements."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from forgetting.errors import InputError
from forgetting.io import write_json
from forgetting.pipeline.resources.forecast import (
    Forecast,
    SimulatedJob,
    compare_with_forecast,
    correction_factors,
    finished_runs,
    forecast_against_measured,
    forecast_study,
    is_device,
    longest_path,
    simulate_schedule,
    site_of_runs,
    with_machines,
)
from forgetting.pipeline.resources.forecast_cli import format_duration
from forgetting.pipeline.resources.hardware import Site
from forgetting.pipeline.resources.job_costs import JobCosts
from forgetting.pipeline.status import PlannedJob
from forgetting.study.load import load_study

ROOT = Path(__file__).resolve().parents[3]
STUDIES = ROOT / "config" / "studies"


def _random_jobs(seed: int, gpus: int = 1) -> dict[int, SimulatedJob]:
    """Return a random plan in which each job waits for some earlier jobs."""
    draw = random.Random(seed)
    return {
        number: SimulatedJob(
            seconds=draw.uniform(1, 100),
            gpus=draw.choice([1, 1, gpus]),
            after=frozenset(before for before in range(number) if draw.random() < 0.1),
        )
        for number in range(60)
    }


@pytest.mark.parametrize("seed", range(20))
def test_schedule_is_between_its_bounds(seed: int) -> None:
    """It is at least as long as the longest path and as all work on all GPUs.

    For jobs of one GPU it is at most as long as both together (Graham 1969).
    """
    jobs = _random_jobs(seed)
    ends = simulate_schedule(jobs, machines=2, gpus=4, most=99)
    wall = max(ends.values())
    work = sum(job.seconds * job.gpus * job.nodes for job in jobs.values()) / 8
    path = sum(jobs[number].seconds for number in longest_path(jobs))
    assert max(path, work) <= wall * (1 + 1e-9)
    assert wall <= work + path
    for number, job in jobs.items():
        assert all(ends[number] >= ends[before] + job.seconds - 1e-6 for before in job.after)


@pytest.mark.parametrize("seed", range(5))
def test_schedule_on_one_gpu_and_on_many(seed: int) -> None:
    jobs = _random_jobs(seed)
    one = max(simulate_schedule(jobs, machines=1, gpus=1, most=99).values())
    assert one == pytest.approx(sum(job.seconds for job in jobs.values()))
    many = max(simulate_schedule(jobs, machines=60, gpus=1, most=99).values())
    assert many == pytest.approx(sum(jobs[number].seconds for number in longest_path(jobs)))


@pytest.mark.parametrize("seed", range(5))
def test_schedule_never_exceeds_gpus_and_job_limit(seed: int) -> None:
    """The GPUs in use and the number of submitted jobs stay within their limits."""
    jobs = _random_jobs(seed, gpus=3)
    for most in (3, 99):
        ends = simulate_schedule(jobs, machines=2, gpus=4, most=most)
        for now in ends.values():
            running = [
                jobs[n] for n, end in ends.items() if end - jobs[n].seconds <= now - 1e-6 < end
            ]
            assert sum(job.gpus for job in running) <= 8
            assert len(running) <= most


def test_jobs_on_several_machines_take_all_their_gpus() -> None:
    wide, narrow = SimulatedJob(10.0, gpus=8, nodes=2), SimulatedJob(1.0, gpus=1)
    assert simulate_schedule({0: narrow, 1: wide}, machines=2, gpus=8, most=9) == {0: 1.0, 1: 11.0}
    with pytest.raises(ValueError, match="more GPUs than the machines have"):
        simulate_schedule({0: wide}, machines=1, gpus=8, most=9)


def _forecast(name: str, results: Path, gpus: int = 32) -> Forecast:
    costs = JobCosts(load_study({"study": name}, STUDIES)[1], with_machines(Site(), None, gpus))
    jobs: dict[int, PlannedJob] = {0: PlannedJob("evaluate_base", {}, frozenset())}
    run_groups = [(method, str(seed)) for method in costs.methods for seed in costs.study.seeds]
    for method, seed in run_groups:
        wildcards = {"method": method, "seed": seed}
        jobs[len(jobs)] = PlannedJob("finetune", wildcards, frozenset({0}))
        for duration in costs.durations:
            trunk = frozenset({len(jobs) - 1}) if duration == next(iter(costs.durations)) else None
            after = trunk or jobs[len(jobs) - 1].after
            jobs[len(jobs)] = PlannedJob(
                "train_cooldown", wildcards | {"duration": duration}, after
            )
    return forecast_study(costs, jobs, results)


def test_forecast_of_paper_studies_is_near_other_estimates(tmp_path: Path) -> None:
    """Training time follows from published FLOPs at 40 % of the peak; docs/cluster.md has the rest.

    Biderman et al., mathematics: 3,600 EFLOP without recomputed activations, which take a third
    more of full fine-tuning and half more of adapters. TOFU, ten epochs of some 80 runs: 4.1 EFLOP,
    1.14 hours at the peak, for each of three seeds; thrice that at 40 % and with padding.
    """
    maths = _forecast("biderman-math-cpt", tmp_path)
    hours = maths.gpu_hours * maths.shares["training"]
    assert hours == pytest.approx(1.4 * 3600e18 / (0.4 * 989e12) / 3600, rel=0.15)
    tofu = [_forecast(name, tmp_path) for name in ("tofu-phi-1.5", "tofu-llama-2-7b")]
    hours = sum(found.gpu_hours * found.shares["training"] for found in tofu)
    floor = 3 * 1.14
    assert 2 * floor < hours < 4 * floor


def test_forecast_is_not_longer_on_more_gpus(tmp_path: Path) -> None:
    walls = [_forecast("tofu-phi-1.5", tmp_path, gpus).wall_hours for gpus in (1, 2, 4, 8, 16, 32)]
    assert walls == sorted(walls, reverse=True)
    assert walls[0] > 5 * walls[-1]


def test_finished_runs_on_the_same_device_correct_the_forecast(tmp_path: Path) -> None:
    """Runs that took twice the forecast double it; runs on other devices do not count."""
    before = _forecast("tofu-phi-1.5", tmp_path)
    costs, (runs, rest) = before.costs, (8, 21)
    stages = costs.of("finetune", {"method": "lora-r8"}).stages
    training = 2 * stages["training"] / runs
    others = 3 * (stages["load"] + stages["probes"] + stages["checkpoints"]) / runs
    record = {
        "run": "lora-r8/seed0/lr0.0001-wd0",
        "status": "ok",
        "steps": costs.workload.schedule.steps,
        "evaluations": [[0, 0, 0]] * rest,
        "training_seconds": training,
        "wall_seconds": training + others,
        "tokens_per_second": 1.0,
        "batched_runs": 8,
        "peak_memory_gib": 60.0,
        "device": "NVIDIA H100 80GB HBM3",
        "processes": 1,
    }
    write_json(tmp_path / "state" / record["run"] / "key" / "run.json", record)
    found = compare_with_forecast(costs, finished_runs(tmp_path))
    assert [each.run for each in found] == [record["run"]]
    assert correction_factors(found, "A100").runs == 0
    by = correction_factors(found, "H100")
    assert (by.training, by.rest) == pytest.approx((2.0, 3.0))
    after = _forecast("tofu-phi-1.5", tmp_path)
    for stage, factor in {"training": 2.0, "probes": 3.0, "start": 1.0}.items():
        hours = [each.gpu_hours * each.shares[stage] for each in (before, after)]
        assert hours[1] == pytest.approx(factor * hours[0]), stage


def test_is_device_reads_names_of_records() -> None:
    assert is_device("NVIDIA H100 80GB HBM3", "H100")
    assert is_device("CPU, 2 of 2 threads", "CPU")
    assert not is_device("NVIDIA H200", "H100")


def test_format_duration_chooses_a_unit() -> None:
    assert [format_duration(s) for s in (5.4, 600, 3600 * 5, 86400 * 9)] == [
        "5 s",
        "10.0 min",
        "5.0 h",
        "9.0 d",
    ]


def test_with_machines_takes_whole_machines_or_part_of_one() -> None:
    assert with_machines(Site(), "A100", 4).machines.model_dump() == {
        "device": "A100", "count": 1, "gpus": 4, "cpus": 48, "memory_gb": 2000.0,
    }  # fmt: skip
    assert with_machines(Site(), None, 64).devices == 64
    for gpus, message in {12: "--gpus 12: machines have 8", 0: "--gpus 0: give at least 1"}.items():
        with pytest.raises(InputError, match=message):
            with_machines(Site(), None, gpus)


def _record(run: str, device: str, seconds: float) -> dict[str, Any]:
    return {
        "run": run,
        "status": "ok",
        "steps": 162,
        "evaluations": [[9, 1, 0.5]] * 18,
        "training_seconds": seconds,
        "wall_seconds": 3 * seconds,
        "tokens_per_second": 100.0,
        "batched_runs": 1,
        "peak_memory_gib": 1.0,
        "device": device,
        "processes": 1,
    }


def test_measured_times_are_compared_by_method_and_device() -> None:
    """Seconds are summed over runs, memory is the largest; unknown devices have no forecast."""
    study = load_study({"study": "mini"}, STUDIES)[1]
    cpu = "CPU, 2 of 8 threads"
    records = [
        _record("lora-r2/seed0/lr0.004-wd0", cpu, 10.0),
        _record("lora-r2/seed0/lr0.005-wd0", cpu, 20.0),
        _record("full/seed0/lr0.0002-wd0", "NVIDIA H100 80GB HBM3", 5.0),
        _record("full/seed0/lr0.0003-wd0", "Abacus", 5.0),
        _record("full/seed0/lr0.0003-wd0", cpu, 5.0) | {"status": "diverged"},
    ]
    rank, full = forecast_against_measured(study, records)
    assert (rank["label"], rank["device"], rank["runs"]) == ("rank 2", cpu, 2)
    assert (rank["training_measured"], rank["rest_measured"]) == (30.0, 60.0)
    assert rank["memory_measured"] == pytest.approx(1.073741824)
    assert rank["training_forecast"] > full["training_forecast"] > 0
    assert full["device"].startswith("NVIDIA")
    site = site_of_runs(cpu)
    assert site is not None
    assert (site.device.name, site.cores) == ("CPU", 2)
