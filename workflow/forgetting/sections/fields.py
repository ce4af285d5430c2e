"""Types of the study's keys: numbers with bounds, names, and sections that know their keys."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class AtKey(ValueError):
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


def several(value: Any) -> Any:
    """One value where a list is expected is a list of one."""
    return value if isinstance(value, list) else [value]


def distinct(values: list[Any]) -> list[Any]:
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
Positive = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[Number, Field(ge=0, le=1)]
Seed = Annotated[int, AfterValidator(_seed)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=NAME)]
Table = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+/[A-Za-z0-9_./-]+$")]


class Strict(BaseModel):
    """A section of the configuration: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
