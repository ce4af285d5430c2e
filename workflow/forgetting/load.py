"""Read a study file, apply what the command line says, and tell every mistake by file and key."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from forgetting.columns import Columns
from forgetting.plan import tunings
from forgetting.records import InputError, read_json
from forgetting.study import Base, Dataset, Study
from forgetting.tiny import shrink

BENCHMARKS = "benchmarks"
"""`--config benchmarks_dir=FOLDER`: take the benchmarks' rows from FOLDER/TASK/SPLIT.jsonl."""

FOLDER_OPTION = re.compile(r"^(?P<dataset>.+)_dir$")


def load_study(config: Mapping[str, Any], studies: Path) -> tuple[str, Study]:
    """The study that `config` asks for, and the name under which its results are kept.

    Args:
        config: what config.yaml and `--config` say: `study` (a name in `studies`, or the path of a
            YAML file), `scale` (`full` or `tiny`), `model` (in place of the study's base) and
            `NAME_dir` (folder of the dataset NAME).
        studies: folder of the study files.

    Raises:
        InputError: one message with the file and the key of every mistake.
    """
    path = find_study(str(config.get("study", "mini")), studies)
    study = parse_study(path)
    study = _override(study, config, path)
    if study.base.model and not is_local(study.base.model) and not study.base.revision:
        raise InputError(
            f"{path}: base: {study.base.model} is no folder here, and a hub model needs its "
            "`revision`, so that it cannot change"
        )
    name = path.stem
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
    _check_ranks(study, path)
    return name, study


def find_study(study: str, studies: Path) -> Path:
    """The file of a study given by name or by path."""
    path = Path(study) if study.endswith((".yaml", ".yml")) else studies / f"{study}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in studies.glob("*.yaml")))
        raise InputError(
            f"study={study}: there is no {path}; give one of {known}, or the path of a YAML file"
        )
    return path


def parse_study(path: Path) -> Study:
    """Validate one study file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    try:
        document = yaml.safe_load(text)
        _refuse_repeated(yaml.compose(text, Loader=yaml.SafeLoader), path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a study, a mapping of keys to values")
    try:
        study = Study.model_validate(document)
        tunings(study)
    except ValidationError as error:
        raise InputError(_explain(error, path, text)) from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    return study


def _refuse_repeated(node: yaml.Node | None, path: Path) -> None:
    """YAML itself would take the last of two equal keys, and drop what the first one says."""
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_repeated(child, path)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, child in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise InputError(f"{path}, line {line}: `{key.value}` is there twice; merge them")
            seen.add(key.value)
            _refuse_repeated(child, path)


def _explain(error: ValidationError, path: Path, text: str) -> str:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    faults = error.errors(include_url=False)
    # Where one of several types is possible, our own remark says more than each type's refusal.
    remarked = {_where(fault) for fault in faults if fault["type"] == "value_error"}
    lines = []
    for fault in faults:
        if fault["type"] != "value_error" and _where(fault) in remarked:
            continue
        keys = _where(fault)
        where = ".".join(map(str, keys)) or "the study"
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = "unknown key; config/README.md lists all keys"
        elif fault["type"] == "missing":
            message = "this key is required"
        elif not fault["type"].startswith("value_error"):
            message += f", found {fault['input']!r}"
        lines.append(f"{path}, line {_line(root, keys)}: {where}: {message}")
    return "\n".join(dict.fromkeys(lines))


def _where(fault: Mapping[str, Any]) -> tuple[int | str, ...]:
    return tuple(part for part in fault["loc"] if _is_key(part))


def _is_key(part: int | str) -> bool:
    """Pydantic's location also names validators and branches of unions: `function-after[...]`."""
    return isinstance(part, int) or re.fullmatch(r"[a-z0-9_.-]+", part, re.IGNORECASE) is not None


def _line(node: yaml.Node | None, keys: Sequence[int | str]) -> int:
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
        elif key not in ("study", "scale"):
            raise InputError(
                f"--config {key}: unknown; expected study, scale, model or DATASET_dir "
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


def _check_ranks(study: Study, path: Path) -> None:
    """A rank above the smaller side of an adapted matrix is a mistake: find it before any job.

    The shape is known from the study (a base that is trained here) or from the config.json of a
    model folder; a hub model is checked again when it is there.
    """
    model = study.base.model
    if study.base.pretrain:
        limit = min(study.base.pretrain.hidden_size, study.base.pretrain.intermediate_size)
    elif model and is_local(model):
        config = Path(model).expanduser() / "config.json"
        if not config.is_file():
            raise InputError(f"{path}: base.model: {model} has no config.json, so it is no model")
        try:
            limit = smallest_side(read_json(config))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"{path}: base.model: {config} is not the configuration of a transformer: expected "
                "a JSON object with hidden_size and num_attention_heads"
            ) from None
    else:
        return
    for tuning in tunings(study):
        # The layers that are named may be wider; `adapters.attach` looks at each of them.
        if tuning.target_modules == "all-linear" and (tuning.largest_rank or 0) > limit:
            what = "initial rank" if tuning.budget else "rank"
            raise InputError(
                f"{path}: methods: {what} {tuning.largest_rank} is larger than the smallest "
                f"adapted matrix, which has rank {limit}; take ranks up to {limit}"
            )


def smallest_side(config: Mapping[str, Any]) -> int:
    """Smallest dimension of a transformer's linear layers, from its config.json."""
    hidden = int(config.get("hidden_size") or config["n_embd"])
    heads = int(config.get("num_attention_heads") or config["n_head"])
    shared = int(config.get("num_key_value_heads") or heads)
    width = int(config.get("head_dim") or hidden // heads)
    sides = [hidden, shared * width, int(config.get("intermediate_size") or 4 * hidden)]
    return min(sides)
