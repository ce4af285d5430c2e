"""Types of study keys: bounded numbers, names, and the base class of all sections."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class KeyedError(ValueError):
    """A mistake at a key below the section whose validator reports it."""

    def __init__(self, keys: tuple[str | int, ...], message: str) -> None:
        super().__init__(f"{'.'.join(map(str, keys))}: {message}")
        self.keys = keys
        self.message = message


def _number(value: Any) -> Any:
    """Return the value unchanged; raise ValueError for a number that YAML reads as text."""
    if not isinstance(value, str):
        return value
    parts = re.fullmatch(r"([+-]?\d+)(?:\.(\d*))?[eE]([+-]?)(\d+)", value.strip())
    if parts is None:
        return value
    whole, fraction, sign, exponent = parts.groups()
    raise ValueError(
        f"YAML reads '{value}' as text, because it needs a dot and a sign in such numbers: "
        f"write {whole}.{fraction or 0}e{sign or '+'}{exponent}"
    )


def as_list(value: Any) -> Any:
    """Return a single value as a list of one, and a list unchanged."""
    return value if isinstance(value, list) else [value]


def unique(values: list[Any]) -> list[Any]:
    """Return the list; raise ValueError if two values give the same run name."""
    # The name of a run has six digits of its learning rate and weight decay.
    if len({f"{v:g}" if isinstance(v, float) else v for v in values}) < len(values):
        raise ValueError(f"{values} names a value twice, and each value makes one run")
    return values


def _seed(value: int) -> int:
    if not -(2**31) <= value < 2**31:
        raise ValueError(
            f"expected a seed of 32 bits, from {-(2**31)} to {2**31 - 1}, found {value:.4g}"
        )
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
    """Return the name of a hub repository; raise ValueError if the hub does not accept it."""
    _matches(REPOSITORY, "OWNER/NAME, as on huggingface.co", value)
    if ".." in value or "--" in value or value.endswith(".git") or len(value) > 96:
        raise ValueError(
            "expected OWNER/NAME, at most 96 characters without `..`, `--` and a final `.git`, "
            f"found {value!r}"
        )
    return value


def differ_beyond_case(names: Iterable[str]) -> None:
    """Raise ValueError if two names are equal on file systems that ignore case."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise ValueError(
                f"`{other}` and `{name}` differ only in upper and lower case, which some file "
                "systems ignore; rename one"
            )


def _distinct_names(value: dict[str, Any]) -> dict[str, Any]:
    differ_beyond_case(value)
    return value


DistinctNames = AfterValidator(_distinct_names)
"""Validator of a mapping by name: the names differ by more than case."""

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
    """A section of a study: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some fields changed; raise KeyError if one is not a field.

        Pydantic adds unknown names as attributes, which hides a misspelled field.
        """
        if unknown := set(update or {}) - set(type(self).model_fields):
            raise KeyError(f"{type(self).__name__} has no field {', '.join(sorted(unknown))}")
        return super().model_copy(update=update, deep=deep)


KeyPath = tuple[str | int, ...]
"""Path to a value in a study: names of keys, and positions in lists."""


LocateKey = Callable[..., str]
"""Returns the beginning of a message about the value at the given keys: file, line and key."""


def dotted(*keys: str | int) -> str:
    """Return a key path as text: `methods.0.rank`."""
    return ".".join(map(str, keys))
