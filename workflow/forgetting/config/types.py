"""Types of the study's keys: numbers with bounds, names, and sections that know their keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class KeyedError(ValueError):
    """A mistake that stands at a key below the section whose validator finds it."""

    def __init__(self, keys: tuple[str | int, ...], message: str) -> None:
        super().__init__(f"{'.'.join(map(str, keys))}: {message}")
        self.keys = keys
        self.message = message


def _number(value: Any) -> Any:
    """Refuse numbers that YAML reads as text, with the remedy; let everything else through."""
    if not isinstance(value, str):
        return value
    parts = re.fullmatch(r"([+-]?\d+)(?:\.(\d*))?[eE]([+-]?)(\d+)", value.strip())
    if parts is None:
        return value
    whole, fraction, sign, exponent = parts.groups()
    raise ValueError(
        f"'{value}' is text to YAML, which wants a dot and a sign in such numbers: "
        f"write {whole}.{fraction or 0}e{sign or '+'}{exponent}"
    )


def as_list(value: Any) -> Any:
    """One value where a list is expected is a list of one."""
    return value if isinstance(value, list) else [value]


def unique(values: list[Any]) -> list[Any]:
    """Refuse a list that names a value twice, as far as the names of runs can tell."""
    # Six digits of a rate or decay stand in the name of a run.
    if len({f"{v:g}" if isinstance(v, float) else v for v in values}) < len(values):
        raise ValueError(f"{values} names a value twice: each makes one run")
    return values


def _seed(value: int) -> int:
    if not -(2**31) <= value < 2**31:
        raise ValueError(f"a seed has 32 bits, from {-(2**31)} to {2**31 - 1}, found {value:.4g}")
    return value


Number = Annotated[float, BeforeValidator(_number)]
PositiveFloat = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Seed = Annotated[int, AfterValidator(_seed)]


MAX_NAME_LENGTH = 100
"""Names become parts of file names, which have at most 255 bytes."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"
TASK_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}$"
TABLE = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,99})+$"
_PART = "[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?"
REPOSITORY = f"^{_PART}/{_PART}$"
COMMIT = r"^[0-9a-f]{40}$"


def _matches(pattern: str, expected: str, value: str) -> str:
    if not re.fullmatch(pattern, value):
        raise ValueError(f"expected {expected}, found {value!r}")
    return value


def is_hub_name(value: str) -> str:
    """Return the name of a repository on the hub; refuse what the hub does not accept as one."""
    _matches(REPOSITORY, "OWNER/NAME, as on huggingface.co", value)
    if ".." in value or "--" in value or value.endswith(".git") or len(value) > 96:
        raise ValueError(
            f"expected OWNER/NAME, at most 96 characters without `..`, `--` and a final `.git`, "
            f"found {value!r}"
        )
    return value


def differ_beyond_case(names: Iterable[str]) -> None:
    """Refuse names that are one to file systems that ignore case."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise ValueError(
                f"`{other}` and `{name}` differ only in upper and lower case, and some file "
                "systems take them for one file; rename one"
            )


def _distinct_names(value: dict[str, Any]) -> dict[str, Any]:
    differ_beyond_case(value)
    return value


DistinctNames = AfterValidator(_distinct_names)
"""Of a mapping by name: the names differ by more than case."""

Name = Annotated[
    str,
    AfterValidator(
        partial(
            _matches,
            NAME,
            f"a name of at most {MAX_NAME_LENGTH} letters, digits, `_`, `.` and `-`, "
            "with a letter or digit first",
        )
    ),
    Field(json_schema_extra={"pattern": NAME}),
]
TaskName = Annotated[
    str,
    AfterValidator(
        partial(
            _matches,
            TASK_NAME,
            f"a task's name of at most {MAX_NAME_LENGTH} letters, digits, `_`, `.`, `+` and `-`, "
            "with a letter, digit or `_` first",
        )
    ),
    Field(json_schema_extra={"pattern": TASK_NAME}),
]
Table = Annotated[
    str,
    AfterValidator(
        partial(
            _matches,
            TABLE,
            "DATASET/TABLE, of letters, digits, `_`, `.` and `-`, without `..` and with at most "
            f"{MAX_NAME_LENGTH} characters in each part",
        )
    ),
    Field(json_schema_extra={"pattern": TABLE}),
]
HubRepository = Annotated[
    str, AfterValidator(is_hub_name), Field(json_schema_extra={"pattern": REPOSITORY})
]
GitCommit = Annotated[
    str,
    AfterValidator(partial(_matches, COMMIT, "a commit, 40 hexadecimal digits in lower case")),
    Field(json_schema_extra={"pattern": COMMIT}),
]


class ConfigModel(BaseModel):
    """A section of the configuration: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


KeyPath = tuple[str | int, ...]
"""The way to a value: names of sections and keys, numbers in lists."""


LocateKey = Callable[..., str]
"""Gives the beginning of a message about the value at some keys: where it was written."""


def dotted(*keys: str | int) -> str:
    """Keys in one word: `methods.0.rank`."""
    return ".".join(map(str, keys))
