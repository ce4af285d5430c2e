"""A study with hundreds of methods: no command exceeds the limit of the system."""

from __future__ import annotations

import subprocess
from pathlib import Path

import yaml

from forgetting.config.job_params import MakeTablesParams
from forgetting.pipeline.params import StudyParams
from forgetting.pipeline.paths import Paths
from forgetting.study.load import load_study
from support.snakemake import ROOT, planned, restore_process


def _long_study(folder: Path, entries: int) -> Path:
    """Write the study `mini` with many methods, all of them benchmarked."""
    path = ROOT / "config" / "studies" / "mini.yaml"
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    document["methods"] = [
        document["methods"][0] | {"suffix": f"entry{number:03d}"} for number in range(entries)
    ]
    document["selection"]["wise_ft"] = [0.5]
    document["benchmarks"]["tasks"] = {"arc_challenge": {}}
    long = folder / "long.yaml"
    long.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return long


def test_commands_of_hundreds_of_methods_are_short(tmp_path: Path) -> None:
    """Linux refuses an argument of 128 KiB, and a job's command is one argument."""
    path = _long_study(tmp_path, 420)
    with restore_process():
        jobs = {job.rule.name: job for job in planned(tmp_path, path)}
    for name in (
        "make_tables",
        "report",
        "prepare_data",
        "finetune",
        "select_checkpoint",
        "benchmark",
    ):
        subprocess.run(["bash", "-n", "-c", jobs[name].shellcmd], check=True)
    name, study = load_study({"study": str(path)}, tmp_path)
    params = StudyParams(study, name, Paths(study, name)).of("make_tables", {})
    text = params.model_dump_json()
    assert len(text) > 2**17
    assert MakeTablesParams.model_validate_json(text) == params


def test_tables_use_the_parameters_of_the_plan(tmp_path: Path) -> None:
    """The file of the study changes while jobs run."""
    path = _long_study(tmp_path, 2)
    name, study = load_study({"study": str(path)}, tmp_path)
    params = StudyParams(study, name, Paths(study, name))
    params.paths.results = str(tmp_path / "results")
    params.write("make_tables", None)
    _long_study(tmp_path, 3)
    read = MakeTablesParams.read(tmp_path / "results" / "params" / "make_tables.json")
    assert (read.name, len(read.study.methods)) == ("long", 2)
