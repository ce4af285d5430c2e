"""A digest of the code that a program runs, blind to comments, docstrings and layout.

Given to a rule as a parameter, it makes Snakemake rerun a job when its code means something else,
and only then: the parsed syntax tree is digested, not the text. A touched comment retrains nothing.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
SETTINGS = {"settings", "sections", "records", "fingerprint"}
"""What only reads settings or writes files: what it decides stands in a job's parameters."""


def code_digest(program: Path) -> str:
    """Digest of a program and of every module of this package that it imports, however deep."""
    digest = hashlib.sha256()
    for path in sorted(_reached(program)):
        digest.update(_meaning(path).encode())
    return digest.hexdigest()[:16]


def _reached(program: Path) -> set[Path]:
    found, waiting = {program}, [program]
    while waiting:
        for path in _imports(waiting.pop()):
            if path not in found:
                found.add(path)
                waiting.append(path)
    return found


@cache
def _imports(path: Path) -> frozenset[Path]:
    """Files of this package that a file imports, in any form, also inside functions."""
    return frozenset(_imported(path))


def _imported(path: Path) -> Iterator[Path]:
    package = path.parent.relative_to(PACKAGE.parent).parts if path.is_relative_to(PACKAGE) else ()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names = [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] != PACKAGE.name or (len(parts) > 1 and parts[1] in SETTINGS):
                continue
            # Python also runs the `__init__` of every package on the way.
            for depth in range(1, len(parts) + 1):
                file = PACKAGE.parent.joinpath(*parts[:depth])
                for candidate in (file.with_suffix(".py"), file / "__init__.py"):
                    if candidate.is_file():
                        yield candidate


@cache
def _meaning(path: Path) -> str:
    """The syntax tree as text, without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list) or not body:
            continue
        node.body = [  # type: ignore[attr-defined]
            statement
            for statement in body
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        ]
    return ast.dump(tree)
