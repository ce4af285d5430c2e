"""Values of a study, a folder or a wildcard are never executed by a shell."""

from __future__ import annotations

import json
import os
import re
import shutil
import string
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import snakemake.utils
from snakemake.iocontainers import Namedlist
from snakemake.rules import Rule

from forgetting.config.job_params import PrepareDataParams
from forgetting.errors import InputError
from forgetting.pipeline.params import StudyParams
from forgetting.pipeline.paths import Paths
from forgetting.study.load import load_study
from support.snakemake import ROOT, planned, restore_process

HOSTILE = {
    "substitution": "$(touch pwned)",
    "backticks": "`touch pwned`",
    "next command": ";touch pwned;",
    "pipe": "|touch pwned|",
    "background": "& touch pwned &",
    "redirection": ">pwned",
    "double quote": '";touch pwned;"',
    "single quote": "';touch pwned;'",
    "newline": "a\ntouch pwned\nb",
    "carriage return": "a\rtouch pwned",
    "backslash": "\\';touch pwned;'",
    "variable": "${IFS}$HOME",
    "braces": "{touch,pwned}",
    "Snakemake's braces": "{params} {{wildcards}}",
    "pattern": "* [a-z]?",
    "option": "--output=pwned",
    "home": "~",
    "comment": "# not seen",
    "history": "!!",
}
LISTS = ("input", "output", "params", "wildcards", "resources", "log")
# Replaces every program and records its arguments.
STUB = '#!/bin/bash\nprintf "%s\\0" "$@" >> "$ARGUMENTS"\n'


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rule]:
    """Return all rules of the workflow by name; two studies have all of them."""
    found: dict[str, Rule] = {}
    with restore_process():
        for study in ("mini", "tofu-phi-1.5"):
            jobs = planned(tmp_path_factory.mktemp(study), study)
            found |= {rule.name: rule for rule in jobs[0].rule.workflow.rules}
    return found


def _fields(shell: str) -> Iterator[tuple[str, str | None]]:
    """Yield the fields of a shell block, such as `params`, `spec` for `params.spec`."""
    for _, field, _, _ in string.Formatter().parse(shell):
        if field is not None:
            part, _, name = field.partition(".")
            yield part, name or None


def _filled(rule: Rule, hostile: str, folder: Path) -> tuple[str, list[str]]:
    """Return the command as Snakemake formats it, and the values that it holds."""
    given: dict[str, dict[str | None, str]] = {}
    for number, (part, name) in enumerate(_fields(rule.shellcmd)):
        # The workflow names the folders of logs and outputs.
        path = f"{folder}/" if part in ("log", "output") else ""
        value = f"{path}{hostile}{number}"
        given.setdefault(part, {}).setdefault(name, value)
    variables: dict[str, object] = {}
    for part, values in given.items():
        if part not in LISTS:
            variables[part] = values[None]
        elif None in values:
            variables[part] = Namedlist([values[None]])
        else:
            variables[part] = Namedlist(fromdict=values)
    command = snakemake.utils.format(rule.shellcmd, **variables)
    return command, [v for part, values in given.items() if part != "log" for v in values.values()]


def test_two_studies_have_every_rule(rules: dict[str, Rule]) -> None:
    """The other tests cover every rule."""
    text = "".join(path.read_text() for path in (ROOT / "workflow" / "rules").glob("*.smk"))
    written = re.findall(r"^ *(?:use )?rule (?:\w+ as )?(\w+)(?: with)?:$", text, re.MULTILINE)
    assert set(written) == set(rules) - {"all"}
    assert all(rule.shellcmd for name, rule in rules.items() if name != "all")


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_values_reach_every_program_unchanged(
    kind: str, rules: dict[str, Rule], tmp_path: Path
) -> None:
    """Each value is within one argument of the program, or names the file that is written."""
    tools, work, out = (tmp_path / name for name in ("tools", "work", "out"))
    for folder in (tools, work, out):
        folder.mkdir()
    (tools / "python").write_text(STUB)
    (tools / "python").chmod(0o755)
    for name, rule in rules.items():
        if not rule.shellcmd:
            continue
        command, values = _filled(rule, HOSTILE[kind], out)
        arguments = tmp_path / f"{name}.arguments"
        done = subprocess.run(
            ["bash", "-c", f"set -euo pipefail; {command}"],
            cwd=work,
            env=os.environ
            | {
                "PATH": f"{tools}:{os.environ['PATH']}",
                "ARGUMENTS": str(arguments),
                "SCRIPTS": "scripts",
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{name}: {done.stderr}\n{command}"
        assert not list(work.iterdir()), f"{name} ran the value as a command:\n{command}"
        given = arguments.read_bytes().decode().split("\0")
        written = {path.read_bytes().decode().removesuffix("\n") for path in _files(out)}
        for value in values:
            whole = any(value in argument for argument in given)
            assert whole or value in written or Path(value).exists(), f"{name}: {value}\n{command}"


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_every_field_of_a_shell_block_is_quoted(rules: dict[str, Rule]) -> None:
    """Numbers are quoted too."""
    for name, rule in rules.items():
        for _, field, form, _ in string.Formatter().parse(rule.shellcmd or ""):
            assert field is None or form == "q", f"{name}: {{{field}}} lacks :q"


HOSTILE_FOLDER = "-a 'b' \"c\" $(touch pwned) `touch pwned` ;touch pwned; *"


def test_folder_may_have_any_name(tmp_path: Path) -> None:
    """Snakemake plans the study, and the parameters have the folder unchanged."""
    studies = ROOT / "config" / "studies"
    shutil.copytree(studies / "own-data", tmp_path / HOSTILE_FOLDER)
    written = (studies / "own-data.yaml").read_text()
    named = re.sub(r"folder: [^,}\n]+", lambda _: f"folder: {json.dumps(HOSTILE_FOLDER)}", written)
    assert named != written
    (tmp_path / "mine.yaml").write_text(named)
    with restore_process():
        os.chdir(tmp_path)
        jobs = planned(tmp_path, "mine.yaml")
        (command,) = {job.shellcmd for job in jobs if job.rule.name == "prepare_data"}
        name, study = load_study({"study": "mine.yaml"}, studies)
        params = StudyParams(study, name, Paths(study, name)).of("prepare_data", {})
    assert "pwned" not in command
    assert isinstance(params, PrepareDataParams)
    files = [path for path in params.tables.values() if "world" not in path.parts]
    assert files
    assert all(str(path.parent) == HOSTILE_FOLDER for path in files)


@pytest.mark.parametrize("target", ["report", "plan", "status"])
def test_variables_of_make_are_not_executed(target: str, tmp_path: Path) -> None:
    """STUDY is one word. CONFIG is several words, which may be quoted; a quote must be closed."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for program in ("python", "snakemake"):
        (tools / program).write_text(STUB)
        (tools / program).chmod(0o755)
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "requirements.txt").touch()
    (tmp_path / ".venv" / "ready").touch()
    arguments = tmp_path / "arguments"

    def make(**variables: str) -> int:
        arguments.unlink(missing_ok=True)
        given = [f"{name}={value}" for name, value in variables.items()]
        return subprocess.run(
            ["make", target, *given],
            cwd=tmp_path,
            env=os.environ | {"ARGUMENTS": str(arguments)},
            capture_output=True,
            check=False,
        ).returncode

    for hostile in ("a;touch pwned;", "`touch pwned`", "' \";touch pwned;", "a\ntouch pwned", "*"):
        assert make(STUDY=hostile, CONFIG="tofu_dir='my data' scale=tiny") == 0
        given = arguments.read_text().split("\0")[:-1]
        assert given[-3:] == [f"study={hostile}", "tofu_dir=my data", "scale=tiny"]
        make(CONFIG=f"x_dir={hostile}")
        assert not (tmp_path / "pwned").exists()
    assert make(CONFIG="tofu_dir='my data") != 0
    assert not arguments.exists()
    assert make() == 0


def test_braces_in_a_folder_are_refused(tmp_path: Path) -> None:
    """Snakemake reads `{seed}` in any path as a wildcard."""
    folder = tmp_path / "of {seed}"
    folder.mkdir()
    studies = ROOT / "config" / "studies"
    for option in ("own_dir", "model"):
        with pytest.raises(InputError) as error:
            load_study({"study": "own-data", option: str(folder)}, studies)
        assert str(error.value).startswith(f"--config {option}={folder}: Snakemake reads {{ and }}")
