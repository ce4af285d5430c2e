"""Sizes and names of the library's modules, programs and rules; imports of the tests."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

WORKFLOW = Path(__file__).resolve().parents[2] / "workflow"
LIBRARY = WORKFLOW / "forgetting"
MODULES = sorted(path for path in LIBRARY.rglob("*.py") if path.name != "__init__.py")
PROGRAMS = sorted((WORKFLOW / "scripts").glob("*.py"))
RULES = sorted((WORKFLOW / "rules").glob("*.smk"))

MAX_MODULES, MAX_MODULE_LINES = 125, 480
MAX_PROGRAM_LINES = 60
MAX_COMMON_LINES = 60


def line_count(path: Path) -> int:
    """Return the number of lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def public_symbols(path: Path) -> Iterator[str]:
    """Yield the public functions, classes and constants that a module defines."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names: list[str] = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        yield from (name for name in names if not name.startswith("_") and name != "main")


def test_library_has_few_modules_of_moderate_size() -> None:
    assert len(MODULES) <= MAX_MODULES
    assert [path.name for path in MODULES if line_count(path) > MAX_MODULE_LINES] == []


def test_modules_have_different_names() -> None:
    """Modules of `config` have the names of what they configure."""
    names: dict[str, list[str]] = defaultdict(list)
    for path in MODULES:
        if path.parent.name != "config":
            names[path.stem].append(str(path.relative_to(LIBRARY)))
    assert [paths for paths in names.values() if len(paths) > 1] == []


def test_public_symbols_have_different_names() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for path in MODULES:
        for name in set(public_symbols(path)):
            homes[name].append(str(path.relative_to(LIBRARY)))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_programs_are_short(path: Path) -> None:
    assert line_count(path) <= MAX_PROGRAM_LINES


def test_rules_define_no_functions() -> None:
    for path in RULES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(def|class) |\blambda\b", text, re.MULTILINE), path.name
    assert line_count(WORKFLOW / "rules" / "common.smk") <= MAX_COMMON_LINES


TESTS = WORKFLOW.parent / "tests"
PRIVATE_IMPORTS = {"test_model_types.py"}  # transformers has no public table of renamed weights


@pytest.mark.parametrize(
    "path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS))
)
def test_tests_import_no_test_and_no_private_name(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        parts = [part for name in names for part in name.split(".")]
        assert not [part for part in parts if part.startswith("test_") or part == "tests"]
        private = [part for part in parts if part.startswith("_")]
        assert not private or path.name in PRIVATE_IMPORTS
