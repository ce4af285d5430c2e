"""Read a study file, apply the command line, and report mistakes with file, line and key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from forgetting.config.base_model import BaseModelConfig, is_local
from forgetting.config.data import ColumnsConfig, DatasetConfig
from forgetting.config.expand import expand_methods
from forgetting.config.study import StudyConfig
from forgetting.config.types import (
    MAX_NAME_LENGTH,
    NAME,
    ConfigModel,
    KeyedError,
    KeyPath,
    dotted,
    is_hub_name,
)
from forgetting.errors import InputError
from forgetting.study.smoke import smoke_size

SMOKE = "-tiny"
"""Suffix of the name of a study at smoke test size."""
LAST_PAGE = "tradeoff"
"""Name of the page of the study that was run last, reports/tradeoff.html."""
BENCHMARKS_SECTION = "benchmarks"
"""Dataset of the option benchmarks_dir, whose folder has the benchmarks' TASK/SPLIT.jsonl."""
FOLDER_OPTION = re.compile(r"^(?P<dataset>.+)_dir$")


def load_study(config: Mapping[str, Any], studies: Path) -> tuple[str, StudyConfig]:
    """Return the name of the chosen study's results, and the study.

    Args:
        config: options of config.yaml and `--config`: `study` (a name in `studies`, or the path of
            a YAML file), `scale` (`full` or `tiny`), `model` (replaces the study's base model),
            `NAME_dir` (folder of the dataset NAME) and `rerun_on_code_change`.
        studies: folder of the study files.

    Raises:
        InputError: a message of one line for every mistake, with file and key.
    """
    source = study_source(config, studies)
    path = source.path
    study = _override(parse_study(source), config, path)
    if study.base.model and not is_local(study.base.model):
        _check_hub_model(study.base, source.locate("base", "model"))
    _check_paths(study, source)
    name = path.stem
    if not re.fullmatch(NAME, name):
        raise InputError(
            f"study={path}: the name of the file is the name of its results, and `{name}` cannot "
            f"be the name of a folder; rename it to at most {MAX_NAME_LENGTH} letters, digits, "
            "`_`, `.` and `-`, with a letter or digit first"
        )
    scale = config.get("scale", "full")
    if scale not in ("full", "tiny"):
        raise InputError(f"--config scale={scale}: expected full or tiny")
    if scale == "tiny":
        name, study = f"{name}{SMOKE}", smoke_size(study)
    _check_name(name, path, studies)
    return name, study


def _check_name(name: str, path: Path, studies: Path) -> None:
    """Raise InputError if other results have the name, also on file systems that ignore case."""
    if name.casefold() == LAST_PAGE:
        raise InputError(
            f"study={path}: reports/{LAST_PAGE}.html is the page of the last study that ran; "
            "rename your file"
        )
    for other in sorted([*studies.glob("*.yaml"), *studies.glob("*.yml")]):
        stem = other.stem.casefold()
        if name.casefold() in (stem, f"{stem}{SMOKE}") and not other.samefile(path):
            raise InputError(
                f"study={path}: its results would have the name {name}, like those of {other}; "
                "rename your file"
            )


def study_source(config: Mapping[str, Any], studies: Path) -> StudySource:
    """Return the source of the study that `config` names, by default of `mini`."""
    return StudySource(find_study(str(config.get("study", "mini")), studies), config)


def find_study(study: str, studies: Path) -> Path:
    """Return the file of a study that is given by name or by path."""
    path = Path(study) if study.endswith((".yaml", ".yml")) else studies / f"{study}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in studies.glob("*.yaml")))
        raise InputError(
            f"study={study}: there is no {path}; expected one of {known}, or the path of a YAML "
            "file"
        )
    return path


def parse_study(source: StudySource) -> StudyConfig:
    """Return the validated study of a file."""
    try:
        study = StudyConfig.model_validate(source.document())
        expand_methods(study)
    except (ValidationError, KeyedError) as error:
        raise InputError(source.describe_error(error)) from None
    return study


def _check_paths(study: StudyConfig, source: StudySource) -> None:
    """Raise InputError for paths of folders in which Snakemake sees wildcards."""
    folders = [(("datasets", name, "folder"), d.folder) for name, d in study.datasets.items()]
    for keys, folder in [*folders, (("base", "model"), study.base.model)]:
        if folder and re.search("[{}]", folder):
            raise InputError(
                f"{source.locate(*keys)}: Snakemake reads {{ and }} in a path as a wildcard; "
                "rename the folder, or link to it"
            )


def _check_hub_model(base: BaseModelConfig, where: str) -> None:
    """Raise InputError for a model that is neither a folder nor a pinned hub model."""
    try:
        is_hub_name(str(base.model))
    except ValueError as error:
        raise InputError(f"{where}: there is no such folder; {error}") from None
    if not base.revision:
        raise InputError(
            f"{where}: there is no folder {base.model}, and a hub model needs its `revision`, so "
            "that it cannot change"
        )


def _override(study: StudyConfig, config: Mapping[str, Any], path: Path) -> StudyConfig:
    """Return the study with `model` and `NAME_dir` of the command line applied."""
    datasets = dict(study.datasets)
    base, benchmarks = study.base, study.benchmarks
    for key, value in config.items():
        if option := FOLDER_OPTION.match(key):
            name = option["dataset"]
            if name == BENCHMARKS_SECTION:
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
                f"--config {key}: unknown option; expected study, scale, model, "
                "rerun_on_code_change or DATASET_dir "
                f"({', '.join(f'{name}_dir' for name in [*datasets, BENCHMARKS_SECTION])})"
            )
    return study.model_copy(update={"datasets": datasets, "base": base, "benchmarks": benchmarks})


def _base_from_option(value: str) -> BaseModelConfig:
    """Return the base model of the option: a folder, or OWNER/NAME@COMMIT on the hub."""
    if is_local(value):
        return BaseModelConfig(model=value)
    model, _, revision = value.partition("@")
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise InputError(
            f"--config model={value}: there is no such folder, and a hub model needs its commit: "
            "OWNER/NAME@COMMIT, 40 hexadecimal digits"
        )
    return BaseModelConfig(model=model, revision=revision)


NOT_TEXT = {
    "tag:yaml.org,2002:bool": "a boolean",
    "tag:yaml.org,2002:int": "a number",
    "tag:yaml.org,2002:float": "a number",
    "tag:yaml.org,2002:null": "nothing",
    "tag:yaml.org,2002:timestamp": "a date",
}
"""Types that YAML gives to keys without quotation marks, by tag."""


class StudySource:
    """The text of a study file, and the command-line options that replace parts of it."""

    def __init__(self, path: Path, config: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.config = config or {}

    @cached_property
    def text(self) -> str:
        """Return the file's text."""
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
        """Return the file's keys and values; raise InputError if they are not those of a study."""
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
            # A value that YAML reads as a date or a number, but that is not a valid one.
            raise InputError(f"{self.path}: a value cannot be read: {error}") from None
        if not isinstance(document, dict):
            raise InputError(f"{self.path}: expected a study, a mapping of keys to values")
        return document

    def _check_nodes(self, node: yaml.Node | None) -> None:
        """Raise InputError for text that YAML changes or accepts without an error.

        It reads only the last of two equal keys, `no` as a boolean, 010 as 8, and an escape as half
        a character.
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
                        f"{where} is {kind} in YAML, but keys are text; write '{key.value}', "
                        "in quotation marks"
                    )
                if key.value in seen:
                    raise InputError(f"{where} is there twice; merge the two")
                seen.add(key.value)
                self._check_nodes(key)
                self._check_nodes(child)

    def _check_text(self, node: yaml.ScalarNode) -> None:
        """Raise InputError for half a surrogate pair, which cannot be written to a file."""
        try:
            node.value.encode()
        except UnicodeEncodeError:
            line = node.start_mark.line + 1
            raise InputError(
                f"{self.path}, line {line}: {node.value!r} contains half a character (a "
                "surrogate); write the whole character"
            ) from None

    def _refuse_converted(self, node: yaml.ScalarNode) -> None:
        """Raise InputError for a value that YAML 1.1 reads in an unexpected way."""
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
            f"{self.path}, line {line}: `{text}` is {meaning} in YAML; {remedy}, or, if it is "
            "text, put it into quotation marks"
        )

    def locate(self, *keys: str | int) -> str:
        """Return file, line and key of the value at `keys`, or the option that replaces it."""
        if (option := _from_option(keys)) in self.config:
            return f"--config {option}={self.config[option]}"
        where = dotted(*keys) or "the study"
        return f"{self.path}, line {_line(self._root, keys)}: {where}"

    def describe_error(self, error: ValidationError | KeyedError) -> str:
        """Return one line for every mistake that validation reports."""
        if isinstance(error, KeyedError):
            return f"{self.locate(*error.keys)}: {error.message}"
        document = self.document()
        faults = [(_keys(fault, document), fault) for fault in error.errors(include_url=False)]
        lines = []
        for keys, group in groupby(faults, key=lambda item: item[0]):
            # Each type of a union reports its own mistakes; the deepest ones are the clearest.
            if not any(_is_below(other, keys) for other, _ in faults):
                lines.append(f"{self.locate(*keys)}: {_message(keys, [f for _, f in group])}")
        return "\n".join(lines)


def _from_option(keys: Sequence[str | int]) -> str:
    """Return the command-line option that may replace the value at `keys`, or an empty string."""
    if tuple(keys[:2]) == ("base", "model"):
        return "model"
    if tuple(keys) == ("benchmarks", "dataset"):
        return f"{BENCHMARKS_SECTION}_dir"
    return f"{keys[1]}_dir" if len(keys) > 1 and keys[0] == "datasets" else ""


def _is_below(keys: KeyPath, above: KeyPath) -> bool:
    """Return whether a key path continues another one."""
    return len(keys) > len(above) and keys[: len(above)] == above


def _keys(fault: Mapping[str, Any], document: Any) -> KeyPath:
    """Return the key path of a fault; pydantic's location also names validators and types."""
    keys: list[str | int] = []
    value = document
    for part in fault["loc"]:
        inside = isinstance(value, dict) and part in value
        if inside or isinstance(part, int) or fault["type"] == "missing":
            keys.append(part)
            listed = isinstance(value, list) and isinstance(part, int) and part < len(value)
            value = value[part] if inside or listed else None
    error = fault.get("ctx", {}).get("error")
    return (*keys, *error.keys) if isinstance(error, KeyedError) else tuple(keys)


def _message(keys: KeyPath, faults: Sequence[Mapping[str, Any]]) -> str:
    """Return one message on a value from the faults that each of its possible types reports."""
    raised = [fault["ctx"]["error"] for fault in faults if fault["type"] == "value_error"]
    if raised:
        return raised[0].message if isinstance(raised[0], KeyedError) else str(raised[0])
    kinds = {fault["type"] for fault in faults}
    if "extra_forbidden" in kinds:
        return _unknown_key(keys)
    if "missing" in kinds:
        return "this key is required"
    right_type = [f for f in faults if not f["type"].endswith(("_type", "literal_error"))]
    messages = list(dict.fromkeys(fault["msg"] for fault in right_type or faults))
    more = [message.removeprefix("Input should be ") for message in messages[1:]]
    value = faults[0]["input"]
    quotes = "; put it into quotation marks" if isinstance(value, bool | int | float) else ""
    remedy = quotes if kinds == {"string_type"} else ""
    return ", or ".join([messages[0], *more]) + f", found {value!r}{remedy}"


def _unknown_key(keys: KeyPath) -> str:
    """Return the message on an unknown key, with the most similar known key or all of them."""
    known = list(_section_at(keys[:-1]).model_fields)
    similar = difflib.get_close_matches(str(keys[-1]), known, n=1)
    hint = f"did you mean `{similar[0]}`?" if similar else f"expected {', '.join(known)};"
    return f"unknown key; {hint} config/README.md lists all keys"


def _section_at(keys: KeyPath) -> type[ConfigModel]:
    """Return the class of the deepest section on a key path."""
    section: type[ConfigModel] = StudyConfig
    names = iter(key for key in keys if isinstance(key, str))
    for name in names:
        annotation = section.model_fields[name].annotation
        section = next(_section_classes(annotation), section)
        if get_origin(annotation) is dict:
            next(names, None)
    return section


def _section_classes(annotation: Any) -> Iterator[type[ConfigModel]]:
    """Yield the sections in the type of a key."""
    if isinstance(annotation, type) and issubclass(annotation, ConfigModel):
        yield annotation
    for part in get_args(annotation):
        yield from _section_classes(part)


def _line(node: yaml.Node | None, keys: Iterable[str | int]) -> int:
    """Return the line of the deepest key on a path that the document has."""
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
