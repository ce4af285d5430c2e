"""A study of hundreds of entries: no job's command is longer than what the system starts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from forgetting.errors import InputError
from forgetting.io import content_key
from forgetting.study.load import load_study
from scripts.make_tables import resolved
from support.snakemake import ROOT, planned, undone


def _long(folder: Path, entries: int) -> Path:
    """The study `mini` with so many separate entries of one rank each, all of them scored."""
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
    study = _long(tmp_path, 420)
    with undone():
        jobs = {job.rule.name: job for job in planned(tmp_path, study)}
    for name in (
        "make_tables",
        "report",
        "prepare_data",
        "finetune",
        "select_checkpoint",
        "benchmark",
    ):
        subprocess.run(["bash", "-n", "-c", jobs[name].shellcmd], check=True)
    (digest,) = {str(jobs["make_tables"].params.digest)}
    asked = json.loads(jobs["make_tables"].params.asked)
    name, found = resolved(asked, digest)
    assert (name, len(found.methods)) == ("long", 420)
    assert len(found.model_dump_json()) > 2**17


def test_a_study_that_was_changed_meanwhile_is_not_gathered(tmp_path: Path) -> None:
    """Its jobs trained something else than the tables would tell."""
    study = _long(tmp_path, 2)
    asked = {"study": str(study)}
    digest = content_key(load_study(asked, tmp_path)[1].model_dump(mode="json"))
    assert resolved(asked, digest)[0] == "long"
    _long(tmp_path, 3)
    with pytest.raises(InputError, match="was changed while jobs ran; give the same command again"):
        resolved(asked, digest)
