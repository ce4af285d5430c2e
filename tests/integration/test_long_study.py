"""A study of hundreds of entries: no job's command is longer than what the system starts."""

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
    """Write the study `mini` with separate entries of one rank each, all of them scored."""
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


def test_hundreds_of_entries_are_gathered(tmp_path: Path) -> None:
    """Linux starts no program with an argument of 128 KiB, and a job's command is one argument."""
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


def test_tables_are_of_the_study_that_was_planned(tmp_path: Path) -> None:
    """Although its file is changed while jobs run."""
    path = _long_study(tmp_path, 2)
    name, study = load_study({"study": str(path)}, tmp_path)
    params = StudyParams(study, name, Paths(study, name))
    params.paths.results = str(tmp_path / "results")
    params.write("make_tables", None)
    _long_study(tmp_path, 3)
    read = MakeTablesParams.read(tmp_path / "results" / "params" / "make_tables.json")
    assert (read.name, len(read.study.methods)) == ("long", 2)
