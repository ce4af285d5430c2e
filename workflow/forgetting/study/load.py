"""Where a study was written: the line of each key in its file, or the option in its place.

Read a study file, apply what the command line says, and tell every mistake by file and key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from forgetting.config.base_model import BaseModelConfig, is_local
from forgetting.config.data import ColumnsConfig, DatasetConfig
from forgetting.config.expand import expand_methods
from forgetting.config.study import StudyConfig
from forgetting.config.types import MAX_NAME_LENGTH, NAME, KeyedError, KeyPath, dotted, is_hub_name
from forgetting.errors import InputError
from forgetting.study.smoke import smoke_size

SMOKE = "-tiny"
"""What follows the name of a study at toy size."""
LAST_PAGE = "tradeoff"
FOLDER_OPTION = re.compile(r"^(?P<dataset>.+)_dir$")


def load_study(config: Mapping[str, Any], studies: Path) -> tuple[str, StudyConfig]:
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
        _check_hub_model(study.base, source.locate("base", "model"))
    _check_paths(study, source)
    name = path.stem
    if not re.fullmatch(NAME, name):
        raise InputError(
            f"study={path}: results are kept under the name of the file, and `{name}` is none for "
            f"a folder: take at most {MAX_NAME_LENGTH} letters, digits, `_`, `.` and `-`, a "
            "letter or digit first; rename it"
        )
    scale = config.get("scale", "full")
    if scale not in ("full", "tiny"):
        raise InputError(f"--config scale={scale}: expected full or tiny")
    if scale == "tiny":
        name, study = f"{name}{SMOKE}", smoke_size(study)
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
        if name.casefold() in (stem, f"{stem}{SMOKE}") and not other.samefile(path):
            raise InputError(
                f"study={path}: its results are kept under the name {name}, and so are those of "
                f"{other}; rename your file"
            )


def study_source(config: Mapping[str, Any], studies: Path) -> StudySource:
    """Where the study that `config` asks for is written."""
    return StudySource(find_study(str(config.get("study", "mini")), studies), config)


def find_study(study: str, studies: Path) -> Path:
    """The file of a study given by name or by path."""
    path = Path(study) if study.endswith((".yaml", ".yml")) else studies / f"{study}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in studies.glob("*.yaml")))
        raise InputError(
            f"study={study}: there is no {path}; give one of {known}, or the path of a YAML file"
        )
    return path


def parse_study(source: StudySource) -> StudyConfig:
    """Validate one study file."""
    try:
        study = StudyConfig.model_validate(source.document())
        expand_methods(study)
    except (ValidationError, KeyedError) as error:
        raise InputError(source.describe_error(error)) from None
    return study


def _check_paths(study: StudyConfig, source: StudySource) -> None:
    """Refuse paths of folders that Snakemake would not take as they are written."""
    folders = [(("datasets", name, "folder"), d.folder) for name, d in study.datasets.items()]
    for keys, folder in [*folders, (("base", "model"), study.base.model)]:
        if folder and re.search("[{}]", folder):
            raise InputError(
                f"{source.locate(*keys)}: Snakemake takes {{ and }} in a path for a "
                "wildcard; take a folder without them, or a link to it"
            )


def _check_hub_model(base: BaseModelConfig, where: str) -> None:
    """Refuse a model that is no folder and cannot be found on the hub."""
    try:
        is_hub_name(str(base.model))
    except ValueError as error:
        raise InputError(f"{where}: there is no such folder; {error}") from None
    if not base.revision:
        raise InputError(
            f"{where}: {base.model} is no folder here, and a hub model "
            "needs its `revision`, so that it cannot change"
        )


def _override(study: StudyConfig, config: Mapping[str, Any], path: Path) -> StudyConfig:
    """Apply `model` and `NAME_dir` of the command line."""
    datasets = dict(study.datasets)
    base, benchmarks = study.base, study.benchmarks
    for key, value in config.items():
        option = FOLDER_OPTION.match(key)
        if option:
            name = option["dataset"]
            if name == BENCHMARKS:
                benchmarks = benchmarks.model_copy(update={"dataset": name})
            elif name not in datasets:
                raise InputError(
                    f"--config {key}: {path} has no dataset `{name}`, only {', '.join(datasets)}"
                )
            columns = datasets[name].columns if name in datasets else ColumnsConfig()
            datasets[name] = DatasetConfig(folder=str(value), columns=columns)
            if not Path(str(datasets[name].folder)).is_dir():
                raise InputError(f"--config {key}={value}: there is no such folder")
        elif key == "model":
            base = _base_from_option(str(value))
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


def _base_from_option(value: str) -> BaseModelConfig:
    """A base from the command line: a folder, or OWNER/NAME@COMMIT on the hub."""
    if is_local(value):
        return BaseModelConfig(model=value)
    model, _, revision = value.partition("@")
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise InputError(
            f"--config model={value}: there is no such folder, and a hub model needs its commit: "
            "OWNER/NAME@COMMIT, 40 hexadecimal digits"
        )
    return BaseModelConfig(model=model, revision=revision)


BENCHMARKS = "benchmarks"
"""`--config benchmarks_dir=FOLDER`: take the benchmarks' rows from FOLDER/TASK/SPLIT.jsonl."""


NOT_TEXT = {
    "tag:yaml.org,2002:bool": "a boolean",
    "tag:yaml.org,2002:int": "a number",
    "tag:yaml.org,2002:float": "a number",
    "tag:yaml.org,2002:null": "nothing",
    "tag:yaml.org,2002:timestamp": "a date",
}
"""What YAML takes a key for that is not in quotes, by its tag."""


class StudySource:
    """A study file as it was written, and what the command line says in its place."""

    def __init__(self, path: Path, config: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.config = config or {}

    @cached_property
    def text(self) -> str:
        """The file's text."""
        try:
            return self.path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.path}: not UTF-8 text ({error.reason} at byte {error.start})"
            ) from None

    @cached_property
    def _root(self) -> yaml.Node | None:
        root: yaml.Node | None = yaml.compose(self.text, Loader=yaml.SafeLoader)
        return root

    def document(self) -> dict[Any, Any]:
        """The file's keys and values, none of them given twice."""
        try:
            document = yaml.safe_load(self.text)
            self._check_nodes(self._root)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            raise InputError(
                f"{self.path}{line}: not YAML ({getattr(error, 'problem', error)})"
            ) from None
        except RecursionError:
            raise InputError(f"{self.path}: nested too deeply to be a study") from None
        except ValueError as error:
            # What looks like a date or a number to YAML, and is none.
            raise InputError(f"{self.path}: a value cannot be read: {error}") from None
        if not isinstance(document, dict):
            raise InputError(f"{self.path}: expected a study, a mapping of keys to values")
        return document

    def _check_nodes(self, node: yaml.Node | None) -> None:
        """Refuse what YAML changes or accepts in silence.

        Of two equal keys it takes the last, `no` as a key is a boolean, 010 is 8, and an escape can
        be half a character.
        """
        if isinstance(node, yaml.ScalarNode):
            self._check_text(node)
            self._refuse_converted(node)
        elif isinstance(node, yaml.SequenceNode):
            for child in node.value:
                self._check_nodes(child)
        elif isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, child in node.value:
                where = f"{self.path}, line {key.start_mark.line + 1}: `{key.value}`"
                if (kind := NOT_TEXT.get(key.tag)) is not None:
                    raise InputError(
                        f"{where} is {kind} to YAML, and keys are text; write '{key.value}', "
                        "in quotation marks"
                    )
                if key.value in seen:
                    raise InputError(f"{where} is there twice; merge them")
                seen.add(key.value)
                self._check_nodes(key)
                self._check_nodes(child)

    def _check_text(self, node: yaml.ScalarNode) -> None:
        try:
            node.value.encode()
        except UnicodeEncodeError:
            line = node.start_mark.line + 1
            raise InputError(
                f"{self.path}, line {line}: {node.value!r} holds half a character (a surrogate); "
                "write the whole character"
            ) from None

    def _refuse_converted(self, node: yaml.ScalarNode) -> None:
        """Refuse a value that YAML 1.1 reads as another one than most people mean."""
        kind, text = node.tag.rpartition(":")[2], node.value
        if node.style is not None:
            return
        if kind == "timestamp":
            meaning, remedy = "a date", f'write "{text}" with the quotation marks'
        elif kind in ("int", "float") and ":" in text:
            meaning, remedy = "a number to the base of 60", "write it as one number"
        elif kind == "int" and re.fullmatch(r"[-+]?0[0-7_]+", text):
            meaning, remedy = "an octal number", f"write {int(text.replace('_', ''))}"
        else:
            return
        line = node.start_mark.line + 1
        raise InputError(
            f"{self.path}, line {line}: `{text}` is {meaning} to YAML; {remedy}, or, if it is "
            "text, put it into quotation marks"
        )

    def locate(self, *keys: str | int) -> str:
        """Beginning of a message about the value at `keys`: file, line and key, or the option."""
        if (option := _from_option(keys)) in self.config:
            return f"--config {option}={self.config[option]}"
        where = dotted(*keys) or "the study"
        return f"{self.path}, line {_line(self._root, keys)}: {where}"

    def describe_error(self, error: ValidationError | KeyedError) -> str:
        """A line for every mistake that was found while the study was validated."""
        if isinstance(error, KeyedError):
            return f"{self.locate(*error.keys)}: {error.message}"
        faults = [
            (_keys(fault, self.document()), fault) for fault in error.errors(include_url=False)
        ]
        lines = []
        for keys, group in groupby(faults, key=lambda item: item[0]):
            same = [fault for _, fault in group]
            # Of a value that may be one thing or another, the part that is wrong is told.
            if not any(_is_below(other, keys) for other, _ in faults):
                lines.append(f"{self.locate(*keys)}: {_message(same)}")
        return "\n".join(lines)


def _from_option(keys: Sequence[str | int]) -> str:
    """The command-line option that may have given the value at `keys`."""
    if tuple(keys[:2]) == ("base", "model"):
        return "model"
    if tuple(keys) == ("benchmarks", "dataset"):
        return f"{BENCHMARKS}_dir"
    return f"{keys[1]}_dir" if len(keys) > 1 and keys[0] == "datasets" else ""


def _is_below(keys: KeyPath, above: KeyPath) -> bool:
    return len(keys) > len(above) and keys[: len(above)] == above


def _keys(fault: Mapping[str, Any], document: Any) -> KeyPath:
    """Keys of a fault. Pydantic's location also names validators and branches of unions."""
    keys: list[str | int] = []
    value = document
    for part in fault["loc"]:
        inside = isinstance(value, dict) and part in value
        if inside or isinstance(part, int) or fault["type"] == "missing":
            keys.append(part)
            listed = isinstance(value, list) and isinstance(part, int) and part < len(value)
            value = value[part] if inside or listed else None
    own = fault.get("ctx", {}).get("error")
    return (*keys, *own.keys) if isinstance(own, KeyedError) else tuple(keys)


def _message(faults: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on a value, though each type that it might have had refuses it by its own."""
    own = [fault for fault in faults if fault["type"] == "value_error"]
    if own:
        error = own[0]["ctx"]["error"]
        return error.message if isinstance(error, KeyedError) else str(error)
    kinds = {fault["type"] for fault in faults}
    if "extra_forbidden" in kinds:
        return "unknown key; config/README.md lists all keys"
    if "missing" in kinds:
        return "this key is required"
    of_its_type = [f for f in faults if not f["type"].endswith(("_type", "literal_error"))]
    told = list(dict.fromkeys(fault["msg"] for fault in of_its_type or faults))
    more = [message.removeprefix("Input should be ") for message in told[1:]]
    found = faults[0]["input"]
    quotes = "; put it into quotation marks" if isinstance(found, bool | int | float) else ""
    remedy = quotes if kinds == {"string_type"} else ""
    return ", or ".join([told[0], *more]) + f", found {found!r}{remedy}"


def _line(node: yaml.Node | None, keys: Iterable[str | int]) -> int:
    """Line of the deepest part of `keys` that stands in the document."""
    line = 1
    for key in keys:
        child = None
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                if name.value == str(key):
                    child, line = value, name.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int):
            child = node.value[key] if key < len(node.value) else None
            line = child.start_mark.line + 1 if child else line
        if child is None:
            break
        node = child
    return line
