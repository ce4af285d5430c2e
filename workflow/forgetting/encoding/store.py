"""Examples on disk, tokenized once and read by index: a table need not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from forgetting.encoding.encode import Example
from forgetting.records import replacing

SCHEMA = pa.schema(
    {
        "ids": pa.list_(pa.int32()),
        "prompt": pa.int32(),
        "spans": pa.list_(pa.int32()),
        "cut": pa.bool_(),
    }
)
# As Python's numbers they take 36 bytes each, until they are written.
TOKENS_AT_ONCE = 2**16
Item = TypeVar("Item")


class Stored(Sequence[Example]):
    """Examples of a file that is mapped into memory, not read.

    Attributes:
        sizes: tokens of each.
        cut: number of rows of which the end was cut off.
    """

    def __init__(self, path: Path) -> None:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self._ids, self._prompt, self._spans = (table[name] for name in SCHEMA.names[:3])
        self.sizes: npt.NDArray[np.int32] = pc.list_value_length(self._ids).to_numpy()
        self.cut: int = pc.sum(table["cut"]).as_py() or 0

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        spans = iter(self._spans[index].values.to_pylist())
        return Example(
            self._ids[index].values.to_numpy().tolist(),
            self._prompt[index].as_py(),
            tuple(zip(spans, spans, strict=True)),
        )


def write_examples(examples: Iterable[tuple[Example, bool]], path: Path) -> None:
    """Write examples, and whether the end of each was cut off, whole or not at all."""
    with (
        replacing(path) as temporary,
        temporary.open("wb") as file,
        pa.ipc.new_file(file, SCHEMA) as writer,
    ):
        for part in in_parts(examples, lambda item: len(item[0].ids), TOKENS_AT_ONCE):
            columns = {
                "ids": [example.ids for example, _ in part],
                "prompt": [example.prompt for example, _ in part],
                "spans": [[place for span in e.spans for place in span] for e, _ in part],
                "cut": [cut for _, cut in part],
            }
            writer.write_batch(pa.RecordBatch.from_pydict(columns, SCHEMA))


def in_parts(
    items: Iterable[Item], weigh: Callable[[Item], int], most: int
) -> Iterator[list[Item]]:
    """Neighbours together, until they weigh so much; none is held longer than needed."""
    part: list[Item] = []
    weight = 0
    for item in items:
        part.append(item)
        weight += weigh(item)
        if weight >= most:
            yield part
            part, weight = [], 0
    if part:
        yield part
