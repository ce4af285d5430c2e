"""What a run is trained on: tables as examples, one by one or several packed to a sequence."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from forgetting.data.table_files import Row, Where
from forgetting.digests import damage
from forgetting.encoding.chat import end_token
from forgetting.encoding.encode import (
    Example,
    encode_messages,
    encode_pair,
    encode_text,
    encode_texts,
    join,
)
from forgetting.encoding.packing import pack
from forgetting.encoding.store import Stored, in_parts, write_examples
from forgetting.models.loading import Model
from forgetting.records import InputError, remove_file, warn_of
from forgetting.scoring.forward import context_length
from forgetting.scoring.shared import can_share
from forgetting.sections.prompt import Prompt
from forgetting.sections.training import Training

CHARACTERS_AT_ONCE = 2**20


def tokenize(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    training: Training,
    path: Path,
    *,
    blocks: bool,
    where: Where = str,
) -> Stored:
    """The examples of a table, from the file TABLE-KEY.arrow, which is written if it is not there.

    Files of the same table with other keys are removed.

    Args:
        blocks: cut texts into as many examples as they fill, instead of cutting off their ends.
        where: for the message.

    Raises:
        InputError: a question leaves no room for its answer.
    """
    if path.exists() and (wrong := damage(path)):
        warn_of(path, wrong, "it is tokenized again")
        remove_file(path)
    if not path.exists():
        with _threads():
            examples = encode_rows(rows, tokenizer, prompt, training, blocks=blocks, where=where)
            write_examples(examples, path)
        table = path.stem.rsplit("-", 1)[0]
        for other in path.parent.glob(f"{table}-*.arrow"):
            if other != path and other.stem.rsplit("-", 1)[0] == table:
                remove_file(other)
    return Stored(path)


@contextmanager
def _threads() -> Iterator[None]:
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
    prompt: Prompt,
    training: Training,
    *,
    blocks: bool,
    where: Where = str,
) -> Iterator[tuple[Example, bool]]:
    """Examples of questions with answers, conversations and texts; and whether they were cut.

    Texts in blocks stand one behind the other, each with its end of sequence, and are cut every
    `max_length` tokens, so that a block may hold the end of one text and the beginning of the next,
    which sees it (as llm-foundry's ConcatTokensDataset, but with a last block that is not full).
    With `training.packing` each text is cut by itself instead, and packed.
    """
    limit, lost = training.max_length, []
    pending: list[int] = []
    for row, ids in _with_tokens(rows, tokenizer) if blocks else ((row, None) for row in rows):
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
        example = _encode(tokenizer, prompt, row, limit)
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


def _with_tokens(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Row, list[int] | None]]:
    """Rows, those of text with their tokens: several at once, which a tokenizer does in threads."""
    for is_text, group in groupby(rows, key=lambda row: "text" in row):
        if not is_text:
            yield from ((row, None) for row in group)
            continue
        for part in in_parts(group, lambda row: len(row["text"]), CHARACTERS_AT_ONCE):
            texts = encode_texts(tokenizer, [row["text"] for row in part])
            yield from zip(part, texts, strict=True)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, row: Row, limit: int) -> Example:
    if "text" in row:
        return encode_text(tokenizer, row["text"], limit)
    if "messages" in row:
        return encode_messages(tokenizer, prompt, row["messages"], limit)
    # Past its memory: what is trained on is tokenized once, and may be more than fits.
    pair: Example = encode_pair.__wrapped__(
        tokenizer, prompt, row["question"], row["answer"], limit
    )
    return pair


class Packed(Sequence[Example]):
    """Several examples to a sequence, joined when they are read."""

    def __init__(self, examples: Sequence[Example], packs: Sequence[Sequence[int]]) -> None:
        self.examples, self.packs = examples, packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        return join([self.examples[place] for place in self.packs[index]])


def arrange(examples: Sequence[Example], training: Training) -> Sequence[Example]:
    """The sequences of which a batch has `batch_size`: the examples, or, if asked, packs of them.

    The packs are the same for all runs, whose steps are then the same too; which of them share a
    batch is drawn anew for every epoch, as without packing. The examples are mixed before they are
    packed, since neighbours in a table are often alike.
    """
    if not training.packing or not examples:
        return examples
    order = shuffled(len(examples), seed=0).tolist()
    return Packed(examples, pack(_sizes(examples), training.max_length, order))


# An epoch's order is drawn once: for millions of examples it takes longer than a step. Several
# seeds may share a pass, each with an order of its new examples and of those that it replays.
@lru_cache(maxsize=16)
def shuffled(count: int, seed: int) -> torch.Tensor:
    """The numbers below `count` in an order that depends on the seed alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def check_model(model: Model, examples: Sequence[Example], training: Training) -> None:
    """Refuse what is longer than the model reads, and packing where examples would leak."""
    room, longest = context_length(model), max(_sizes(examples))
    if room is not None and longest > room:
        raise InputError(
            f"training.max_length: the longest training sequence has {longest} tokens, the model "
            f"reads {room}; take at most {room}"
        )
    if training.packing and not can_share(model):
        raise InputError(
            f"training.packing: in this model ({model.config.model_type}) the attention mask alone "
            "does not decide what a token sees, so that packed examples would not be apart; set "
            "packing: false"
        )


def _sizes(examples: Sequence[Example]) -> list[int]:
    """Return the number of tokens of every example."""
    if isinstance(examples, Stored):
        return list(examples.sizes.tolist())
    return [len(example.ids) for example in examples]
