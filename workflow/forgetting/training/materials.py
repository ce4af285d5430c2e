"""What the runs of a cohort share: what the study says of them, and what they are trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from forgetting.data.table_files import Row, Where
from forgetting.encoding.examples import tokenize
from forgetting.encoding.store import Stored
from forgetting.models.loading import Model
from forgetting.records import content_key
from forgetting.scoring.drift import BaseTargets
from forgetting.sections.columns import Columns
from forgetting.sections.fields import Strict
from forgetting.sections.measurement import Measurement
from forgetting.sections.prompt import Prompt
from forgetting.sections.selection import Selection
from forgetting.sections.training import Training
from forgetting.settings.plan import Tuning
from forgetting.training.team import ALONE, Team


class CohortSpec(Strict):
    """What the study says of the runs of one method and seed."""

    tuning: Tuning
    seed: int
    prompt: Prompt
    training: Training
    measurement: Measurement
    selection: Selection
    precision: str
    knowledge: dict[str, str]
    columns: dict[str, Columns] = Field(default_factory=dict)


@dataclass(frozen=True)
class Materials:
    """What all runs of a cohort share."""

    base: Path
    tokenizer: PreTrainedTokenizerBase
    train: Iterable[Row]
    probes: Mapping[str, list[Row]]
    base_value: float
    device: torch.device
    precision: torch.dtype
    general: Mapping[str, Iterable[Row]] = field(default_factory=dict)
    """Tables of general text that the method's mitigation reads."""
    targets: BaseTargets | None = None
    """What the base predicts on the study's general text."""
    along: Callable[[Model], pd.DataFrame] | None = None
    """Asks a model the benchmarks of every evaluation, if there are any."""
    team: Team = ALONE
    parameters: int | None = None
    """How many the base has, by its record."""
    where: Where = str
    """For messages: the file and the line of a row."""


@dataclass(frozen=True)
class Data:
    """The examples of the new knowledge and of the mitigation's tables."""

    train: Stored
    general: Mapping[str, Stored]


def tokenized(
    spec: CohortSpec, materials: Materials, inputs: Mapping[str, str], folder: Path
) -> Data:
    """All tables as examples, in files that all cohorts of a study share."""

    def read(table: str, rows: Iterable[Row], digest: str | None, blocks: bool) -> Stored:
        decided = {"digest": digest, "prompt": spec.prompt.model_dump(), "blocks": blocks}
        decided |= {name: inputs.get(name) for name in ("base", "versions")}
        decided |= {name: getattr(spec.training, name) for name in ("max_length", "packing")}
        if table in spec.columns:
            decided["columns"] = spec.columns[table].model_dump()
        path = folder / f"{table.replace('/', '-')}-{content_key(decided)}.arrow"
        return tokenize(
            rows,
            materials.tokenizer,
            spec.prompt,
            spec.training,
            path,
            blocks=blocks,
            where=materials.where,
        )

    return Data(
        read("train", materials.train, inputs.get("train"), blocks=True),
        {
            table: read(table, rows, inputs.get(f"table {table}"), blocks=False)
            for table, rows in materials.general.items()
        },
    )
