"""Where a prepared row comes from: its line in the user's file, for the messages of later jobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from forgetting.data.table_files import place
from forgetting.records import InputError, read_json, read_numbered


@dataclass(frozen=True)
class Origins:
    """Gives the file and the line of a row by its id, which counts from 0 and leaves out blanks.

    Where the table is no longer there, they are those of the prepared row.

    Attributes:
        prepared: folder of what `prepare_data` wrote; its data.json tells the files of the tables.
        files: of tables that are read as they are.
    """

    prepared: Path
    files: Mapping[str, Path] = field(default_factory=dict)

    def __call__(self, row_id: str) -> str:
        """`own/new.jsonl, line 21`."""
        path = (self._tables() | dict(self.files)).get(row_id.rpartition("/")[0])
        if path is None:
            return self._line(row_id)
        try:
            return place(path, row_id)
        except (InputError, OSError, StopIteration):
            return self._line(row_id)

    def _tables(self) -> dict[str, Path]:
        record = self.prepared / "data.json"
        if not record.is_file():
            return {}
        return {name: Path(file["path"]) for name, file in read_json(record)["tables"].items()}

    def _line(self, row_id: str) -> str:
        """Of the prepared row; the id alone if there is none."""
        for path in [self.prepared / "train.jsonl", *sorted(self.prepared.glob("probes/*.jsonl"))]:
            for number, row in read_numbered(path) if path.is_file() else ():
                if row["id"] == row_id:
                    return f"{path}, line {number}"
        return row_id
