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
from forgetting.sections.fields import NAME, AtKey
from forgetting.settings.plan import tunings
from forgetting.settings.source import BENCHMARKS, Source
from forgetting.settings.study import Study
from forgetting.settings.tiny import shrink

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
    if study.base.model and not is_local(study.base.model) and not study.base.revision:
        raise InputError(
            f"{source.at('base', 'model')}: {study.base.model} is no folder here, and a hub model "
            "needs its `revision`, so that it cannot change"
        )
    name = path.stem
    if not re.fullmatch(NAME, name):
        raise InputError(
            f"study={path}: results are kept under the name of the file, and `{name}` is none for "
            "a folder: take letters, digits, `_`, `.` and `-`, a letter or digit first; rename it"
        )
    namesake = studies / path.name
    if namesake.is_file() and not namesake.samefile(path):
        raise InputError(
            f"study={path}: results are kept under the name of {namesake}; rename your file"
        )
    scale = config.get("scale", "full")
    if scale not in ("full", "tiny"):
        raise InputError(f"--config scale={scale}: expected full or tiny")
    if scale == "tiny":
        name, study = f"{name}-tiny", shrink(study)
    return name, study


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
            if not Path(str(value)).is_dir():
                raise InputError(f"--config {key}={value}: there is no such folder")
            columns = datasets[name].columns if name in datasets else Columns()
            datasets[name] = Dataset(folder=str(value), columns=columns)
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
