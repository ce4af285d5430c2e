"""Which jobs run again after a change of sandbox, template or code."""

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
# Each starts Snakemake several times.
pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return run(option, ..., bwrap=...), which runs Snakemake in a checkout for its output.

    PATH has the programs of the rules, and bubblewrap only with `bwrap`.
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
def test_programs_run_once_a_sandbox_is_installed(run: Run, tmp_path: Path) -> None:
    """Outcomes from a sandbox are kept if bubblewrap is removed."""
    one = Program("humaneval", "made/0", 0, 0, "x = 1", "assert x == 1")
    write_json(tmp_path / "results/mini/benchmarks/base/programs.json", describe([one]))
    target = (OUTCOMES, "--allowed-rules", "run_programs")
    run(*target)
    assert read_json(tmp_path / OUTCOMES)["sandbox"] is None
    assert NOTHING in run("-n", *target)

    output = run("-n", *target, bwrap=True)
    assert "Run the programs of base" in output and "Params have changed" in output
    run(*target, bwrap=True)
    outcomes = read_json(tmp_path / OUTCOMES)
    assert outcomes["sandbox"] and outcomes["outcomes"][0]["status"] == "passed"
    assert NOTHING in run("-n", *target, bwrap=True)
    assert NOTHING in run("-n", *target)


def test_changed_template_reruns_the_report(run: Run, tmp_path: Path) -> None:
    """A change of template or style sheet reruns the report."""
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
"""A function that another module imports, and its new name."""


@pytest.fixture
def finished(run: Run, tmp_path: Path, base_folder: Path) -> Run:
    """Return run(option, ...), which plans a study that seems to be finished."""
    write_files(tmp_path, base_folder)
    with restore_process():
        pretend_finished(tmp_path, "study.yaml")
    assert NOTHING in run("-n", "--config", "study=study.yaml")
    return lambda *options: run("-n", "--config", "study=study.yaml", *options)


def test_renaming_and_formatting_rerun_nothing(finished: Run, tmp_path: Path) -> None:
    """Library, programs and rules are changed."""
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
def test_changed_default_reruns_what_reads_it(
    finished: Run, tmp_path: Path, file: str, old: str, new: str
) -> None:
    """The study does not set the key, which is one of training, method or mitigation."""
    path = tmp_path / "workflow" / "forgetting" / "config" / f"{file}.py"
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    planned = finished()
    assert "Fine-tune" in planned and "prepare the tables" not in planned
