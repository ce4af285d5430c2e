"""Where the tables of a study come from."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from forgetting.sections.columns import Columns
from forgetting.sections.fields import Commit, Repository, Seed, Strict

WORLD_TABLES = (
    "new_authors",
    "real_authors",
    "world_facts",
    "documents",
    "held_out",
    "refusals",
)
"""What the generator of the micro-world makes."""


class Dataset(Strict):
    """Where tables of rows come from; `NAME/TABLE` elsewhere in the study means one of its tables.

    With `--config NAME_dir=FOLDER` the files are taken from a folder instead.
    """

    generate: Literal["micro-world"] | None = Field(
        None, description="Make the tables with the seeded generator of the micro-world."
    )
    seed: Seed = Field(0, description="Seed of the generator.")
    hub: Repository | None = Field(
        None, description="Dataset on the Hugging Face hub, as OWNER/NAME."
    )
    revision: Commit | None = Field(
        None, description="Commit of the hub dataset: 40 hexadecimal digits."
    )
    folder: Annotated[str, AfterValidator(os.path.expanduser)] | None = Field(
        None,
        description="Folder with TABLE.jsonl or TABLE.json (one JSON object a line), or TABLE.csv.",
    )
    columns: Columns = Columns()

    @model_validator(mode="after")
    def _one_origin(self) -> Dataset:
        given = [name for name in ("generate", "hub", "folder") if getattr(self, name)]
        if not given:
            raise ValueError("a dataset needs one of `generate`, `hub` or `folder`")
        if len(given) > 1:
            both = " and ".join(f"`{name}`" for name in given)
            raise ValueError(f"a dataset comes from one place, found {both}; take one of them out")
        if self.hub and not self.revision:
            raise ValueError("a hub dataset needs its `revision`, so that it cannot change")
        if self.generate and self.columns.renamed:
            raise ValueError("generated tables have their `columns`; leave them out")
        return self
