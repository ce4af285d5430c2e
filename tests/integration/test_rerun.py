"""What runs again when something beside the data changes: a sandbox, a template, the code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from forgetting.benchmarks.programs import Program, describe
from forgetting.benchmarks.sandbox import search_sandbox
from forgetting.io import read_json, write_json
from forgetting.pipeline.paths import Paths
from forgetting.study.load import load_study
from support.snakemake import pretend_finished, restore_process
from support.user_files import write_files

ROOT = Path(__file__).resolve().parents[2]
OUTCOMES = "results/mini/benchmarks/base/outcomes.json"
NOTHING = "Nothing to be done"
Run = Callable[..., str]
# Each starts snakemake half a dozen times.
pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """run(option, ..., bwrap=...) -> what snakemake says, in a checkout of links.

    The path has what the rule needs, and bubblewrap only where the call says so.
    """
    for name in ("Snakefile", "config", "profiles", "envs"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "workflow", tmp_path / "workflow")
    folders = {True: tmp_path / "with", False: tmp_path / "without"}
    for installed, folder in folders.items():
        folder.mkdir()
        for tool in ("bash", "sh", "env", "tee", "which", *(["bwrap"] if installed else [])):
            if found := shutil.which(tool):
                (folder / tool).symlink_to(found)
    environment = {key: v for key, v in os.environ.items() if not key.startswith("SNAKEMAKE")}

    def snakemake(*options: str, bwrap: bool = False) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "snakemake", *options],
            cwd=tmp_path,
            env=environment | {"PATH": f"{Path(sys.executable).parent}:{folders[bwrap]}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return snakemake


@pytest.mark.skipif(search_sandbox()[0] is None, reason=f"no sandbox: {search_sandbox()[1]}")
def test_programs_that_no_sandbox_ran_are_run_when_there_is_one(run: Run, tmp_path: Path) -> None:
    """And not otherwise: what was run stays when bubblewrap is gone, or was only elsewhere."""
    one = Program("humaneval", "made/0", 0, 0, "x = 1", "assert x == 1")
    write_json(tmp_path / "results/mini/benchmarks/base/programs.json", describe([one]))
    asked = (OUTCOMES, "--allowed-rules", "run_programs")
    run(*asked)
    assert read_json(tmp_path / OUTCOMES)["sandbox"] is None
    assert NOTHING in run("-n", *asked)

    told = run("-n", *asked, bwrap=True)
    assert "Run the programs of base" in told and "Params have changed" in told
    run(*asked, bwrap=True)
    outcomes = read_json(tmp_path / OUTCOMES)
    assert outcomes["sandbox"] and outcomes["outcomes"][0]["status"] == "passed"
    assert NOTHING in run("-n", *asked, bwrap=True)
    assert NOTHING in run("-n", *asked)


def test_a_changed_template_renders_the_page_again(run: Run, tmp_path: Path) -> None:
    """Every character of a template may be on the page."""
    name, study = load_study({"study": "mini"}, ROOT / "config" / "studies")
    paths = Paths(study, name)
    for path in [*paths.tables, paths.tables_file("study.json"), paths.page]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / paths.figures).mkdir()
    report = ("reports/mini.html", "--allowed-rules", "report")
    run("--touch", "--force", *report)
    for name in ("page.html.j2", "page.css"):
        template = tmp_path / "workflow" / "forgetting" / "report" / "templates" / name
        text = template.read_text(encoding="utf-8")
        template.write_text(text + "\n", encoding="utf-8")
        assert "Params have changed" in run("-n", *report)
        template.write_text(text, encoding="utf-8")
    assert NOTHING in run("-n", *report)


RENAMED = ("forgetting/training/optimizer.py", "make_optimizer", "create_optimizer")
"""A function, which another module imports."""


@pytest.fixture
def finished(run: Run, tmp_path: Path, base_folder: Path) -> Run:
    """run(option, ...) -> what snakemake says where a study seems to be finished."""
    write_files(tmp_path, base_folder)
    with restore_process():
        pretend_finished(tmp_path, "study.yaml")
    assert NOTHING in run("-n", "--config", "study=study.yaml")
    return lambda *options: run("-n", "--config", "study=study.yaml", *options)


def test_renaming_and_formatting_rerun_nothing(finished: Run, tmp_path: Path) -> None:
    """Of the library, of the programs and of the rules."""
    library = tmp_path / "workflow"
    file, old, new = RENAMED
    renamed = [path for path in library.rglob("*.py") if old in path.read_text(encoding="utf-8")]
    assert library / file in renamed and len(renamed) > 1
    for path in renamed:
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    for path in [*library.glob("scripts/*.py"), *library.glob("forgetting/*/*.py")]:
        path.write_text(path.read_text(encoding="utf-8") + "\n\n# A comment.\n", encoding="utf-8")
    rules = library / "rules" / "finetune.smk"
    text = rules.read_text(encoding="utf-8")
    assert "            --state {params.state:q} \\\n" in text
    rules.write_text(text.replace("            --state", "                --state"), "utf-8")
    assert NOTHING in finished()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        (
            "training",
            'Field(\n        1.0, description="Maximum L2',
            'Field(\n        0.5, description="Maximum L2',
        ),
        ("methods", "] = Field([0.0],", "] = Field([0.1],"),
        ("mitigations", '] = Field(\n        "all",', '] = Field(\n        "replay",'),
    ],
)
def test_a_changed_default_reruns_what_reads_it(
    finished: Run, tmp_path: Path, file: str, old: str, new: str
) -> None:
    """Though the study does not name it: of the training, of a setting and of a mitigation."""
    path = tmp_path / "workflow" / "forgetting" / "config" / f"{file}.py"
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    planned = finished()
    assert "Fine-tune" in planned and "prepare the tables" not in planned
