"""The plan of every study under both profiles, offline: jobs, rules, options of sbatch."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from snakemake.jobs import Job

from forgetting.pipeline.params import StudyParams
from forgetting.pipeline.paths import Paths
from forgetting.study.load import load_study
from support.snakemake import (
    GOLDEN,
    ROOT,
    STUDIES,
    golden_lines,
    parse_options,
    planned,
    restore_process,
    sbatch,
)

PROFILES = ["default", "slurm"]

# Jobs of a fresh checkout. Five methods (four ranks and full) need one run group for each seed;
# base and every run group are benchmarked.
JOBS = {
    "mini": {
        "generate_microworld": 1,
        "prepare_data": 1,
        "pretrain_base": 1,
        "evaluate_base": 1,
        "finetune": 5,
        "select_checkpoint": 5,
        "benchmark": 5,
        "benchmark_base": 1,
        "run_programs": 6,
        "make_tables": 1,
        "report": 1,
        "publish": 1,
        "all": 1,
    },
    "tofu-scratch": {
        "download_table": 6,
        "prepare_data": 1,
        "pretrain_base": 1,
        "evaluate_base": 1,
        "finetune": 4,
        "select_checkpoint": 4,
        "make_tables": 1,
        "report": 1,
        "publish": 1,
        "all": 1,
    },
    "own-data": {
        "prepare_data": 1,
        "download_model": 1,
        "download_benchmark": 2,
        "register_base": 1,
        "evaluate_base": 1,
        "finetune": 3,
        "select_checkpoint": 3,
        "benchmark": 3,
        "benchmark_base": 1,
        "make_tables": 1,
        "report": 1,
        "publish": 1,
        "all": 1,
    },
}
# Three seeds; six tables and five benchmarks from the hub.
JOBS["tofu-phi-1.5"] = JOBS["tofu-llama-2-7b"] = {
    "download_table": 6,
    "download_model": 1,
    "download_benchmark": 5,
    "prepare_data": 1,
    "register_base": 1,
    "evaluate_base": 1,
    "finetune": 15,
    "select_checkpoint": 5,
    "benchmark": 5,
    "benchmark_base": 1,
    "run_programs": 16,
    "make_tables": 1,
    "report": 1,
    "publish": 1,
    "all": 1,
}
# Three ranks and full with eight durations, the ends of which are benchmarked; four tables and four
# benchmarks from the hub.
JOBS["biderman-math-cpt"] = {
    "download_table": 4,
    "download_model": 1,
    "download_benchmark": 4,
    "prepare_data": 1,
    "register_base": 1,
    "evaluate_base": 1,
    "finetune": 4,
    "train_cooldown": 32,
    "select_checkpoint": 4,
    "benchmark": 4,
    "benchmark_base": 1,
    "make_tables": 1,
    "report": 1,
    "publish": 1,
    "all": 1,
}
JOBS["biderman-math-ift"] = JOBS["biderman-math-cpt"] | {"train_cooldown": 20}  # five durations
# HumanEval's programs, of the base and of every end.
JOBS["biderman-code-ift"] = JOBS["biderman-math-ift"] | {"run_programs": 21}
JOBS["biderman-code-cpt"] = JOBS["biderman-math-cpt"] | {"run_programs": 33}

Plan = Callable[..., list[Job]]


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[Plan]:
    """Return plan(study, profile, ...), which returns all jobs of a fresh checkout."""
    with restore_process():
        yield partial(planned, tmp_path)


def _mini() -> dict[str, Any]:
    """Return the study `mini` as written in its file."""
    path = ROOT / "config" / "studies" / "mini.yaml"
    document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return document


def _write(path: Path, document: dict[str, Any]) -> Path:
    """Write a study and return its path."""
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


def _by_key(jobs: list[Job]) -> dict[tuple[str, ...], Job]:
    """Return jobs by rule and wildcards."""
    return {(job.rule.name, *job.wildcards): job for job in jobs}


def params_of(study: Path) -> StudyParams:
    """Return the parameters of the jobs of a study file."""
    name, config = load_study({"study": str(study)}, ROOT / "config" / "studies")
    return StudyParams(config, name, Paths(config, name))


def _counts(jobs: list[Job]) -> dict[str, int]:
    return dict(Counter(job.rule.name for job in jobs))


def test_all_studies_have_job_counts() -> None:
    assert sorted(JOBS) == STUDIES


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("study", STUDIES)
def test_jobs_of_a_fresh_checkout(plan: Plan, study: str, profile: str) -> None:
    """Both profiles plan the same jobs, without a download and without SLURM."""
    assert _counts(plan(study, profile)) == JOBS[study]


@pytest.mark.parametrize("study", STUDIES)
def test_tiny_scale_keeps_methods_and_downloads_nothing(plan: Plan, study: str) -> None:
    jobs = _counts(plan(study, scale="tiny"))
    methods = JOBS[study]["select_checkpoint"]
    assert jobs["select_checkpoint"] == jobs["finetune"] == methods  # one seed
    for rule in ("train_cooldown", "benchmark", "benchmark_base", "run_programs"):
        assert (rule in jobs) == (rule in JOBS[study])
    assert jobs.get("train_cooldown", 0) in (0, 3 * methods)  # three durations
    assert not [rule for rule in jobs if rule.startswith("download")]


@pytest.mark.parametrize("study", ["mini", "own-data"])
def test_every_rule_has_docstring_log_and_environment(plan: Plan, study: str) -> None:
    """Every rule has a log, a conda file for `--sdm conda` and a docstring for `--list`."""
    rules = {job.rule for job in plan(study)} - {None}
    for rule in rules:
        assert rule.docstring, f"{rule.name} has no docstring"
        if rule.name != "all":
            assert len(list(rule.log)) == 1, f"{rule.name} has no log"
            assert rule.conda_env, f"{rule.name} has no conda file"
            program = re.search(r"/(\w+)\.py", rule.shellcmd).group(1)
            assert (ROOT / "workflow" / "scripts" / f"{program}.py").is_file()
            assert program in (rule.name, rule.name.removesuffix("_base"))


def test_logs_and_outputs_never_collide(plan: Plan) -> None:
    """No two jobs write one log, and no output is in the folders that retries must keep.

    The list of a job's checkpoints is an exception: Snakemake removes it with the checkpoints.
    """
    jobs = plan("tofu-phi-1.5")
    logs = Counter(str(log) for job in jobs for log in job.log)
    assert max(logs.values()) == 1
    outputs = [str(path) for job in jobs for path in job.output]
    kept = [path for path in outputs if "/state/" in path]
    assert kept and all("/state/checkpoints/" in path and path.endswith(".json") for path in kept)


def test_another_learning_rate_adds_no_job(plan: Plan, tmp_path: Path) -> None:
    """The run group of the method trains the new run and keeps its other runs."""
    document = _mini()
    document["methods"][0]["learning_rate"].append(2.0e-2)
    wider = _write(tmp_path / "wider.yaml", document)

    before = _by_key(plan("mini"))
    after = _by_key(plan(wider))
    assert before.keys() == after.keys()
    changed = {
        key
        for key, job in after.items()
        if job.params.get("digest") != before[key].params.get("digest")
    }
    assert changed == {
        ("finetune", "lora-r2", "0"),
        ("select_checkpoint", "lora-r2"),
        ("make_tables",),
    }


def test_training_benchmarks_change_no_benchmark_job(plan: Plan, tmp_path: Path) -> None:
    """Rows of the tasks are inputs of every run group and of the base's scores."""
    document = _mini()
    document["benchmarks"]["during_training"] = {"arc_challenge": 20}
    study = _write(tmp_path / "study.yaml", document)

    before = _by_key(plan("mini"))
    after = _by_key(plan(study))
    assert before.keys() == after.keys()
    changed = {
        key
        for key, job in after.items()
        if job.params.get("digest") != before[key].params.get("digest")
    }
    assert {key[0] for key in changed} == {"finetune", "evaluate_base", "make_tables"}
    params = params_of(study)
    params_by_rule = {}
    for rule in ("finetune", "evaluate_base"):
        (job, *_) = (job for key, job in after.items() if key[0] == rule)
        assert any("benchmarks/arc_challenge" in str(path) for path in job.input)
        (output,) = (path for path in job.output if str(path).endswith("benchmarks.parquet"))
        params_by_rule[rule] = params.of(rule, dict(job.wildcards.items()))
        assert f"--benchmarks {output}" in job.shellcmd
        (gather,) = (job for key, job in after.items() if key[0] == "make_tables")
        assert str(output) in list(map(str, gather.input))
    # The same items in the same batches.
    of_runs, of_base = params_by_rule["finetune"], params_by_rule["evaluate_base"]
    assert of_runs.training_benchmarks == of_base.training_benchmarks
    assert of_runs.benchmark_rows == of_base.benchmark_rows

    def changed_rules(**changed: Any) -> set[str]:
        """Return the rules whose parameters, other than those from inputs and outputs, change."""
        document["benchmarks"].update(changed)
        _write(study, document)
        again = _by_key(plan(study))
        changed_jobs = {
            key
            for key, job in after.items()
            if str(job.non_derived_params) != str(again[key].non_derived_params)
        }
        return {key[0] for key in changed_jobs} & {"finetune", "evaluate_base"}

    tasks = document["benchmarks"]["tasks"]
    assert not changed_rules(tasks=tasks | {"arc_challenge": {"chance": 0.3}})
    assert changed_rules(during_training={"arc_challenge": 21}) == {"finetune", "evaluate_base"}


def test_another_mitigation_changes_no_other_job(plan: Plan, tmp_path: Path) -> None:
    """Only the run group of the new method reads the table of its mitigation."""
    document = _mini()
    replay = {"table": "world/documents", "ratio": 0.1}
    method = document["methods"][1] | {"mitigation": {"replay": replay}}
    document["methods"].append(method)
    longer = _write(tmp_path / "longer.yaml", document)
    before, after = (_by_key(plan(study)) for study in ("mini", longer))
    run_group = after["finetune", "lora-r8-replay0.1", "0"]
    assert "results/longer/world/world/documents.jsonl" in list(run_group.input)
    for key, job in before.items():
        if key[0] not in ("make_tables", "report", "all"):
            first, second = (
                str([list(each.input), dict(each.params.items())]) for each in (job, after[key])
            )
            assert first == second.replace("/longer", "/mini"), key


def test_wise_ft_is_one_job_per_method(plan: Plan, tmp_path: Path) -> None:
    document = _mini()
    document["selection"]["wise_ft"] = [0.5, 0.75]
    scaled = _write(tmp_path / "scaled.yaml", document)
    jobs = plan(scaled, "slurm")
    assert _counts(jobs) == JOBS["mini"] | {"evaluate_wise_ft": 5}
    (collect,) = (job for job in jobs if job.rule.name == "make_tables")
    assert "results/scaled/tables/wise_ft.parquet" in list(collect.output)
    lines = {sbatch(job) for job in jobs if job.rule.name == "evaluate_wise_ft"}
    assert lines == {"-p gpu -t 30 --mem 8000 --cpus-per-task=8 --gpus=1"}


def _durations(tmp_path: Path, **changes: Any) -> Path:
    """Write the study `mini` with three durations, one seed and two methods."""
    document = _mini()
    document["methods"] = document["methods"][-2:]
    document["training"] |= {"schedule": "wsd", "epochs": 8, "durations": [0.5, 2, 8]}
    document["selection"].pop("stop_after_evaluations")
    for section, values in changes.items():
        document[section] |= values
    return _write(tmp_path / "durations.yaml", document)


DURATIONS = JOBS["mini"] | {
    "finetune": 2,
    "train_cooldown": 6,
    "select_checkpoint": 2,
    "benchmark": 2,
    "benchmark_base": 1,
    "run_programs": 3,
}


@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_every_duration_is_a_job_after_the_trunk(plan: Plan, tmp_path: Path, scale: str) -> None:
    """A branch waits for the trunk of its method and seed, the selection for all branches."""
    jobs = plan(_durations(tmp_path), "slurm", scale=scale)
    assert _counts(jobs) == DURATIONS
    branches = [job for job in jobs if job.rule.name == "train_cooldown"]
    for job in branches:
        run_group = f"/runs/{job.wildcards.method}/seed0/runs.json"
        assert [path for path in job.input if "/runs/" in str(path)] == [job.input.trunks]
        assert str(job.input.trunks).endswith(run_group)
    lines = {sbatch(job) for job in branches}
    assert lines == {"-p gpu -t 30 --mem 8000 --nodes=1 --cpus-per-task=8 --gpus=1"}
    for job in jobs:
        if job.rule.name == "select_checkpoint":
            assert len(job.input.runs) == 3
            assert all("/branches/" in str(path) for path in job.input.runs)


def test_refusals_need_no_job_of_their_own(plan: Plan, tmp_path: Path) -> None:
    """The job that scores benchmarks also generates the answers to harmful prompts."""
    (tmp_path / "harm").mkdir()
    (tmp_path / "harm" / "behaviors.csv").write_text("goal,target\nDo it.,Sure\n")
    document = _mini()
    document["datasets"]["harm"] = {
        "folder": str(tmp_path / "harm"),
        "columns": {"question": "goal"},
    }
    document["benchmarks"] = {"refusals": {"table": "harm/behaviors", "limit": 50}}
    study = _write(tmp_path / "refusing.yaml", document)
    jobs = plan(study)
    assert _counts(jobs) == {k: v for k, v in JOBS["mini"].items() if k != "run_programs"}
    for job in jobs:
        if job.rule.name == "benchmark":
            assert job.input.prompts == [str(tmp_path / "harm" / "behaviors.csv")]
            assert not job.input.get("rows")
    params = params_of(study).of("benchmark", {"method": "full"})
    assert params.refusal_prompts.columns.question == "goal"


def test_task_rows_come_from_the_hub_or_a_similar_task(plan: Plan, tmp_path: Path) -> None:
    """Every commit has a folder of its own, and sampled programs run on several cores."""
    document = _mini()
    study, commit = tmp_path / "other.yaml", hashlib.sha1(b"a").hexdigest()
    document["benchmarks"] = {"tasks": {"sciq": {"revision": commit}, "hellaswag": {}}}
    _write(study, document)
    jobs = plan(study)
    folders = [job.output[0] for job in jobs if job.rule.name == "download_benchmark"]
    assert sorted(folder.split("/")[2] for folder in folders) == ["hellaswag", "sciq"]
    assert f"resources/benchmarks/sciq/{commit}" in folders
    rows = params_of(study).of("benchmark", {"method": "full"}).rows
    assert rows["sciq"] == Path("resources/benchmarks/sciq", commit)
    document["benchmarks"] = {
        "dataset": "world",
        "tasks": {"arc_easy": {}, "humaneval": {"samples": 50, "max_new_tokens": 9}},
    }
    _write(study, document)
    jobs = plan(study)
    job = next(job for job in jobs if job.rule.name == "benchmark")
    world = "results/other/world/world/benchmarks"
    rows = params_of(study).of("benchmark", {"method": "full"}).rows
    assert rows["arc_easy"] == Path(world, "arc_challenge")
    assert f"{world}/arc_challenge/test.jsonl" in job.input.rows
    (threads,) = {job.threads for job in jobs if job.rule.name == "run_programs"}
    assert threads > 1  # 7, or the cores of the machine


def test_study_may_benchmark_every_duration(plan: Plan, tmp_path: Path) -> None:
    study = _durations(tmp_path, benchmarks={"models": "durations"}, selection={"wise_ft": [0.5]})
    jobs = plan(study)
    expected = DURATIONS | {"run_programs": 7, "evaluate_wise_ft": 2}
    assert _counts(jobs) == expected
    (job,) = (
        job for job in jobs if job.rule.name == "benchmark" and job.wildcards.method == "full"
    )
    assert job.input.selection == "results/durations/selection/full.json"
    assert job.params.checkpoints == "results/durations/selected/full"
    params = params_of(study).of("benchmark", {"method": "full"})
    assert params.models == [f"seed0-duration{duration}" for duration in ("0.5", "2", "8")]


def test_another_duration_adds_one_branch(plan: Plan, tmp_path: Path) -> None:
    """The trunk's job runs again and trains nothing."""
    before = _by_key(plan(_durations(tmp_path))).keys()
    more = _durations(tmp_path, training={"durations": [0.5, 2, 4, 8]})
    after = _by_key(plan(more)).keys()
    assert after - before == {
        ("train_cooldown", method, "0", "duration4") for method in ("lora-r128", "full")
    }


def test_parameters_of_jobs_have_no_path_of_the_checkout(plan: Plan) -> None:
    """A finished study is still finished after its folder was moved."""
    for job in plan("mini"):
        assert str(ROOT) not in str(dict(job.params.items())), job.rule.name
        assert str(ROOT) not in (job.rule.shellcmd or ""), job.rule.name


def test_hub_table_in_a_folder_is_downloaded(plan: Plan) -> None:
    """Owner, repository and commit are one part of the path each, the table may be several."""
    jobs = [job for job in plan("biderman-math-cpt") if job.rule.name == "download_table"]
    wildcards = {tuple(job.wildcards) for job in jobs}
    commit = "fde8ef8de2300f5e778f56261843dab89f230815"
    assert ("open-web-math", "open-web-math", commit, "data/train") in wildcards


def test_only_downloads_may_use_the_network(plan: Plan) -> None:
    for job in plan("own-data"):
        allowed = "HF_HUB_OFFLINE=0" in (job.rule.shellcmd or "")
        assert allowed == job.rule.name.startswith("download"), job.rule.name


def test_profile_slurm_ignores_profile_default() -> None:
    """`--cores` would limit the CPUs of every job, and a local `gpu` the number of jobs."""
    link = ROOT / "slurm"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "profiles" / "slurm"
    arguments = parse_options("--profile", "slurm", "--dry-run")
    assert arguments.executor == "slurm"
    assert arguments.cores is None
    assert "gpu" not in arguments.resources
    assert arguments.rerun_incomplete  # in both profiles


def test_profile_default_sets_cores_and_gpu() -> None:
    arguments = parse_options("--dry-run")
    assert arguments.executor is None
    assert arguments.cores >= 1
    assert arguments.resources["gpu"].value >= 1


def test_no_key_is_in_both_profiles() -> None:
    """A key in profiles/default would silently override profiles/slurm."""
    keys = [set(), set()]
    for found, profile in zip(keys, PROFILES, strict=True):
        text = (ROOT / "profiles" / profile / "profile.yaml").read_text(encoding="utf-8")
        for key, value in yaml.safe_load(text).items():
            found |= set(value) if key.startswith("?if") else {key}
    assert not [key for key in keys[0] & keys[1] if not key.startswith("__")]


def test_profile_avoids_pitfalls_of_the_slurm_plugin() -> None:
    """Comments are numbers in docs/design/slurm.md."""
    path = ROOT / "profiles" / "slurm" / "profile.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert settings["slurm-status-command"] == "squeue"  # 1
    assert settings["slurm-status-attempts"] / settings["max-status-checks-per-second"] >= 600  # 2
    assert settings["retries"]  # 3, and in no rule
    assert "slurm-array-jobs" not in settings  # 4
    assert settings["slurm-requeue"]  # 5
    # 6: three times as long must be less than MinJobAge, or the plugin uses sacct.
    assert 3 * settings.get("slurm-init-seconds-before-status-checks", 40) <= 300
    files = [ROOT / "Snakefile", *(ROOT / "workflow" / "rules").glob("*.smk")]
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    used = re.findall(r"^ *(retries|group|slurm_extra|gpus|nvidia_gpu|gres)\b *[:=]", text, re.M)
    assert not used  # 3, 9, 10


def test_documents_name_tests_that_exist() -> None:
    """Tests that the documents name exist, and every pitfall has a line."""
    docs = [ROOT / "docs" / name for name in ("design/slurm.md", "cluster.md")]
    text = "".join(path.read_text(encoding="utf-8") for path in docs)
    tests = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")
    )
    names = set(re.findall(r"`(test_\w+)`", text))
    assert names
    assert not [name for name in names if f"def {name}(" not in tests]
    assert re.findall(r"^\| (\d+) \|", text, re.M) == [str(line) for line in range(1, 22)]


def test_partitions_of_another_site_come_from_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profile passes the variable on, because the plugin ignores it if there is a file."""

    def partitions() -> str:
        return str(parse_options("--profile", "slurm", "--dry-run").slurm_partition_config)

    monkeypatch.delenv("SNAKEMAKE_SLURM_PARTITIONS", raising=False)
    assert (ROOT / partitions()).resolve() == ROOT / "profiles" / "slurm" / "partitions.yaml"
    monkeypatch.setenv("SNAKEMAKE_SLURM_PARTITIONS", "/etc/site.yaml")
    assert partitions() == "/etc/site.yaml"


@pytest.mark.parametrize("study", STUDIES)
def test_sbatch_options_equal_the_golden_file(plan: Plan, study: str) -> None:
    """Every submitted job has a line in golden/sbatch.txt.

    After an intended change, run golden/make_sbatch.py and read the differences.
    """
    golden = GOLDEN.read_text(encoding="utf-8").splitlines()
    lines = golden_lines(study, plan(study, "slurm"))
    assert lines == [line for line in golden if line.startswith(f"{study}: ")]


def test_golden_sbatch_file_has_every_study() -> None:
    golden = GOLDEN.read_text(encoding="utf-8").splitlines()
    assert sorted({line.split(":", 1)[0] for line in golden}) == STUDIES


def test_dry_run_prints_resources() -> None:
    """The plan has GPUs, memory, time, cores and disk of every job."""
    done = _snakemake("--profile", "slurm", "--config", "study=tofu-llama-2-7b")
    assert done.returncode == 0, done.stderr
    printed = done.stdout + done.stderr
    full = re.findall(r"Job \d+: Fine-tune full, seed \d \((.*)\)", printed)
    assert len(full) == 3
    for size in ("gpu=4", "nodes=1", "mem_mb=", "runtime=", "cpus_per_task=32", "disk_mb="):
        assert all(size in sizes for sizes in full)


@pytest.mark.parametrize("study", ["mini", "biderman-math-cpt"])
def test_dry_run_prints_at_most_10_lines_per_job(study: str) -> None:
    done = _snakemake("--config", f"study={study}")
    assert done.returncode == 0, done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) <= 10 * sum(JOBS[study].values())
    assert not [line for line in lines if '{"' in line]


def test_second_attempt_requests_more(plan: Plan) -> None:
    """The first attempt may have lacked memory or time."""
    for job in plan("tofu-phi-1.5", "slurm"):
        if job.rule.name in ("finetune", "benchmark", "evaluate_base"):
            first = dict(job.resources.items())
            job.attempt = 2
            second = dict(job.resources.items())
            job.attempt = 1
            assert second["mem_mb"] == pytest.approx(1.5 * first["mem_mb"], abs=2)
            assert second["runtime"] == 2 * first["runtime"]
            assert second["gpu"] == first["gpu"]


def test_requests_follow_the_machines_of_a_site(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes follow from the file of the site: on smaller GPUs a job gets more of them."""
    site = tmp_path / "site.yaml"
    site.write_text(
        "partitions: {short: {max_runtime: 8h, max_gpu: 8, max_mem_mb: 500000}}\n"
        "machines: {device: L40S, count: 2, gpus: 4, cpus: 16, memory_gb: 500}\n"
    )
    monkeypatch.setenv("SNAKEMAKE_SLURM_PARTITIONS", str(site))
    jobs = [job for job in plan("tofu-llama-2-7b", "slurm") if job.rule.name == "finetune"]
    full = next(job for job in jobs if job.wildcards.method == "full")
    assert (full.resources["gpu"], full.resources["nodes"]) == (8, 2)
    assert all(job.resources["runtime"] <= 8 * 60 for job in jobs)
    assert {job.resources["cpus_per_task"] for job in jobs} <= {4, 8, 16}


def test_method_too_large_for_the_gpus_is_reported(tmp_path: Path) -> None:
    """The plan has a warning, and none where every method fits."""
    site = tmp_path / "site.yaml"
    site.write_text("machines: {device: L40S, count: 1, gpus: 1, cpus: 16, memory_gb: 500}\n")
    fits = _snakemake("--config", "study=tofu-llama-2-7b")
    assert "smaller rank" not in fits.stdout + fits.stderr
    done = _snakemake(*("--config", "study=tofu-llama-2-7b"), SNAKEMAKE_SLURM_PARTITIONS=str(site))
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    lines = [line for line in output.splitlines() if "or a smaller rank or batch" in line]
    assert any(line.startswith("full: needs ") and "L40S has " in line for line in lines)


def test_processes_may_span_nodes(plan: Plan, tmp_path: Path) -> None:
    """The job gets all GPUs of two machines and starts the processes itself, without srun."""
    document = _mini()
    document["methods"][-1] |= {"processes": 16, "nodes": 2}
    wide = _write(tmp_path / "wide.yaml", document)
    jobs = [job for job in plan(wide, "slurm") if job.rule.name == "finetune"]
    lines = {job.wildcards["method"]: sbatch(job) for job in jobs}
    memory = dict(jobs[-1].resources.items())["mem_mb"]
    (line,) = (lines.pop(job.wildcards["method"]) for job in jobs if job.resources["nodes"] == 2)
    assert line.endswith("--nodes=2 --cpus-per-task=64 --gpus=16")
    assert memory < 8 * 8000
    assert {line.split("--mem")[1] for line in lines.values()} == {
        " 8000 --nodes=1 --cpus-per-task=8 --gpus=1"
    }
    assert all(job.resources["mpi"] is False for job in jobs)
    assert not any("mpi" in job.resources for job in plan("mini", "slurm"))


def test_number_of_processes_reruns_nothing(plan: Plan, tmp_path: Path) -> None:
    """The number of processes changes no result, so it is not among the parameters of jobs."""
    document = _mini()
    document["methods"][-1]["processes"] = 2
    wider = _write(tmp_path / "wider.yaml", document)
    before, after = (_by_key(plan(study, "slurm")) for study in ("mini", wider))
    assert after["finetune", "full", "0"].resources["gpu"] == 2
    assert before["finetune", "full", "0"].resources["gpu"] == 1
    for key, job in after.items():
        if key[0] not in ("make_tables", "report", "all"):
            changed = str(dict(job.params.items())).replace("/wider", "/mini")
            assert changed == str(dict(before[key].params.items())), key


def _snakemake(
    *options: str, folder: Path = ROOT, path: str = os.environ["PATH"], **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("SNAKEMAKE")
    } | {"PATH": path, **variables}
    return subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "--nolock", *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        ("", ["study=nowhere"], "study=nowhere: there is no "),
        ("", ["study=mini", "scael=tiny"], "--config scael: unknown option; expected study, scale"),
        ("", ["study=mini", "scale=huge"], "--config scale=huge: expected full or tiny"),
        ("", ["study=mini", "world_dir=nowhere"], "world_dir=nowhere: there is no such folder"),
        ("titel: A study", [], "titel: unknown key"),
        ("train_limit: many", [], "line 2: train_limit: "),
        ("train: ]", [], "line 2: not YAML"),
    ],
)
def test_invalid_study_ends_with_one_message_and_status_1(
    tmp_path: Path, change: str, options: list[str], expected: str
) -> None:
    """The message has file, line or key, and what was expected, without a traceback."""
    if change:
        path = ROOT / "config" / "studies" / "mini.yaml"
        head, rest = path.read_text(encoding="utf-8").split("\n", 1)
        (tmp_path / "mine.yaml").write_text(f"{head}\n{change}\n{rest}", encoding="utf-8")
        options = [f"study={tmp_path / 'mine.yaml'}"]
    done = _snakemake("--config", *options)
    assert done.returncode == 1
    output = done.stdout + done.stderr
    assert output.count(expected) == 1, output
    assert "Traceback" not in output
    assert "Job stats" not in output


def test_bare_command_plans_the_default_study() -> None:
    """A rule `all` in an included file would not be the default target."""
    done = _snakemake("--forceall")
    assert done.returncode == 0, done.stderr
    counts = re.findall(r"^(\w+) +(\d+)$", done.stdout + done.stderr, re.MULTILINE)
    assert {rule: int(count) for rule, count in counts} == JOBS["mini"] | {
        "total": sum(JOBS["mini"].values())
    }


def test_profile_slurm_plans_without_slurm(tmp_path: Path) -> None:
    """The plan needs no program of SLURM."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "sh", "env", "git", "uname", "which"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    for name in ("Snakefile", "workflow", "config", "profiles", "slurm", "envs"):
        (tmp_path / name).symlink_to(ROOT / name)
    options = ("--profile", "slurm", "--config", "study=tofu-phi-1.5")
    done = _snakemake(*options, folder=tmp_path, path=f"{Path(sys.executable).parent}:{tools}")
    assert done.returncode == 0, done.stderr
    assert "finetune" in done.stdout + done.stderr
