"""Datasets of tokenized examples, stored on disk and optionally packed into sequences.

A table is tokenized once and its examples are read by index, so that it need not fit into memory.
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
# Python integers take 36 bytes each until they are written.
TOKENS_PER_CHUNK = 2**16
CHARACTERS_PER_CHUNK = 2**20
MAX_OPEN_BINS = 64
"""Number of blocks that packing tries to fill; older ones are nearly full."""

Element = TypeVar("Element")


class TokenizedDataset(Sequence[Example]):
    """Examples in a memory-mapped file.

    Attributes:
        lengths: tokens of each example.
        cut: number of rows whose end was cut off.
    """

    def __init__(self, path: Path) -> None:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self._ids, self._prompt, self._spans = (table[name] for name in SCHEMA.names[:3])
        self.lengths: npt.NDArray[np.int32] = pc.list_value_length(self._ids).to_numpy()
        self.cut: int = pc.sum(table["cut"]).as_py() or 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        spans = iter(self._spans[index].values.to_pylist())
        return Example(
            self._ids[index].values.to_numpy().tolist(),
            self._prompt[index].as_py(),
            tuple(zip(spans, spans, strict=True)),
        )


def write_examples(examples: Iterable[tuple[Example, bool]], path: Path) -> None:
    """Write examples atomically, each with whether its end was cut off."""
    with (
        atomic_write(path) as temporary,
        temporary.open("wb") as file,
        pa.ipc.new_file(file, SCHEMA) as writer,
    ):
        for chunk in chunked(examples, lambda item: len(item[0].ids), TOKENS_PER_CHUNK):
            columns = {
                "ids": [example.ids for example, _ in chunk],
                "prompt": [example.prompt_length for example, _ in chunk],
                "spans": [[bound for span in e.spans for bound in span] for e, _ in chunk],
                "cut": [is_cut for _, is_cut in chunk],
            }
            writer.write_batch(pa.RecordBatch.from_pydict(columns, SCHEMA))


def chunked(
    items: Iterable[Element], size_of: Callable[[Element], int], chunk_size: int
) -> Iterator[list[Element]]:
    """Yield consecutive items in lists whose total size reaches `chunk_size`."""
    chunk: list[Element] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += size_of(item)
        if size >= chunk_size:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def tokenize(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    training: TrainingConfig,
    path: Path,
    *,
    blocks: bool,
    locate: Locate = str,
) -> TokenizedDataset:
    """Return the examples of a table; tokenize it unless its file TABLE-KEY.arrow exists.

    Files of the same table with other keys are removed.

    Args:
        rows: of the table.
        tokenizer: of the base model.
        prompt: text around questions and answers.
        training: holds the length of an example and whether examples are packed.
        path: of the file.
        blocks: whether texts fill as many examples as needed; otherwise their ends are cut off.
        locate: returns file and line of a row, for the message.

    Raises:
        InputError: `max_length` cuts the whole answer of a row.
    """
    if path.exists() and (fault := file_damage(path)):
        warn_damaged(path, fault, "it is tokenized again")
        remove_file(path)
    if not path.exists():
        with _tokenizer_threads():
            examples = encode_rows(rows, tokenizer, prompt, training, blocks=blocks, locate=locate)
            write_examples(examples, path)
        table = path.stem.rsplit("-", 1)[0]
        for other in path.parent.glob(f"{table}-*.arrow"):
            if other != path and other.stem.rsplit("-", 1)[0] == table:
                remove_file(other)
    return TokenizedDataset(path)


@contextmanager
def _tokenizer_threads() -> Iterator[None]:
    """Let the tokenizer use all cores, which programs disable elsewhere because they may fork."""
    previous = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if previous is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = previous


def encode_rows(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    training: TrainingConfig,
    *,
    blocks: bool,
    locate: Locate = str,
) -> Iterator[tuple[Example, bool]]:
    """Yield the examples of rows, each with whether its end was cut off.

    With `blocks`, texts are concatenated, each with an end-of-sequence token, and cut every
    `max_length` tokens. A block may hold the end of one text and the beginning of the next, which
    attends to it. This equals llm-foundry's ConcatTokensDataset, except that the last block may be
    shorter. With `training.packing`, each text is cut separately and packed later.

    Raises:
        InputError: `max_length` cuts the whole answer of a row.
    """
    limit, without_answer = training.max_length, []
    pending: list[int] = []
    for row, ids in _with_token_ids(rows, tokenizer) if blocks else ((row, None) for row in rows):
        if ids is not None:
            pending += ids
            end = len(pending) - len(pending) % limit
            for start in range(0, end, limit):
                yield Example(pending[start : start + limit], 1), False
            pending = pending[end:]
            if training.packing:
                if len(pending) > 1:
                    yield Example(pending, 1), False
                pending = []
            continue
        example = _encode_row(tokenizer, prompt, row, limit)
        if example.targets < 1:
            without_answer.append(row["id"])
        chat = "messages" in row or (prompt.chat and "text" not in row)
        yield example, example.ids[-1] != end_token(tokenizer, prompt, chat=chat)
    if len(pending) > 1:
        yield Example(pending, 1), False
    if without_answer:
        first, others = without_answer[0], len(without_answer) - 1
        raise InputError(
            f"training.max_length: {limit} tokens leave nothing of the answer in {locate(first)}"
            f"{f' and of {others} more' if others else ''}; make it longer"
        )


def _with_token_ids(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Row, list[int] | None]]:
    """Yield rows with the token ids of texts, which the tokenizer encodes in threads by chunks."""
    for is_text, group in groupby(rows, key=lambda row: "text" in row):
        if not is_text:
            yield from ((row, None) for row in group)
            continue
        for chunk in chunked(group, lambda row: len(row["text"]), CHARACTERS_PER_CHUNK):
            ids_of_texts = encode_texts(tokenizer, [row["text"] for row in chunk])
            yield from zip(chunk, ids_of_texts, strict=True)


def _encode_row(
    tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, row: Row, limit: int
) -> Example:
    if "text" in row:
        return encode_text(tokenizer, row["text"], limit)
    if "messages" in row:
        return encode_messages(tokenizer, prompt, row["messages"], limit)
    # Bypasses the cache: training rows are encoded once, and may not fit into it.
    pair: Example = encode_pair.__wrapped__(
        tokenizer, prompt, row["question"], row["answer"], limit
    )
    return pair


class PackedDataset(Sequence[Example]):
    """Packed sequences, each of several examples that are concatenated when it is read."""

    def __init__(self, examples: Sequence[Example], packs: Sequence[Sequence[int]]) -> None:
        self.examples, self.packs = examples, packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        return concatenate([self.examples[example] for example in self.packs[index]])


def pack_dataset(examples: Sequence[Example], training: TrainingConfig) -> Sequence[Example]:
    """Return the sequences to train on: the examples, or with `training.packing` packs of them.

    All runs use the same packs and therefore the same number of steps. Every epoch shuffles the
    packs. The examples are shuffled before packing, because neighbours in a table are often
    similar.
    """
    if not training.packing or not examples:
        return examples
    order = shuffled(len(examples), seed=0).tolist()
    return PackedDataset(examples, bin_pack(example_lengths(examples), training.max_length, order))


def bin_pack(lengths: Sequence[int], block: int, order: Sequence[int]) -> list[list[int]]:
    """Fill blocks with whole documents, first fit, and return the documents of each block.

    Args:
        lengths: tokens of each document, none above `block`.
        block: tokens that a block holds.
        order: the documents in the order in which they are packed.
    """
    blocks: list[list[int]] = []
    free: list[int] = []
    for document in order:
        oldest_open = max(0, len(blocks) - MAX_OPEN_BINS)
        for index in range(oldest_open, len(blocks)):
            if free[index] >= lengths[document]:
                break
        else:
            index = len(blocks)
            blocks.append([])
            free.append(block)
        blocks[index].append(document)
        free[index] -= lengths[document]
    return blocks


# Shuffling millions of examples takes longer than a step. A step needs one order of new examples
# and one of replayed examples, and two of each where an epoch ends.
@lru_cache(maxsize=4)
def shuffled(count: int, seed: int) -> torch.Tensor:
    """Return a permutation of the numbers below `count` that depends on the seed alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def example_lengths(examples: Sequence[Example]) -> list[int]:
    """Return the number of tokens of every example."""
    if isinstance(examples, TokenizedDataset):
        return list(examples.lengths.tolist())
    return [len(example.ids) for example in examples]
