"""Sizes of a study's tables in rows, bytes and tokens, for planning its jobs.

Tables in a folder are counted. Sizes of published and of generated tables are listed below. Other
tables on the hub are guessed, and marked as guesses. Tokens are estimated from bytes, because no
tokenizer is loaded while jobs are planned.
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

from forgetting.config.data import ColumnsConfig, TableRef
from forgetting.config.study import StudyConfig
from forgetting.data.hub import HUB_TABLE_SIZES
from forgetting.data.table_files import columns_of, table_in_folder
from forgetting.data.tables import evenly_spaced


@dataclass(frozen=True)
class TableSize:
    """Number of rows of a table, and the mean size of its columns in bytes of UTF-8.

    Attributes:
        rows: number of rows.
        question: bytes of a question; 0 if the rows are plain text.
        answer: bytes of an answer, or of the text.
        paraphrase: bytes of a paraphrased answer; 0 if there is none.
        wrong_answer: bytes of a wrong answer.
        wrong_answers: number of wrong answers to a question.
        download: bytes of the table on the hub.
        is_exact: whether these are the numbers of the table itself, not a guess.
    """

    rows: int
    question: float
    answer: float
    paraphrase: float = 0.0
    wrong_answer: float = 0.0
    wrong_answers: int = 0
    download: float = 0.0
    is_exact: bool = True


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

UNKNOWN_SIZE = TableSize(10_000, 200, 400, download=6e6, is_exact=False)
SAMPLE_ROWS, MAX_FULL_READ_BYTES = 500, 2**24
"""Rows of a table in a folder that are measured, and size of the largest file that is read whole.

The number of rows of a larger file is estimated from its size.
"""


def bytes_per_token(vocab_size: int) -> float:
    """Return the estimated bytes per token of English text: 0.4 ln(vocab_size).

    The error is at most a fifth for vocabularies of 2,000 to 50,000 tokens. WikiText has 3.8 with
    Llama-2's 32,000 tokens, TOFU's answers have 5.0 with Phi's 51,200.
    """
    return 0.4 * math.log(vocab_size)


def table_size(study: StudyConfig, table: str) -> TableSize:
    """Return the size of a table of the study."""
    if file := table_in_folder(study, table):
        return _count_rows(file, study.columns(table))
    ref = TableRef.parse(table)
    if ref.origin(study) == "generated":
        return MICROWORLD_SIZES[ref.table]
    return PUBLISHED_SIZES.get((str(ref.config(study).hub), ref.table), UNKNOWN_SIZE)


@cache
def _count_rows(path: Path, columns: ColumnsConfig) -> TableSize:
    """Return the size of a table in a file, estimated from the first rows of a long file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        lines = list(islice(file, None if size <= MAX_FULL_READ_BYTES else SAMPLE_ROWS))
    read = sum(map(len, lines))
    count = max(1, round(len(lines) * size / max(1, read)))
    lines = list(evenly_spaced(lines, SAMPLE_ROWS))
    if path.suffix == ".csv":
        return TableSize(count, size / count / 2, size / count / 2)
    rows = [json.loads(line) for line in lines if line.strip()]
    names = columns_of(rows[0], columns, str(path)) if rows else {}

    def sizes(column: str) -> list[int]:
        values = (row.get(names.get(column, column)) for row in rows)
        return [len(str(value).encode()) for value in values if value]

    def mean(sizes: Sequence[int]) -> float:
        return fmean(sizes) if sizes else 0.0

    wrong = [row.get(names.get("perturbed_answer", "perturbed_answer")) or [] for row in rows]
    answers = sizes("answer") or sizes("text")
    if conversations := [row.get(names.get("messages", "messages")) or [] for row in rows]:
        answers = answers or [_conversation_bytes(messages) for messages in conversations]
    return TableSize(
        rows=count,
        question=mean(sizes("question")),
        answer=mean(answers),
        paraphrase=mean(sizes("paraphrased_answer")),
        wrong_answer=mean([len(str(answer).encode()) for answers in wrong for answer in answers]),
        wrong_answers=round(mean([len(answers) for answers in wrong])),
    )


def _conversation_bytes(messages: Sequence[dict[str, Any]]) -> int:
    """Return the bytes of all messages of a conversation."""
    return sum(len(str(message.get("content", "")).encode()) for message in messages)


@dataclass(frozen=True)
class TrainingSequences:
    """Size of the training data in sequences and tokens.

    Attributes:
        count: number of sequences in an epoch.
        tokens: mean tokens of a sequence.
        targets: fraction of the tokens that are targets.
        longest: estimated tokens of the longest sequence.
    """

    count: int
    tokens: float
    targets: float
    longest: float


def training_sequences(study: StudyConfig, vocab_size: int) -> TrainingSequences:
    """Return the size of the new knowledge: pairs, packed or not, and texts cut into blocks."""
    per_token, longest = bytes_per_token(vocab_size), study.training.max_length
    tables = [table_size(study, table) for table in study.train]
    rows = sum(table.rows for table in tables)
    fraction = min(1.0, (study.train_limit or rows) / rows)
    template = _prompt_bytes(study)
    pairs = [table for table in tables if table.question]
    # A sequence has two more tokens, at its beginning and its end.
    tokens = sum(t.rows * ((t.question + t.answer + template) / per_token + 2) for t in pairs)
    targets = sum(t.rows * (t.answer / per_token + 1) for t in pairs)
    text = sum(t.rows * (t.answer / per_token + 1) for t in tables if not t.question)
    blocks = text / longest
    if study.training.packing:
        blocks, tokens, targets, text = blocks + tokens / longest, 0.0, 0.0, text + tokens
    count = fraction * (blocks + (0 if study.training.packing else sum(t.rows for t in pairs)))
    mean = fraction * (tokens + text) / count
    return TrainingSequences(
        count=max(1, round(count)),
        tokens=min(mean, longest),
        targets=(targets + text) / (tokens + text),
        # The longest of TOFU's pairs have three times the mean tokens.
        longest=min(longest, 3.0 * mean if tokens else longest),
    )


def _prompt_bytes(study: StudyConfig) -> int:
    """Return the bytes of the prompt's text around question and answer."""
    return len(study.prompt.question) + len(study.prompt.answer) - len("{question}{answer}")


@dataclass(frozen=True)
class ProbeWorkload:
    """Size of one evaluation of a model in tokens.

    Attributes:
        count: number of questions.
        prompt: mean tokens of a question in its prompt.
        answer: mean tokens of a generated answer.
        scored: mean tokens of a question with all answers that are scored.
        text: tokens of the general text.
    """

    count: int
    prompt: float
    answer: float
    scored: float
    text: int


def probe_workload(study: StudyConfig, vocab_size: int) -> ProbeWorkload:
    """Return the size of an evaluation on all probes of a study and its general text."""
    per_token = bytes_per_token(vocab_size)
    template = _prompt_bytes(study)
    count, prompt, answer, scored = 0, 0.0, 0.0, 0.0
    for probe in study.probes.values():
        tables = [table_size(study, table) for table in probe.table]
        rows = sum(table.rows for table in tables)
        fraction = min(1.0, (probe.limit or rows) / rows)
        for table in tables:
            prompt_tokens = (table.question + template) / per_token
            answer_tokens = table.answer / per_token + 1
            wrong = table.wrong_answers * table.wrong_answer if probe.truth_ratio else 0.0
            other_tokens = (table.paraphrase + wrong) / per_token
            prompt += fraction * table.rows * prompt_tokens
            answer += fraction * table.rows * min(answer_tokens, study.evaluation.max_new_tokens)
            scored += fraction * table.rows * (prompt_tokens + answer_tokens + other_tokens)
        count += round(fraction * rows)
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
    """Return the bytes of the prepared training rows, including the keys of their JSON."""
    tables = [table_size(study, table) for table in study.train]
    return sum(table.rows * (table.question + table.answer + 100) for table in tables)


def document_tokens(study: StudyConfig) -> float:
    """Return the tokens of the documents on which a base is pretrained, in one epoch."""
    pretrain = study.base.pretrain
    if pretrain is None:
        return 0.0
    tables = [table_size(study, table) for table in pretrain.documents]
    rows = sum(table.rows for table in tables)
    size = sum(table.rows * (table.question + table.answer + 20) for table in tables)
    return size / bytes_per_token(pretrain.vocab_size) * min(1.0, (pretrain.limit or rows) / rows)
