"""The plan of every study under both profiles, offline: jobs, rules, what SLURM is told."""

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

from forgetting.config.job_params import StudyParams
from forgetting.pipeline.paths import Paths
from forgetting.study.load import load_study
from support.snakemake import (
    GOLDEN,
    ROOT,
    STUDIES,
    golden_lines,
    planned,
    sbatch,
    told_options,
    undone,
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
    """plan(study, profile, ...) -> every job of a fresh checkout, without running anything."""
    with undone():
        yield partial(planned, tmp_path)


def params_of(study: Path) -> StudyParams:
    """Return the parameters of the jobs of a study file."""
    name, config = load_study({"study": str(study)}, ROOT / "config" / "studies")
    return StudyParams(config, name, Paths(config, name))


def _counts(jobs: list[Job]) -> dict[str, int]:
    return dict(Counter(job.rule.name for job in jobs))


def test_every_study_is_counted() -> None:
    assert sorted(JOBS) == STUDIES


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("study", STUDIES)
def test_jobs_of_a_fresh_checkout(plan: Plan, study: str, profile: str) -> None:
    """Both profiles plan the same jobs, though nothing is downloaded and SLURM is not there."""
    assert _counts(plan(study, profile)) == JOBS[study]


@pytest.mark.parametrize("study", STUDIES)
def test_tiny_keeps_the_methods_and_downloads_nothing(plan: Plan, study: str) -> None:
    jobs = _counts(plan(study, scale="tiny"))
    methods = JOBS[study]["select_checkpoint"]
    assert jobs["select_checkpoint"] == jobs["finetune"] == methods  # one seed
    for rule in ("train_cooldown", "benchmark", "benchmark_base", "run_programs"):
        assert (rule in jobs) == (rule in JOBS[study])
    assert jobs.get("train_cooldown", 0) in (0, 3 * methods)  # three durations
    assert not [rule for rule in jobs if rule.startswith("download")]


@pytest.mark.parametrize("study", ["mini", "own-data"])
def test_every_rule_tells_what_it_does_and_keeps_a_log(plan: Plan, study: str) -> None:
    """A failed job leaves a log, `--sdm conda` finds an environment, `--list` says something."""
    rules = {job.rule for job in plan(study)} - {None}
    for rule in rules:
        assert rule.docstring, f"{rule.name} has no docstring"
        if rule.name != "all":
            assert len(list(rule.log)) == 1, f"{rule.name} has no log"
            assert rule.conda_env, f"{rule.name} has no conda file"
            program = re.search(r"/(\w+)\.py", rule.shellcmd).group(1)
            assert (ROOT / "workflow" / "scripts" / f"{program}.py").is_file()
            assert program in (rule.name, rule.name.removesuffix("_base"))


def test_logs_outputs_and_state_never_collide(plan: Plan) -> None:
    """Two jobs never write one log, and no output lies in the folders that retries must keep.

    But for the list of a job's checkpoints, which shall be gone with them.
    """
    jobs = plan("tofu-phi-1.5")
    logs = Counter(str(log) for job in jobs for log in job.log)
    assert max(logs.values()) == 1
    outputs = [str(path) for job in jobs for path in job.output]
    kept = [path for path in outputs if "/state/" in path]
    assert kept and all("/state/checkpoints/" in path and path.endswith(".json") for path in kept)


def test_a_learning_rate_more_is_no_job_more(plan: Plan, tmp_path: Path) -> None:
    """The run group of the method trains it; its other runs are kept by the run group itself."""
    path = ROOT / "config" / "studies" / "mini.yaml"
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    document["methods"][0]["learning_rate"].append(2.0e-2)
    wider = tmp_path / "wider.yaml"
    wider.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")

    before = {(job.rule.name, *job.wildcards): job for job in plan("mini")}
    after = {(job.rule.name, *job.wildcards): job for job in plan(wider)}
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


def test_asking_benchmarks_along_changes_no_score_of_a_checkpoint(
    plan: Plan, tmp_path: Path
) -> None:
    """Rows of the tasks become inputs of every run group, and of the base's scores, with which the
    course begins."""
    path = ROOT / "config" / "studies" / "mini.yaml"
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    document["benchmarks"]["during_training"] = {"arc_challenge": 20}
    asking = tmp_path / "asking.yaml"
    asking.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")

    before = {(job.rule.name, *job.wildcards): job for job in plan("mini")}
    after = {(job.rule.name, *job.wildcards): job for job in plan(asking)}
    assert before.keys() == after.keys()
    changed = {
        key
        for key, job in after.items()
        if job.params.get("digest") != before[key].params.get("digest")
    }
    assert {key[0] for key in changed} == {"finetune", "evaluate_base", "make_tables"}
    params = params_of(asking)
    asked = {}
    for rule in ("finetune", "evaluate_base"):
        (job, *_) = (job for key, job in after.items() if key[0] == rule)
        assert any("benchmarks/arc_challenge" in str(path) for path in job.input)
        (output,) = (path for path in job.output if str(path).endswith("benchmarks.parquet"))
        asked[rule] = params.of(rule, dict(job.wildcards.items()))
        assert f"--benchmarks {output}" in job.shellcmd
        (gather,) = (job for key, job in after.items() if key[0] == "make_tables")
        assert str(output) in list(map(str, gather.input))
    # The same items in the same batches.
    assert asked["finetune"].training_benchmarks == asked["evaluate_base"].training_benchmarks
    assert asked["finetune"].benchmark_rows == asked["evaluate_base"].benchmark_rows

    def asked_anew(**changed: Any) -> set[str]:
        """The rules that Snakemake sees a change of, which is not in what is made from outputs."""
        document["benchmarks"].update(changed)
        asking.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
        again = {(job.rule.name, *job.wildcards): job for job in plan(asking)}
        changed_jobs = {
            key
            for key, job in after.items()
            if str(job.non_derived_params) != str(again[key].non_derived_params)
        }
        return {key[0] for key in changed_jobs} & {"finetune", "evaluate_base"}

    tasks = document["benchmarks"]["tasks"]
    assert not asked_anew(tasks=tasks | {"arc_challenge": {"chance": 0.3}})
    assert asked_anew(during_training={"arc_challenge": 21}) == {"finetune", "evaluate_base"}


def test_a_mitigation_more_changes_no_other_job(plan: Plan, tmp_path: Path) -> None:
    """Its table is an input of its own run group, and is prepared for nobody else."""
    path = ROOT / "config" / "studies" / "mini.yaml"
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    replay = {"table": "world/documents", "ratio": 0.1}
    method = document["methods"][1] | {"mitigation": {"replay": replay}}
    document["methods"].append(method)
    longer = tmp_path / "longer.yaml"
    longer.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    before, after = (
        {(job.rule.name, *job.wildcards): job for job in plan(study)} for study in ("mini", longer)
    )
    run_group = after["finetune", "lora-r8-replay0.1", "0"]
    assert "results/longer/world/world/documents.jsonl" in list(run_group.input)
    for key, job in before.items():
        if key[0] not in ("make_tables", "report", "all"):
            told = [
                str([list(each.input), dict(each.params.items())]) for each in (job, after[key])
            ]
            assert told[0] == told[1].replace("/longer", "/mini"), key


def test_shares_of_the_update_are_one_job_a_model(plan: Plan, tmp_path: Path) -> None:
    path = ROOT / "config" / "studies" / "mini.yaml"
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    document["selection"]["wise_ft"] = [0.5, 0.75]
    scaled = tmp_path / "scaled.yaml"
    scaled.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    jobs = plan(scaled, "slurm")
    assert _counts(jobs) == JOBS["mini"] | {"evaluate_wise_ft": 5}
    (collect,) = (job for job in jobs if job.rule.name == "make_tables")
    assert "results/scaled/tables/wise_ft.parquet" in list(collect.output)
    lines = {sbatch(job) for job in jobs if job.rule.name == "evaluate_wise_ft"}
    assert lines == {"-p gpu -t 30 --mem 8000 --cpus-per-task=8 --gpus=1"}


def _durations(tmp_path: Path, **changes: Any) -> Path:
    """The study `mini` with three durations, one seed and two methods."""
    path = ROOT / "config" / "studies" / "mini.yaml"
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    document["methods"] = document["methods"][-2:]
    document["training"] |= {"schedule": "wsd", "epochs": 8, "durations": [0.5, 2, 8]}
    document["selection"].pop("stop_after_evaluations")
    for section, values in changes.items():
        document[section] |= values
    durations = tmp_path / "durations.yaml"
    durations.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return durations


DURATIONS = JOBS["mini"] | {
    "finetune": 2,
    "train_cooldown": 6,
    "select_checkpoint": 2,
    "benchmark": 2,
    "benchmark_base": 1,
    "run_programs": 3,
}


@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_every_duration_is_a_job_of_its_own_after_the_trunk(
    plan: Plan, tmp_path: Path, scale: str
) -> None:
    """Branches wait for the trunk of their method and seed only, and the choice for all of them."""
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


def test_prompts_that_should_be_refused_are_asked_beside_the_benchmarks_or_alone(
    plan: Plan, tmp_path: Path
) -> None:
    """No job of their own: the one that has loaded the model asks them."""
    (tmp_path / "harm").mkdir()
    (tmp_path / "harm" / "behaviors.csv").write_text("goal,target\nDo it.,Sure\n")
    path = ROOT / "config" / "studies" / "mini.yaml"
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    document["datasets"]["harm"] = {
        "folder": str(tmp_path / "harm"),
        "columns": {"question": "goal"},
    }
    document["benchmarks"] = {"refusals": {"table": "harm/behaviors", "limit": 50}}
    study = tmp_path / "refusing.yaml"
    study.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    jobs = plan(study)
    assert _counts(jobs) == {k: v for k, v in JOBS["mini"].items() if k != "run_programs"}
    for job in jobs:
        if job.rule.name == "benchmark":
            assert job.input.prompts == [str(tmp_path / "harm" / "behaviors.csv")]
            assert not job.input.get("rows")
    params = params_of(study).of("benchmark", {"method": "full"})
    assert params.refusal_prompts.columns.question == "goal"


def test_other_tasks_take_their_rows_from_the_hub_or_from_rows_of_the_same_kind(
    plan: Plan, tmp_path: Path
) -> None:
    """A commit has a folder of its own, so that another one is downloaded anew; samples of programs
    are run on several cores."""
    document = yaml.safe_load((ROOT / "config" / "studies" / "mini.yaml").read_text("utf-8"))
    study, commit = tmp_path / "other.yaml", hashlib.sha1(b"a").hexdigest()
    document["benchmarks"] = {"tasks": {"sciq": {"revision": commit}, "hellaswag": {}}}
    study.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
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
    study.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    jobs = plan(study)
    job = next(job for job in jobs if job.rule.name == "benchmark")
    world = "results/other/world/world/benchmarks"
    rows = params_of(study).of("benchmark", {"method": "full"}).rows
    assert rows["arc_easy"] == Path(world, "arc_challenge")
    assert f"{world}/arc_challenge/test.jsonl" in job.input.rows
    (threads,) = {job.threads for job in jobs if job.rule.name == "run_programs"}
    assert threads > 1  # 7, or what the machine has


def test_every_duration_is_benchmarked_where_the_study_says_so(plan: Plan, tmp_path: Path) -> None:
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


def test_one_more_duration_is_one_more_branch(plan: Plan, tmp_path: Path) -> None:
    """The trunk's job looks again at what it has; nothing of what it trains is another."""
    before = {(job.rule.name, *job.wildcards) for job in plan(_durations(tmp_path))}
    more = _durations(tmp_path, training={"durations": [0.5, 2, 4, 8]})
    after = {(job.rule.name, *job.wildcards) for job in plan(more)}
    assert after - before == {
        ("train_cooldown", method, "0", "duration4") for method in ("lora-r128", "full")
    }


def test_the_parameters_of_jobs_do_not_name_the_checkout(plan: Plan) -> None:
    """A study that was finished in one place is finished when its folder has moved."""
    for job in plan("mini"):
        assert str(ROOT) not in str(dict(job.params.items())), job.rule.name
        assert str(ROOT) not in (job.rule.shellcmd or ""), job.rule.name


def test_a_table_in_a_folder_of_the_hub_is_downloaded_from_there(plan: Plan) -> None:
    """Owner, repository and commit are one part of the path each, the table may be more."""
    jobs = [job for job in plan("biderman-math-cpt") if job.rule.name == "download_table"]
    wildcards = {tuple(job.wildcards) for job in jobs}
    commit = "fde8ef8de2300f5e778f56261843dab89f230815"
    assert ("open-web-math", "open-web-math", commit, "data/train") in wildcards


def test_only_downloads_may_use_the_network(plan: Plan) -> None:
    for job in plan("own-data"):
        allowed = "HF_HUB_OFFLINE=0" in (job.rule.shellcmd or "")
        assert allowed == job.rule.name.startswith("download"), job.rule.name


def test_profile_slurm_is_found_from_the_root_and_default_does_not_leak() -> None:
    """`--cores` would cap the CPUs of every job, a local `gpu` the jobs in flight."""
    link = ROOT / "slurm"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "profiles" / "slurm"
    arguments = told_options("--profile", "slurm", "--dry-run")
    assert arguments.executor == "slurm"
    assert arguments.cores is None
    assert "gpu" not in arguments.resources
    assert arguments.rerun_incomplete  # what both profiles share still holds


def test_profile_default_makes_a_bare_command_run() -> None:
    arguments = told_options("--dry-run")
    assert arguments.executor is None
    assert arguments.cores >= 1
    assert arguments.resources["gpu"].value >= 1


def test_no_key_is_in_both_profiles() -> None:
    """profiles/default would silently beat profiles/slurm."""
    keys = [set(), set()]
    for found, profile in zip(keys, PROFILES, strict=True):
        text = (ROOT / "profiles" / profile / "profile.yaml").read_text(encoding="utf-8")
        for key, value in yaml.safe_load(text).items():
            found |= set(value) if key.startswith("?if") else {key}
    assert not [key for key in keys[0] & keys[1] if not key.startswith("__")]


def test_what_slurms_plugin_breaks_is_not_used() -> None:
    """Numbers of docs/design/slurm.md: what hangs, runs nested, or shares a GPU by mistake."""
    path = ROOT / "profiles" / "slurm" / "profile.yaml"
    told = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert told["slurm-status-command"] == "squeue"  # 1
    assert told["slurm-status-attempts"] / told["max-status-checks-per-second"] >= 600  # 2
    assert told["retries"]  # 3, and in no rule
    assert "slurm-array-jobs" not in told  # 4
    assert told["slurm-requeue"]  # 5
    # 6: three times as long must be less than MinJobAge, or the plugin asks sacct after all.
    assert 3 * told.get("slurm-init-seconds-before-status-checks", 40) <= 300
    files = [ROOT / "Snakefile", *(ROOT / "workflow" / "rules").glob("*.smk")]
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    used = re.findall(r"^ *(retries|group|slurm_extra|gpus|nvidia_gpu|gres)\b *[:=]", text, re.M)
    assert not used  # 3, 9, 10


def test_the_tests_that_the_pitfalls_name_are_there() -> None:
    """And those of the faults; and all pitfalls have a line."""
    docs = [ROOT / "docs" / name for name in ("design/slurm.md", "cluster.md")]
    told = "".join(path.read_text(encoding="utf-8") for path in docs)
    tests = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")
    )
    names = set(re.findall(r"`(test_\w+)`", told))
    assert names
    assert not [name for name in names if f"def {name}(" not in tests]
    assert re.findall(r"^\| (\d+) \|", told, re.M) == [str(line) for line in range(1, 22)]


def test_another_site_is_named_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin reads the variable only where the profile names no file."""

    def partitions() -> str:
        return str(told_options("--profile", "slurm", "--dry-run").slurm_partition_config)

    monkeypatch.delenv("SNAKEMAKE_SLURM_PARTITIONS", raising=False)
    assert (ROOT / partitions()).resolve() == ROOT / "profiles" / "slurm" / "partitions.yaml"
    monkeypatch.setenv("SNAKEMAKE_SLURM_PARTITIONS", "/etc/site.yaml")
    assert partitions() == "/etc/site.yaml"


@pytest.mark.parametrize("study", STUDIES)
def test_what_is_submitted_to_slurm(plan: Plan, study: str) -> None:
    """Every job that is not local, and no other, asks for what golden/sbatch.txt has.

    If sizes were changed on purpose: golden/make_sbatch.py writes it, and somebody reads it.
    """
    golden = GOLDEN.read_text(encoding="utf-8").splitlines()
    told = golden_lines(study, plan(study, "slurm"))
    assert told == [line for line in golden if line.startswith(f"{study}: ")]


def test_golden_sbatch_lines_are_of_studies_that_there_are() -> None:
    golden = GOLDEN.read_text(encoding="utf-8").splitlines()
    assert sorted({line.split(":", 1)[0] for line in golden}) == STUDIES


def test_a_dry_run_shows_the_sizes() -> None:
    """Before anything is submitted: GPUs, memory, time, cores and disk of every job."""
    told = _snakemake("--profile", "slurm", "--config", "study=tofu-llama-2-7b")
    assert told.returncode == 0, told.stderr
    printed = told.stdout + told.stderr
    full = re.findall(r"Job \d+: Fine-tune full, seed \d \((.*)\)", printed)
    assert len(full) == 3
    for size in ("gpu=4", "nodes=1", "mem_mb=", "runtime=", "cpus_per_task=32", "disk_mb="):
        assert all(size in sizes for sizes in full)


@pytest.mark.parametrize("study", ["mini", "biderman-math-cpt"])
def test_dry_run_prints_at_most_10_lines_a_job(study: str) -> None:
    done = _snakemake("--config", f"study={study}")
    assert done.returncode == 0, done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) <= 10 * sum(JOBS[study].values())
    assert not [line for line in lines if '{"' in line]


def test_a_job_that_is_tried_again_asks_for_more(plan: Plan) -> None:
    """It may have ended for want of memory or of time; the site's limits are not passed."""
    for job in plan("tofu-phi-1.5", "slurm"):
        if job.rule.name in ("finetune", "benchmark", "evaluate_base"):
            first = dict(job.resources.items())
            job.attempt = 2
            second = dict(job.resources.items())
            job.attempt = 1
            assert second["mem_mb"] == pytest.approx(1.5 * first["mem_mb"], abs=2)
            assert second["runtime"] == 2 * first["runtime"]
            assert second["gpu"] == first["gpu"]


def test_a_site_of_other_machines_changes_what_is_asked(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of a site stands in the rules: smaller GPUs are more of them, and longer."""
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


def test_a_method_too_large_for_the_gpus_is_told_when_it_is_planned(tmp_path: Path) -> None:
    """Before anything waits in a queue; where all fit, nothing is said."""
    site = tmp_path / "site.yaml"
    site.write_text("machines: {device: L40S, count: 1, gpus: 1, cpus: 16, memory_gb: 500}\n")
    fits = _snakemake("--config", "study=tofu-llama-2-7b")
    assert "smaller rank" not in fits.stdout + fits.stderr
    told = _snakemake(*("--config", "study=tofu-llama-2-7b"), SNAKEMAKE_SLURM_PARTITIONS=str(site))
    assert told.returncode == 0, told.stderr
    told_of = told.stdout + told.stderr
    lines = [line for line in told_of.splitlines() if "or a smaller rank or batch" in line]
    assert any(line.startswith("full: needs ") and "L40S has " in line for line in lines)


def test_processes_may_be_spread_over_nodes(plan: Plan, tmp_path: Path) -> None:
    """All GPUs of two machines; the job itself starts what runs on both, with no srun before it."""
    path = ROOT / "config" / "studies" / "mini.yaml"
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    document["methods"][-1] |= {"processes": 16, "nodes": 2}
    wide = tmp_path / "wide.yaml"
    wide.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
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


def test_more_processes_train_nothing_again(plan: Plan, tmp_path: Path) -> None:
    """They change no number, so no job is told of them in what decides whether it is run again."""
    path = ROOT / "config" / "studies" / "mini.yaml"
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    document["methods"][-1]["processes"] = 2
    wider = tmp_path / "wider.yaml"
    wider.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    before, after = (
        {(job.rule.name, *job.wildcards): job for job in plan(study, "slurm")}
        for study in ("mini", wider)
    )
    assert after["finetune", "full", "0"].resources["gpu"] == 2
    assert before["finetune", "full", "0"].resources["gpu"] == 1
    for key, job in after.items():
        if key[0] not in ("make_tables", "report", "all"):
            told = str(dict(job.params.items())).replace("/wider", "/mini")
            assert told == str(dict(before[key].params.items())), key


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
def test_a_mistake_is_one_message_and_status_1(
    tmp_path: Path, change: str, options: list[str], expected: str
) -> None:
    """No traceback, no jobs: file and line or key, what was expected."""
    if change:
        path = ROOT / "config" / "studies" / "mini.yaml"
        head, rest = path.read_text(encoding="utf-8").split("\n", 1)
        (tmp_path / "mine.yaml").write_text(f"{head}\n{change}\n{rest}", encoding="utf-8")
        options = [f"study={tmp_path / 'mine.yaml'}"]
    done = _snakemake("--config", *options)
    assert done.returncode == 1
    told = done.stdout + done.stderr
    assert told.count(expected) == 1, told
    assert "Traceback" not in told
    assert "Job stats" not in told


def test_the_bare_command_plans_the_default_study() -> None:
    """`rule all` in an included file would be no default target: nothing done, status 0."""
    done = _snakemake("--forceall")
    assert done.returncode == 0, done.stderr
    counts = re.findall(r"^(\w+) +(\d+)$", done.stdout + done.stderr, re.MULTILINE)
    assert {rule: int(count) for rule, count in counts} == JOBS["mini"] | {
        "total": sum(JOBS["mini"].values())
    }


def test_the_slurm_command_needs_no_slurm_to_plan(tmp_path: Path) -> None:
    """In a copy of the checkout, as continuous integration runs it, with no SLURM in the path."""
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
