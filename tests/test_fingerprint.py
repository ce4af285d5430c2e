"""A digest of code changes when what the code does may change, and only then."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from forgetting import fingerprint
from forgetting.fingerprint import _reached, code_digest

PROGRAM = '''"""A program."""

from forgetting.model import LAYERS


def main():
    """Say how large."""
    size = 2 * LAYERS
    return size
'''
FILES = {
    "forgetting/__init__.py": '"""A package."""\n',
    "forgetting/model.py": "from forgetting import parts\n\nLAYERS = parts.COUNT + 1\n",
    "forgetting/parts.py": "COUNT = 3\n",
    "forgetting/unused.py": "COUNT = 4\n",
    "forgetting/settings/__init__.py": "",
    "forgetting/settings/study.py": "THRESHOLD = 0.9\n",
    "forgetting/sections/__init__.py": "",
    "forgetting/sections/training.py": "EPOCHS = 9\n",
    "forgetting/world/__init__.py": "from .places import PLACES\n",
    "forgetting/world/places.py": "from . import names\n\nPLACES = names.NAMES[:1]\n",
    "forgetting/world/names.py": "NAMES = ['Oslo', 'Lima']\n",
    "scripts/run.py": PROGRAM,
}
Digest = Callable[..., str]


@pytest.fixture
def digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Digest:
    """The digest of the program in a small package, some of whose files are changed."""
    count = iter(range(100))

    def of(changes: Mapping[str, str] | None = None) -> str:
        folder = tmp_path / str(next(count))
        for name, content in (FILES | dict(changes or {})).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        monkeypatch.setattr(fingerprint, "PACKAGE", folder / "forgetting")
        return code_digest(folder / "scripts" / "run.py")

    return of


def _program(old: str, new: str) -> dict[str, str]:
    assert old in PROGRAM
    return {"scripts/run.py": PROGRAM.replace(old, new)}


def _package(module: str, content: str) -> dict[str, str]:
    return {f"forgetting/{module}.py": content}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    size", "    # A comment.\n    size"),
        ("Say how large.", "Say\n\n    it otherwise."),
        ('    """Say how large."""\n', ""),
        ('"""A program."""\n', ""),
        ("\n\n\ndef", "\n\n\n\n\ndef"),
        ("2 * LAYERS", "(2  *\n        LAYERS)"),
        ("    size = 2", "    size = 0x2"),
    ],
)
def test_comments_docstrings_and_layout_do_not_count(digest: Digest, old: str, new: str) -> None:
    assert digest(_program(old, new)) == digest()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2 * LAYERS", "3 * LAYERS"),
        ("2 * LAYERS", "2.0 * LAYERS"),
        ("2 * LAYERS", "2 + LAYERS"),
        ("return size", "return -size"),
        ("def main():", "def main(more=1):"),
        ("def main():", "@print\ndef main():"),
        ("    return size", "    return size\n\n\nprint('x')"),
    ],
)
def test_what_a_program_does_counts(digest: Digest, old: str, new: str) -> None:
    assert digest(_program(old, new)) != digest()


def test_imported_modules_count_however_deep(digest: Digest) -> None:
    assert digest(_package("model", "LAYERS = 5\n")) != digest()
    assert digest(_package("parts", "COUNT = 5\n")) != digest()
    assert digest(_package("parts", "# A comment.\nCOUNT = 3\n")) == digest()


def test_modules_that_are_not_imported_do_not_count(digest: Digest) -> None:
    assert digest(_package("unused", "COUNT = 5\n")) == digest()


def test_settings_do_not_count_since_they_stand_in_the_parameters(digest: Digest) -> None:
    reads = _program(
        "import LAYERS", "import LAYERS\nfrom forgetting.settings.study import THRESHOLD"
    )
    assert digest(reads | _package("settings/study", "THRESHOLD = 0.5\n")) == digest(reads)
    reads = _program(
        "import LAYERS", "import LAYERS\nfrom forgetting.sections.training import EPOCHS"
    )
    assert digest(reads | _package("sections/training", "EPOCHS = 5\n")) == digest(reads)


@pytest.mark.parametrize(
    "statement",
    [
        "import forgetting.parts",
        "import forgetting.parts as p",
        "import os, forgetting.parts",
        "from forgetting import parts",
        "from forgetting import (\n    unused,\n    parts,\n)",
        "from forgetting.parts import COUNT",
        "def late():\n    from forgetting.parts import COUNT",
        "if True:\n    try:\n        from forgetting import parts\n    finally:\n        pass",
    ],
)
def test_every_form_of_import_is_followed(digest: Digest, statement: str) -> None:
    program = {"scripts/run.py": f"{statement}\n"}
    assert digest(program | _package("parts", "COUNT = 5\n")) != digest(program)


@pytest.mark.parametrize(
    "statement",
    [
        "from forgetting.world import PLACES",
        "import forgetting.world",
        "from forgetting.world.places import PLACES",
        "from forgetting import world",
    ],
)
def test_relative_imports_are_followed(digest: Digest, statement: str) -> None:
    program = {"scripts/run.py": f"{statement}\n"}
    for module, content in [
        ("world/names", "NAMES = ['Oslo']\n"),
        ("world/places", "from . import names\n\nPLACES = names.NAMES\n"),
    ]:
        assert digest(program | _package(module, content)) != digest(program), module


@pytest.mark.parametrize("package", ["world/__init__", "__init__"])
def test_what_runs_because_a_package_is_entered_counts(digest: Digest, package: str) -> None:
    """Python runs every `__init__` on the way to a module, so it is part of the program."""
    program = {"scripts/run.py": "from forgetting.world.names import NAMES\n"}
    changed = {f"forgetting/{package}.py": "import random\n\nrandom.seed(0)\n"}
    assert digest(program | changed) != digest(program)


def test_modules_that_import_each_other_end(digest: Digest) -> None:
    circle = _package("parts", "from forgetting import model\n\nCOUNT = 3\n")
    assert digest(circle) != digest()


def test_equal_code_has_equal_digests_in_any_folder(digest: Digest) -> None:
    assert digest() == digest()
    assert len(digest()) == 16


def test_every_program_of_the_repository_has_a_digest() -> None:
    programs = sorted((Path(__file__).parents[1] / "workflow" / "scripts").glob("*.py"))
    assert programs
    for program in programs:
        assert code_digest(program) == code_digest(program)


@pytest.mark.parametrize("program", ["report", "execute_programs", "generate_world"])
def test_all_that_a_program_loads_is_in_its_digest(program: str) -> None:
    """Seen from the inside: what Python has loaded when the program's imports are done."""
    scripts = Path(__file__).parents[1] / "workflow" / "scripts"
    told = "import sys, %s; print(*(m.__file__ for n, m in sys.modules.items() if %s))"
    ours = "n.split('.')[0] == 'forgetting'"
    done = subprocess.run(
        [sys.executable, "-c", told % (program, ours)],
        env=os.environ | {"PYTHONPATH": f"{scripts}{os.pathsep}{scripts.parent}"},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {Path(file) for file in done.stdout.split()}
    missed = loaded - _reached(scripts / f"{program}.py")
    # What stands in parameters is left out on purpose.
    parts = [path.relative_to(fingerprint.PACKAGE).with_suffix("").parts for path in missed]
    assert {part[0] for part in parts} <= fingerprint.SETTINGS
    assert len(loaded) > 2
