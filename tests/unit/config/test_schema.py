"""The generated JSON Schema and config/README.md agree with the classes and the studies."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from forgetting.config.schema import generated_files, json_schema, main, readme
from forgetting.config.study import StudyConfig

ROOT = Path(__file__).resolve().parents[3]
STUDIES = sorted((ROOT / "config" / "studies").glob("*.yaml"))
SCHEMA = ROOT / "config" / "schema.json"


def _document(**changes: Any) -> dict[str, Any]:
    """Return a study with only the required keys."""
    least: dict[str, Any] = {
        "title": "Least",
        "datasets": {"own": {"folder": "somewhere"}},
        "base": {"model": "somewhere"},
        "train": "own/new",
        "probes": {"new": {"table": "own/new", "knowledge": "new"}},
        "methods": [{"method": "lora", "rank": 8, "learning_rate": 1e-3}],
        "selection": {"probe": "new"},
    }
    return least | changes


def _accepts(document: dict[str, Any]) -> bool:
    return bool(jsonschema.Draft202012Validator(json_schema()).is_valid(document))


def _valid(document: dict[str, Any]) -> bool:
    try:
        StudyConfig.model_validate(document)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("path", generated_files(), ids=lambda path: path.name)
def test_generated_files_are_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == generated_files()[path], "run `make schema`"


def test_schema_follows_draft_2020_12() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_obey_the_schema_they_name(path: Path) -> None:
    """Editors find the schema by the first line, relative to the file."""
    text = path.read_text(encoding="utf-8")
    first = text.splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    named = path.parent / first.split("$schema=")[1]
    assert named.resolve() == SCHEMA
    schema = json.loads(named.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("changes", "agreed"),
    [
        ({}, True),
        ({"train": ["own/new", "own/more"]}, True),
        ({"methods": [{"method": "full", "learning_rate": [1e-5, 1e-4]}]}, True),
        ({"training": {"max_grad_norm": None, "betas": [0.9, 0.95]}}, True),
        ({"titel": "unknown key"}, False),
        ({"selection": {"probe": "new", "threshold": 1.5}}, False),
        ({"methods": [{"method": "full", "learning_rate": 0}]}, False),
        ({"methods": [{"method": "full", "learning_rate": [1e-4, -1e-4]}]}, False),
        ({"methods": [{"method": "full", "learning_rate": []}]}, False),
        ({"methods": [{"method": "full", "learning_rate": "1e-4"}]}, False),
        ({"probes": {"new": {"table": "own/new", "knowledge": "newer"}}}, False),
        ({"probes": {"new one": {"table": "own/new", "knowledge": "new"}}}, False),
        ({"benchmarks": {"tasks": {"arc_easy": {"limit": 5}}}}, True),
        ({"benchmarks": {"tasks": {"arc/easy": {}}}}, False),
        ({"benchmarks": {"tasks": {"arc_easy": {"shots": 5}}}}, False),
        ({"train": "new"}, False),
        ({"seeds": 0}, False),
    ],
)
def test_schema_and_validation_agree(changes: dict[str, Any], agreed: bool) -> None:
    """The schema and the classes refuse the same studies, limits included."""
    assert _accepts(_document(**changes)) == agreed
    assert _valid(_document(**changes)) == agreed


def test_readme_has_every_key_with_its_default() -> None:
    """Every key of every section is a row with a type and a meaning."""
    schema = json_schema()
    text = readme(schema)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    keys = [key for part in [schema, *schema["$defs"].values()] for key in part["properties"]]
    assert sorted(row[0].strip("`") for row in rows) == sorted(keys)
    assert all(len(row) == 4 and all(row) for row in rows)
    assert (
        "| `threshold` | number > 0 ≤ 1 | `0.9` | The last evaluation before the metric first "
        "reaches it is selected. |" in text
    )
    assert "| `min_lr_ratio` | number from 0 to 1 | `0.0` | Final learning rate as a" in text


def test_readme_links_to_its_headings() -> None:
    text = readme(json_schema())
    headings = {
        "".join(c for c in line[4:].lower() if c.isalnum() or c in "-_")
        for line in text.splitlines()
        if line.startswith("### ")
    }
    links = {part.split(")")[0] for part in text.split("](#")[1:]}
    assert links
    assert links <= headings


def test_check_fails_if_a_file_is_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--check` names the remedy, and passes after `--write`."""
    monkeypatch.setattr("forgetting.config.schema.ROOT", tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["--check"])
    assert ended.value.code == 1
    assert "run `make schema`" in capsys.readouterr().err
    main(["--write"])
    main(["--check"])
    written = tmp_path / "config" / "README.md"
    written.write_text(written.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["--check"])


def test_conda_file_and_requirements_agree() -> None:
    """`--sdm conda` installs the pins of requirements.in, without the tools of the tests."""
    wanted = _pins(ROOT / "envs" / "requirements.in", until="# Tests and checks")
    conda = yaml.safe_load((ROOT / "envs" / "environment.yaml").read_text(encoding="utf-8"))
    pip = next(part["pip"] for part in conda["dependencies"] if isinstance(part, dict))
    assert pip == wanted


def test_lock_has_every_pin() -> None:
    """requirements.txt has every pin of requirements.in, and each package at one version."""
    locked = _pins(ROOT / "envs" / "requirements.txt")
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+( ;.*)?", line) for line in locked)
    names = [_normal(line).split("==")[0] for line in locked]
    assert len(set(names)) == len(names)
    wanted = [_normal(line) for line in _pins(ROOT / "envs" / "requirements.in")]
    missing = set(wanted) - {_normal(line) for line in locked} - set(names)
    assert not missing


def _pins(path: Path, until: str = "") -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = lines[: lines.index(until)] if until else lines
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _normal(requirement: str) -> str:
    """Return the requirement with `_` and `.` as `-`, as package registries do."""
    return requirement.lower().replace("_", "-")
