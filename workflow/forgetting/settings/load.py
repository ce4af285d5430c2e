"""Read a study file, apply what the command line says, and tell every mistake by file and key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from forgetting.records import InputError
from forgetting.sections.base import Base
from forgetting.sections.columns import Columns
from forgetting.sections.dataset import Dataset
from forgetting.sections.fields import LONGEST_NAME, NAME, AtKey, on_hub
from forgetting.settings.plan import tunings
from forgetting.settings.source import BENCHMARKS, Source
from forgetting.settings.study import Study
from forgetting.settings.tiny import shrink

TINY = "-tiny"
"""What follows the name of a study at toy size."""
LAST_PAGE = "tradeoff"
FOLDER_OPTION = re.compile(r"^(?P<dataset>.+)_dir$")


def load_study(config: Mapping[str, Any], studies: Path) -> tuple[str, Study]:
    """The study that `config` asks for, and the name under which its results are kept.

    Args:
        config: what config.yaml and `--config` say: `study` (a name in `studies`, or the path of a
            YAML file), `scale` (`full` or `tiny`), `model` (in place of the study's base),
            `NAME_dir` (folder of the dataset NAME) and `rerun_on_code_change`.
        studies: folder of the study files.

    Raises:
        InputError: one message with the file and the key of every mistake.
    """
    source = study_source(config, studies)
    path, study = source.path, parse_study(source)
    study = _override(study, config, path)
    if study.base.model and not is_local(study.base.model):
        _check_hub_model(study.base, source.at("base", "model"))
    _check_paths(study, source)
    name = path.stem
    if not re.fullmatch(NAME, name):
        raise InputError(
            f"study={path}: results are kept under the name of the file, and `{name}` is none for "
            f"a folder: take at most {LONGEST_NAME} letters, digits, `_`, `.` and `-`, a letter or "
            "digit first; rename it"
        )
    scale = config.get("scale", "full")
    if scale not in ("full", "tiny"):
        raise InputError(f"--config scale={scale}: expected full or tiny")
    if scale == "tiny":
        name, study = f"{name}{TINY}", shrink(study)
    _check_name(name, path, studies)
    return name, study


def _check_name(name: str, path: Path, studies: Path) -> None:
    """Refuse a name under which something else is kept, also where file systems ignore case."""
    if name.casefold() == LAST_PAGE:
        raise InputError(
            f"study={path}: reports/{LAST_PAGE}.html is the page of the study that was run last; "
            "rename your file"
        )
    for other in sorted([*studies.glob("*.yaml"), *studies.glob("*.yml")]):
        stem = other.stem.casefold()
        if name.casefold() in (stem, f"{stem}{TINY}") and not other.samefile(path):
            raise InputError(
                f"study={path}: its results are kept under the name {name}, and so are those of "
                f"{other}; rename your file"
            )


def study_source(config: Mapping[str, Any], studies: Path) -> Source:
    """Where the study that `config` asks for is written."""
    return Source(find_study(str(config.get("study", "mini")), studies), config)


def find_study(study: str, studies: Path) -> Path:
    """The file of a study given by name or by path."""
    path = Path(study) if study.endswith((".yaml", ".yml")) else studies / f"{study}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in studies.glob("*.yaml")))
        raise InputError(
            f"study={study}: there is no {path}; give one of {known}, or the path of a YAML file"
        )
    return path


def parse_study(source: Source) -> Study:
    """Validate one study file."""
    try:
        study = Study.model_validate(source.document())
        tunings(study)
    except (ValidationError, AtKey) as error:
        raise InputError(source.tell(error)) from None
    return study


def _check_paths(study: Study, source: Source) -> None:
    """Refuse paths of folders that Snakemake would not take as they are written."""
    folders = [(("datasets", name, "folder"), d.folder) for name, d in study.datasets.items()]
    for keys, folder in [*folders, (("base", "model"), study.base.model)]:
        if folder and re.search("[{}]", folder):
            raise InputError(
                f"{source.at(*keys)}: Snakemake takes {{ and }} in a path for a wildcard; take a "
                "folder without them, or a link to it"
            )


def _check_hub_model(base: Base, where: str) -> None:
    """Refuse a model that is no folder and cannot be found on the hub."""
    try:
        on_hub(str(base.model))
    except ValueError as error:
        raise InputError(f"{where}: there is no such folder; {error}") from None
    if not base.revision:
        raise InputError(
            f"{where}: {base.model} is no folder here, and a hub model "
            "needs its `revision`, so that it cannot change"
        )


def _override(study: Study, config: Mapping[str, Any], path: Path) -> Study:
    """Apply `model` and `NAME_dir` of the command line."""
    datasets = dict(study.datasets)
    base, benchmarks = study.base, study.benchmarks
    for key, value in config.items():
        option = FOLDER_OPTION.match(key)
        if option:
            name = option["dataset"]
            if name == BENCHMARKS:
                benchmarks = benchmarks.model_copy(update={"rows": name})
            elif name not in datasets:
                raise InputError(
                    f"--config {key}: {path} has no dataset `{name}`, only {', '.join(datasets)}"
                )
            columns = datasets[name].columns if name in datasets else Columns()
            datasets[name] = Dataset(folder=str(value), columns=columns)
            if not Path(str(datasets[name].folder)).is_dir():
                raise InputError(f"--config {key}={value}: there is no such folder")
        elif key == "model":
            base = _named_model(str(value))
        elif key == "rerun_on_code_change":
            if not isinstance(value, bool):
                raise InputError(f"--config {key}={value}: expected true or false")
        elif key not in ("study", "scale"):
            raise InputError(
                f"--config {key}: unknown; expected study, scale, model, rerun_on_code_change or "
                "DATASET_dir "
                f"({', '.join(f'{name}_dir' for name in [*datasets, BENCHMARKS])})"
            )
    return study.model_copy(update={"datasets": datasets, "base": base, "benchmarks": benchmarks})


def _named_model(value: str) -> Base:
    """A base from the command line: a folder, or OWNER/NAME@COMMIT on the hub."""
    if is_local(value):
        return Base(model=value)
    model, _, revision = value.partition("@")
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise InputError(
            f"--config model={value}: there is no such folder, and a hub model needs its commit: "
            "OWNER/NAME@COMMIT, 40 hexadecimal digits"
        )
    return Base(model=model, revision=revision)


def is_local(model: str) -> bool:
    """Is the model given as a folder, rather than by its name on the hub?"""
    return model.startswith((".", "/", "~")) or Path(model).is_dir()
