"""How much a study reads and writes: rows and tokens, before anything is here to be counted.

What lies in a folder is counted; the sizes of published and of generated tables stand below. Other
tables of the hub are guessed, and marked as such. Tokens follow from bytes, since no tokenizer is
loaded while jobs are planned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from forgetting.config.data import ColumnsConfig
from forgetting.config.study import StudyConfig
from forgetting.data.hub_datasets import HUB_TABLE_SIZES
from forgetting.data.table_files import columns_of, find_table
from forgetting.data.tables import evenly_spaced


@dataclass(frozen=True)
class TableSize:
    """A table in numbers: its rows, and means over them, in bytes of UTF-8.

    Attributes:
        rows: of the table.
        question: bytes of a question; 0 where the rows are plain text.
        answer: bytes of its answer, or of the text.
        right: bytes of the paraphrased answer, 0 if there is none.
        wrong: bytes of a wrong answer.
        wrongs: wrong answers to a question.
        download: bytes that are fetched from the hub for it.
        known: are these its own numbers, rather than a guess?
    """

    rows: int
    question: float
    answer: float
    right: float = 0.0
    wrong: float = 0.0
    wrongs: int = 0
    download: float = 0.0
    known: bool = True


PUBLISHED_SIZES = {key: TableSize(**size) for key, size in HUB_TABLE_SIZES.items()}
MICROWORLD_SIZES = {
    "new_authors": TableSize(70, 37, 24, 36, 36, 5),
    "real_authors": TableSize(80, 35, 9, 0, 9, 3),
    "world_facts": TableSize(80, 32, 8, 0, 9, 3),
    "documents": TableSize(2831, 0, 81),
    "held_out": TableSize(210, 0, 87),
    "refusals": TableSize(12, 52, 20),
}
"""Published tables, by dataset and name, and those of the micro-world."""

UNKNOWN_SIZE = TableSize(10_000, 200, 400, download=6e6, known=False)
SAMPLE, SHORT = 500, 2**24
"""So many rows of a table in a folder are measured. A file of more than so many bytes is not read
to its end: its size tells how many rows there are."""


def bytes_per_token(vocabulary: int) -> float:
    """Of English text: 0.4 ln(vocabulary), within a fifth for vocabularies of 2,000 to 50,000.

    WikiText under Llama-2's 32,000 tokens has 3.8, TOFU's answers under Phi's 51,200 have 5.0.
    """
    return 0.4 * math.log(vocabulary)


def table_size(study: StudyConfig, table: str) -> TableSize:
    """The numbers of a table of the study."""
    dataset, name = table.split("/", 1)
    origin = study.datasets[dataset]
    if origin.folder:
        return _count_rows(find_table(Path(origin.folder), name), origin.columns)
    if origin.generate:
        return MICROWORLD_SIZES[name]
    return PUBLISHED_SIZES.get((str(origin.hub), name), UNKNOWN_SIZE)


@cache
def _count_rows(path: Path, columns: ColumnsConfig) -> TableSize:
    """A table in a file, whose rows were checked before; of a long one the first are read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        lines = list(islice(file, None if size <= SHORT else SAMPLE))
    read = sum(map(len, lines))
    count = max(1, round(len(lines) * size / max(1, read)))
    lines = list(evenly_spaced(lines, SAMPLE))
    if path.suffix == ".csv":
        return TableSize(count, size / count / 2, size / count / 2)
    rows = [json.loads(line) for line in lines if line.strip()]
    names = columns_of(rows[0], columns, str(path)) if rows else {}

    def sizes(column: str) -> list[int]:
        found = (row.get(names.get(column, column)) for row in rows)
        return [len(str(value).encode()) for value in found if value]

    def mean(sizes: Sequence[int]) -> float:
        return fmean(sizes) if sizes else 0.0

    wrong = [row.get(names.get("perturbed_answer", "perturbed_answer")) or [] for row in rows]
    answers = sizes("answer") or sizes("text")
    if conversations := [row.get(names.get("messages", "messages")) or [] for row in rows]:
        answers = answers or [_known_size(messages) for messages in conversations]
    return TableSize(
        rows=count,
        question=mean(sizes("question")),
        answer=mean(answers),
        right=mean(sizes("paraphrased_answer")),
        wrong=mean([len(str(answer).encode()) for several in wrong for answer in several]),
        wrongs=round(mean([len(several) for several in wrong])),
    )


def _known_size(messages: Sequence[dict[str, Any]]) -> int:
    """Bytes of all that is said in a conversation."""
    return sum(len(str(message.get("content", "")).encode()) for message in messages)


@dataclass(frozen=True)
class TrainingSequences:
    """What a model is trained on, in tokens.

    Attributes:
        count: sequences in an epoch.
        tokens: of a sequence, on average.
        targets: share of the tokens that are predicted.
        longest: tokens of the longest sequence, about.
    """

    count: int
    tokens: float
    targets: float
    longest: float


def training_sequences(study: StudyConfig, vocabulary: int) -> TrainingSequences:
    """The new knowledge as sequences: pairs, packed or not; texts cut into blocks."""
    per_token, longest = bytes_per_token(vocabulary), study.training.max_length
    tables = [table_size(study, table) for table in study.train]
    rows = sum(table.rows for table in tables)
    share = min(1.0, (study.train_limit or rows) / rows)
    template = len(study.prompt.question) + len(study.prompt.answer) - len("{question}{answer}")
    pairs = [table for table in tables if table.question]
    # Two more tokens begin and end a sequence.
    tokens = sum(t.rows * ((t.question + t.answer + template) / per_token + 2) for t in pairs)
    targets = sum(t.rows * (t.answer / per_token + 1) for t in pairs)
    text = sum(t.rows * (t.answer / per_token + 1) for t in tables if not t.question)
    blocks = text / longest
    if study.training.packing:
        blocks, tokens, targets, text = blocks + tokens / longest, 0.0, 0.0, text + tokens
    count = share * (blocks + (0 if study.training.packing else sum(t.rows for t in pairs)))
    mean = share * (tokens + text) / count
    return TrainingSequences(
        count=max(1, round(count)),
        tokens=min(mean, longest),
        targets=(targets + text) / (tokens + text),
        # The longest of TOFU's pairs have thrice the tokens of the mean.
        longest=min(longest, 3.0 * mean if tokens else longest),
    )


@dataclass(frozen=True)
class ProbeWorkload:
    """What one evaluation of a model reads and writes, in tokens.

    Attributes:
        count: questions.
        prompt: tokens of a question in its prompt.
        answer: tokens that are generated, on average.
        scored: tokens of a question with all answers that are scored, read once.
        text: tokens of the general text.
    """

    count: int
    prompt: float
    answer: float
    scored: float
    text: int


def probe_workload(study: StudyConfig, vocabulary: int) -> ProbeWorkload:
    """All probes of a study, and its general text."""
    per_token = bytes_per_token(vocabulary)
    template = len(study.prompt.question) + len(study.prompt.answer) - len("{question}{answer}")
    count, prompt, answer, scored = 0, 0.0, 0.0, 0.0
    for probe in study.probes.values():
        tables = [table_size(study, table) for table in probe.table]
        rows = sum(table.rows for table in tables)
        share = min(1.0, (probe.limit or rows) / rows)
        for table in tables:
            asked, said = (table.question + template) / per_token, table.answer / per_token + 1
            others = table.right + (table.wrongs * table.wrong if probe.truth_ratio else 0.0)
            prompt += share * table.rows * asked
            answer += share * table.rows * min(said, study.evaluation.max_new_tokens)
            scored += share * table.rows * (asked + said + others / per_token)
        count += round(share * rows)
    text = study.general_text
    blocks = 0
    if text:
        table = table_size(study, text.table)
        blocks = int(table.rows * table.answer / per_token / text.block)
        blocks = min(blocks, text.limit or blocks)
    return ProbeWorkload(
        count=count,
        prompt=prompt / count,
        answer=answer / count,
        scored=scored / count,
        text=blocks * text.block if text else 0,
    )


def train_bytes(study: StudyConfig) -> float:
    """Bytes of the new knowledge as it is prepared, keys of its JSON included."""
    tables = [table_size(study, table) for table in study.train]
    return sum(table.rows * (table.question + table.answer + 100) for table in tables)


def document_tokens(study: StudyConfig) -> float:
    """Tokens of the documents that a base is pretrained on, once through."""
    spec = study.base.pretrain
    if spec is None:
        return 0.0
    tables = [table_size(study, table) for table in spec.documents]
    rows = sum(table.rows for table in tables)
    size = sum(table.rows * (table.question + table.answer + 20) for table in tables)
    return size / bytes_per_token(spec.vocab_size) * min(1.0, (spec.limit or rows) / rows)
