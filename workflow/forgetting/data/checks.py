"""Checks across tables: leaked questions and conflicting answers, reported with source lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from forgetting.data.table_files import Locate, Row, source_line, table_of_row
from forgetting.errors import InputError
from forgetting.io import read_json, read_jsonl_numbered


@dataclass(frozen=True)
class SourceLocator:
    """Find the file and the line of a row by its id, for messages.

    An id is TABLE/NUMBER, where numbers count from 0 and skip blank lines. If the user's table no
    longer exists, the line is that of the prepared row.

    Attributes:
        prepared: output folder of `prepare_data`, whose data.json lists the files of the tables.
        files: of tables that are read directly.
    """

    prepared: Path
    files: Mapping[str, Path] = field(default_factory=dict)

    def __call__(self, row_id: str) -> str:
        """Return file and line, such as `own/new.jsonl, line 21`."""
        path = (self._tables() | dict(self.files)).get(table_of_row(row_id))
        if path is None:
            return self._prepared_line(row_id)
        try:
            return source_line(path, row_id)
        except (InputError, OSError, StopIteration):
            return self._prepared_line(row_id)

    def _tables(self) -> dict[str, Path]:
        record = self.prepared / "data.json"
        if not record.is_file():
            return {}
        return {name: Path(file["path"]) for name, file in read_json(record)["tables"].items()}

    def _prepared_line(self, row_id: str) -> str:
        """Return file and line of the prepared row, or the id if there is none."""
        for path in [self.prepared / "train.jsonl", *sorted(self.prepared.glob("probes/*.jsonl"))]:
            for number, row in read_jsonl_numbered(path) if path.is_file() else ():
                if row["id"] == row_id:
                    return f"{path}, line {number}"
        return row_id


MAX_REMEMBERED = 1_000_000
"""Number of questions that are compared with later ones; limits the memory to 100 MB."""


def reject_leaked_questions(
    rows: Iterable[Row], retained: Mapping[str, Sequence[Row]], locate: Locate
) -> Iterator[Row]:
    """Yield the training rows unchanged after checking that no retained-knowledge probe asks them.

    Args:
        rows: training rows.
        retained: rows of every probe of retained knowledge, by its name.
        locate: returns file and line of a row, for the message.

    Raises:
        InputError: while the rows are read; names the question and both of its lines.
    """
    probe_questions = {
        _normalized(row["question"]): (probe, row) for probe in retained for row in retained[probe]
    }
    for row in rows:
        question = _question_and_answer(row)[1]
        if question in probe_questions:
            probe, other = probe_questions[question]
            raise InputError(
                f"{locate(other['id'])}: the question `{_shortened(question)}` of probe "
                f"`{probe}` is trained on, too ({locate(row['id'])}), so it would not show what is "
                "forgotten; take one of the two rows out"
            )
        yield row


def track_conflicting_answers(rows: Iterable[Row], conflicts: list[Row]) -> Iterator[Row]:
    """Yield the training rows unchanged and collect those that contradict an earlier answer.

    A different system message makes a different question. In a conversation only the first question
    and answer count.

    Args:
        rows: training rows.
        conflicts: receives the rows whose question had another answer before.
    """
    answers: dict[int, int] = {}
    for row in rows:
        *question, answer = _question_and_answer(row)
        if answer:
            key = hash(tuple(question))
            if answers.get(key, hash(answer)) != hash(answer):
                conflicts.append(row)
            elif len(answers) < MAX_REMEMBERED:
                answers[key] = hash(answer)
        yield row


def conflict_note(name: str, conflicts: Sequence[Row], locate: Locate) -> list[str]:
    """Return a note on the conflicting rows of a table, or an empty list without conflicts."""
    if not conflicts:
        return []
    questions = f"{len(conflicts)} questions have" if len(conflicts) > 1 else "a question has"
    return [
        f"{name}: {questions} another answer than before, but a model can give only one: "
        f"{locate(conflicts[0]['id'])}, `{_shortened(_question_and_answer(conflicts[0])[1])}`"
    ]


def conflicting_answers(
    rows: Iterable[Row], probes: Mapping[str, Sequence[Row]], conflicts: dict[str, list[Row]]
) -> Iterator[Row]:
    """Yield the training rows unchanged and collect those that contradict a probe.

    A question that another row answers as the probe expects is excluded, because
    `track_conflicting_answers` reports it.

    Args:
        rows: training rows.
        probes: the rows of the probes, by name.
        conflicts: receives the contradicting rows by the name of a probe, after the last row.
    """
    expected = {
        name: {_normalized(row["question"]): _normalized(row["answer"]) for row in probe}
        for name, probe in probes.items()
    }
    differing: dict[tuple[str, str], Row] = {}
    agreeing: set[tuple[str, str]] = set()
    for row in rows:
        system, question, answer = _question_and_answer(row)
        for name, answers in expected.items():
            if answer and not system and question in answers:
                if answers[question] == answer:
                    agreeing.add((name, question))
                else:
                    differing.setdefault((name, question), row)
        yield row
    for (name, question), row in differing.items():
        if (name, question) not in agreeing:
            conflicts.setdefault(name, []).append(row)


def conflicting_answer_notes(conflicts: Mapping[str, Sequence[Row]], locate: Locate) -> list[str]:
    """Return a note on each probe whose expected answers differ from the training rows."""
    return [
        f"probe {name}: {len(rows)} of its questions "
        f"{'are' if len(rows) > 1 else 'is'} trained on with another answer, so that learning it "
        f"lowers the score: {locate(rows[0]['id'])}, "
        f"`{_shortened(_question_and_answer(rows[0])[1])}`"
        for name, rows in conflicts.items()
    ]


def _question_and_answer(row: Row) -> tuple[str, str, str]:
    """Return the first system message, question and answer of a row; missing ones are empty."""
    if "question" in row:
        return "", _normalized(row["question"]), _normalized(row["answer"])
    contents: dict[str, str] = {}
    for message in row.get("messages", []):
        if message["role"] in contents:
            break
        contents[message["role"]] = _normalized(message["content"])
    return contents.get("system", ""), contents.get("user", ""), contents.get("assistant", "")


def _normalized(text: str) -> str:
    """Return a text with single spaces instead of all white space."""
    return " ".join(text.split())


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
