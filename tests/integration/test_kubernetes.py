"""profiles/kubernetes: the plan, the requests of pods, and a study through the plugin's code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import yaml
from snakemake.jobs import Job

from support.slurm import NAME, RESULTS, STUDY, Folder
from support.snakemake import GOLDEN, ROOT, STUDIES, local_rules, planned, restore_process

PROFILE = "profiles/kubernetes"
CLUSTER = ROOT / "tests" / "support" / "kubernetes.py"
ABSENT = [
    name
    for name in ("snakemake_executor_plugin_kubernetes", "snakemake_storage_plugin_fs")
    if find_spec(name) is None
]
pytestmark = pytest.mark.skipif(
    bool(ABSENT), reason=f"no {', '.join(ABSENT)}: pip install -r envs/kubernetes.txt"
)
VARIABLE = "SNAKEMAKE_SLURM_PARTITIONS"
TOO_WIDE = ("biderman-code-cpt", "biderman-math-cpt")


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use the nodes of the profile in any folder."""
    with restore_process():
        monkeypatch.setenv(VARIABLE, str(ROOT / PROFILE / "nodes.yaml"))
        yield


def _dry_run(study: str) -> subprocess.CompletedProcess[str]:
    environment = {key: os.environ[key] for key in os.environ if not key.startswith("SNAKEMAKE")}
    options = ("-n", "--nolock", "--profile", PROFILE, "--config", f"study={study}")
    return subprocess.run(
        [sys.executable, "-m", "snakemake", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_profile_kubernetes_plans_without_a_cluster() -> None:
    """The profile names its file of nodes."""
    done = _dry_run("tofu-llama-2-7b")
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    full = re.findall(r"Job \d+: Fine-tune full, seed \d \((.*)\)", printed)
    assert len(full) == 3
    for size in ("gpu=4", "cpus_per_task=32"):
        assert all(size in sizes for sizes in full)


def test_pods_get_nvidia_gpus_and_limits() -> None:
    """Kubernetes refuses a request for GPUs without a limit."""
    profile = yaml.safe_load((ROOT / PROFILE / "profile.yaml").read_text("utf-8"))
    assert profile["default-resources"]["gpu_manufacturer"] == "'nvidia'"
    assert profile["default-resources"]["scale"] == 0
    assert profile["default-storage-provider"] == "fs"


@pytest.mark.parametrize("study", TOO_WIDE)
def test_job_on_several_machines_is_refused(study: str) -> None:
    """The plugin would start one machine, which would wait forever for the others."""
    done = _dry_run(study)
    output = done.stdout + done.stderr
    assert done.returncode == 1
    assert output.count("a job on Kubernetes has one machine") == 1, output
    assert re.search(r"methods: \S+ needs \d+ GPUs on \d+ machines", output)
    assert "Traceback" not in output
    assert "Job stats" not in output


def test_no_key_is_in_both_profiles() -> None:
    """A key in profiles/default would silently override this profile."""
    keys = [
        set(yaml.safe_load((ROOT / "profiles" / profile / "profile.yaml").read_text("utf-8")))
        for profile in ("default", "kubernetes")
    ]
    local = yaml.safe_load((ROOT / "profiles" / "default" / "profile.yaml").read_text("utf-8"))
    conditional = {key for name in local if name.startswith("?if") for key in local[name]}
    assert not [key for key in (keys[0] | conditional) & keys[1] if not key.startswith("__")]


class _Submitting:
    """The plugin's executor with a client that stores the jobs."""

    def __init__(self) -> None:
        from snakemake_executor_plugin_kubernetes import Executor, PersistentVolume

        self.made: list[Any] = []
        self.executor = object.__new__(Executor)
        vars(self.executor).update(
            workflow=SimpleNamespace(),
            logger=SimpleNamespace(debug=lambda *_: None, info=lambda *_: None),
            format_job_exec=lambda job: "true",
            report_job_submission=lambda *_: None,
            _kubernetes_retry=lambda call: call(),
            batchapi=SimpleNamespace(create_namespaced_job=lambda _, body: self.made.append(body)),
            run_namespace="run",
            namespace="default",
            container_image="image",
            privileged=False,
            k8s_cpu_scalar=0.95,
            k8s_service_account_name="lora-forgetting",
            persistent_volumes=[PersistentVolume.parse("lora-forgetting:/study")],
            secret_envvars={},
        )

    def pod(self, job: Job) -> dict[str, Any]:
        """Return the specification of the pod of a job."""
        import kubernetes.client

        self.executor.run_job(job)
        spec = kubernetes.client.ApiClient().sanitize_for_serialization(self.made.pop())
        return dict(spec["spec"]["template"]["spec"])


def _of_slurm(study: str) -> dict[str, dict[str, int]]:
    """Return memory, cores and GPUs that SLURM gives each kind of job."""
    found = {}
    for line in GOLDEN.read_text(encoding="utf-8").splitlines():
        name, kind, options = line.split(": ", 2)
        if name == study:
            found[kind] = {
                key: int(value)
                for key, value in re.findall(r"--(mem|cpus-per-task|gpus)[ =](\d+)", options)
            }
    return found


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize("study", [study for study in STUDIES if study not in TOO_WIDE])
def test_pods_request_what_slurm_jobs_do(study: str, tmp_path: Path) -> None:
    """GPUs, cores and memory are requests and limits; Kubernetes needs both for GPUs."""
    submitting, expected, seen = _Submitting(), _of_slurm(study), set()
    for job in planned(tmp_path, study, PROFILE):
        if job.rule.name in ("all", *local_rules()):
            continue
        named = [job.wildcards.get(name) for name in ("method", "duration")]
        kind = " ".join(filter(None, [job.rule.name, *named]))
        pod = submitting.pod(job)
        (container,) = pod["containers"]
        requests, limits = (container["resources"][name] for name in ("requests", "limits"))
        wanted = expected[kind]
        assert limits["cpu"] == f"{1000 * wanted['cpus-per-task']}m", kind
        assert requests["cpu"] == f"{int(0.95 * wanted['cpus-per-task'] * 1000)}m", kind
        assert requests["memory"] == limits["memory"] == f"{wanted['mem']}M", kind
        gpus = str(wanted["gpus"]) if "gpus" in wanted else None
        assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu") == gpus, kind
        assert bool(pod.get("tolerations")) == (gpus is not None), kind
        assert limits["ephemeral-storage"] == requests["ephemeral-storage"]
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/study", "/workdir"}
        seen.add(kind)
    assert seen == expected.keys()


@pytest.mark.usefixtures("site")
def test_disk_of_a_pod_has_no_training_checkpoints(tmp_path: Path) -> None:
    """Checkpoints of full fine-tuning of 7 billion weights are on the volume."""
    for job in planned(tmp_path, "tofu-llama-2-7b", PROFILE):
        if job.rule.name == "finetune":
            assert job.resources["disk_mb"] < 10_000
        if job.rule.name == "benchmark" and job.wildcards.method == "full":
            assert job.resources["disk_mb"] > 3 * 4 * 6_700  # three seeds of 27 GB are copied


# --- a study whose pods are processes of this machine --------------------------------------------


@pytest.fixture
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the checkout with a study, which serves as the volume."""
    for program in ("git", "rsync"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program}, which Snakemake copies files with")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    if files.returncode:
        pytest.skip("not a git checkout, from which Snakemake would send its files")
    folder = tmp_path_factory.mktemp("volume") / "study"
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run(["git", "add", "--all"], cwd=folder, check=True)
    study = STUDY | {"training": STUDY["training"] | {"epochs": 4}}
    (folder / f"{NAME}.yaml").write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return folder


def _run(checkout: Path, pods: Path, *targets: str) -> subprocess.CompletedProcess[str]:
    """Run Snakemake to its end as on a cluster."""
    (pods / "bin").mkdir(parents=True, exist_ok=True)
    pip = pods / "bin" / "pip"  # the image has all packages
    pip.write_text("#!/bin/sh\nexit 0\n")
    pip.chmod(0o755)
    path = os.pathsep.join(
        [str(pods / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    environment = {"PATH": path, "HOME": os.environ["HOME"], "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [
            *(sys.executable, "-P", str(CLUSTER), str(pods), *targets),
            *("--profile", PROFILE, "--config", f"study={NAME}.yaml"),
            *("--jobs", "1", "--latency-wait", "5", "--seconds-between-status-checks", "1"),
            *("--remote-job-local-storage-prefix", str(pods / "disk")),
        ],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=580,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("site")
def test_study_in_pods_equals_local_run(checkout: Path, tmp_path: Path) -> None:
    """Sources, variables and copied files reach the pods, and the numbers equal a local run's."""
    done = _run(checkout, tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
    assert (checkout / "reports" / "tradeoff.html").is_file()
    rules = {
        re.search(r"--allowed-rules (\w+)", path.read_text()).group(1)  # type: ignore[union-attr]
        for path in (tmp_path / "specs").glob("*.json")
    }
    assert rules == {"pretrain_base", "evaluate_base", "finetune", "benchmark", "benchmark_base"}
    limits = {
        json.loads(path.read_text())["spec"]["template"]["spec"]["containers"][0]["resources"][
            "limits"
        ]["cpu"]
        for path in (tmp_path / "specs").glob("*.json")
    }
    assert limits == {"8000m"}
    # The nodes of the profile give local jobs as many threads as pods have.
    alone = tmp_path / "local"
    alone.mkdir()
    local = Folder(alone, checkout / f"{NAME}.yaml")
    local.run(str(RESULTS / "tables" / "study.json"), profile=None)
    for name in ("trajectory", "items", "selection", "benchmarks"):
        ours, theirs = (
            pd.read_parquet(at / RESULTS / "tables" / f"{name}.parquet") for at in (checkout, alone)
        )
        assert len(ours)
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True, obj=name)


@pytest.mark.slow
def test_failed_pod_stops_snakemake_and_a_restart_resumes(checkout: Path, tmp_path: Path) -> None:
    """Pitfall 1 of docs/kubernetes.md: the plugin requests a log that does not exist."""
    target = str(RESULTS / "runs" / "full" / "seed0" / "runs.json")
    program = checkout / "workflow" / "scripts" / "finetune.py"
    whole = program.read_text(encoding="utf-8")
    try:
        program.write_text("raise SystemExit(3)\n", encoding="utf-8")
        failed = _run(checkout, tmp_path / "first", target)
    finally:
        program.write_text(whole, encoding="utf-8")
    assert failed.returncode != 0
    specs = list((tmp_path / "first" / "specs").glob("*.json"))
    tried = [path for path in specs if "--allowed-rules finetune" in path.read_text()]
    assert len(tried) == 1  # `retries` has no effect
    again = _run(checkout, tmp_path / "second", target)
    assert again.returncode == 0, again.stdout[-6000:]
    assert json.loads((checkout / target).read_text(encoding="utf-8"))[0]["status"] == "ok"
