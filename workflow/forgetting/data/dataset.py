"""What a run is trained on: tables as examples, one by one or several packed to a sequence.

Examples on disk, tokenized once and read by index: a table need not fit into memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import PreTrainedTokenizerBase

from forgetting.config.data import PromptConfig
from forgetting.config.training import TrainingConfig
from forgetting.data.packing import bin_pack
from forgetting.data.table_files import Locate, Row
from forgetting.data.tokenize import (
    Example,
    concatenate,
    encode_messages,
    encode_pair,
    encode_text,
    encode_texts,
    end_token,
)
from forgetting.digests import file_damage
from forgetting.errors import InputError
from forgetting.io import atomic_write, remove_file, warn_damaged

SCHEMA = pa.schema(
    {
        "ids": pa.list_(pa.int32()),
        "prompt": pa.int32(),
        "spans": pa.list_(pa.int32()),
        "cut": pa.bool_(),
    }
)
# As Python's numbers they take 36 bytes each, until they are written.
TOKENS_PER_CHUNK = 2**16
Item = TypeVar("Item")


class TokenizedDataset(Sequence[Example]):
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
        atomic_write(path) as temporary,
        temporary.open("wb") as file,
        pa.ipc.new_file(file, SCHEMA) as writer,
    ):
        for part in chunked(examples, lambda item: len(item[0].ids), TOKENS_PER_CHUNK):
            columns = {
                "ids": [example.ids for example, _ in part],
                "prompt": [example.prompt_length for example, _ in part],
                "spans": [[place for span in e.spans for place in span] for e, _ in part],
                "cut": [cut for _, cut in part],
            }
            writer.write_batch(pa.RecordBatch.from_pydict(columns, SCHEMA))


def chunked(items: Iterable[Item], weigh: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
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


CHARACTERS_PER_CHUNK = 2**20


def tokenize(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    training: TrainingConfig,
    path: Path,
    *,
    blocks: bool,
    where: Locate = str,
) -> TokenizedDataset:
    """The examples of a table, from the file TABLE-KEY.arrow, which is written if it is not there.

    Files of the same table with other keys are removed.

    Args:
        blocks: cut texts into as many examples as they fill, instead of cutting off their ends.
        where: for the message.

    Raises:
        InputError: a question leaves no room for its answer.
    """
    if path.exists() and (wrong := file_damage(path)):
        warn_damaged(path, wrong, "it is tokenized again")
        remove_file(path)
    if not path.exists():
        with _tokenizer_threads():
            examples = encode_rows(rows, tokenizer, prompt, training, blocks=blocks, where=where)
            write_examples(examples, path)
        table = path.stem.rsplit("-", 1)[0]
        for other in path.parent.glob(f"{table}-*.arrow"):
            if other != path and other.stem.rsplit("-", 1)[0] == table:
                remove_file(other)
    return TokenizedDataset(path)


@contextmanager
def _tokenizer_threads() -> Iterator[None]:
    """Let the tokenizer use all cores, which it is otherwise told not to, as programs may fork."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def encode_rows(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    training: TrainingConfig,
    *,
    blocks: bool,
    where: Locate = str,
) -> Iterator[tuple[Example, bool]]:
    """Examples of questions with answers, conversations and texts; and whether they were cut.

    Texts in blocks stand one behind the other, each with its end of sequence, and are cut every
    `max_length` tokens, so that a block may hold the end of one text and the beginning of the next,
    which sees it (as llm-foundry's ConcatTokensDataset, but with a last block that is not full).
    With `training.packing` each text is cut by itself instead, and packed.
    """
    limit, lost = training.max_length, []
    pending: list[int] = []
    for row, ids in _with_token_ids(rows, tokenizer) if blocks else ((row, None) for row in rows):
        if ids is not None:
            pending += ids
            full = len(pending) - len(pending) % limit
            for start in range(0, full, limit):
                yield Example(pending[start : start + limit], 1), False
            pending = pending[full:]
            if training.packing:
                if len(pending) > 1:
                    yield Example(pending, 1), False
                pending = []
            continue
        example = _encode_rows(tokenizer, prompt, row, limit)
        if example.targets < 1:
            lost.append(row["id"])
        chat = "messages" in row or (prompt.chat and "text" not in row)
        yield example, example.ids[-1] != end_token(tokenizer, prompt, chat=chat)
    if len(pending) > 1:
        yield Example(pending, 1), False
    if lost:
        more = f" and of {len(lost) - 1} more" if len(lost) > 1 else ""
        raise InputError(
            f"training.max_length: {limit} tokens leave nothing of the answer in {where(lost[0])}"
            f"{more}; make it longer"
        )


def _with_token_ids(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Row, list[int] | None]]:
    """Rows, those of text with their tokens: several at once, which a tokenizer does in threads."""
    for is_text, group in groupby(rows, key=lambda row: "text" in row):
        if not is_text:
            yield from ((row, None) for row in group)
            continue
        for part in chunked(group, lambda row: len(row["text"]), CHARACTERS_PER_CHUNK):
            texts = encode_texts(tokenizer, [row["text"] for row in part])
            yield from zip(part, texts, strict=True)


def _encode_rows(
    tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, row: Row, limit: int
) -> Example:
    if "text" in row:
        return encode_text(tokenizer, row["text"], limit)
    if "messages" in row:
        return encode_messages(tokenizer, prompt, row["messages"], limit)
    # Past its memory: what is trained on is tokenized once, and may be more than fits.
    pair: Example = encode_pair.__wrapped__(
        tokenizer, prompt, row["question"], row["answer"], limit
    )
    return pair


class PackedDataset(Sequence[Example]):
    """Several examples to a sequence, joined when they are read."""

    def __init__(self, examples: Sequence[Example], packs: Sequence[Sequence[int]]) -> None:
        self.examples, self.packs = examples, packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        return concatenate([self.examples[place] for place in self.packs[index]])


def pack_dataset(examples: Sequence[Example], training: TrainingConfig) -> Sequence[Example]:
    """The sequences of which a batch has `batch_size`: the examples, or, if asked, packs of them.

    The packs are the same for all runs, whose steps are then the same too; which of them share a
    batch is drawn anew for every epoch, as without packing. The examples are mixed before they are
    packed, since neighbours in a table are often alike.
    """
    if not training.packing or not examples:
        return examples
    order = shuffled(len(examples), seed=0).tolist()
    return PackedDataset(examples, bin_pack(example_lengths(examples), training.max_length, order))


# An epoch's order is drawn once: for millions of examples it takes longer than a step. Several
# seeds may share a pass, each with an order of its new examples and of those that it replays.
@lru_cache(maxsize=16)
def shuffled(count: int, seed: int) -> torch.Tensor:
    """The numbers below `count` in an order that depends on the seed alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def example_lengths(examples: Sequence[Example]) -> list[int]:
    """Return the number of tokens of every example."""
    if isinstance(examples, TokenizedDataset):
        return list(examples.sizes.tolist())
    return [len(example.ids) for example in examples]
