"""Questions that stand in two places: trained on and asked as old knowledge, or answered twice.

Where a prepared row comes from: its line in the user's file, for the messages of later jobs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from forgetting.data.table_files import Locate, Row, source_line
from forgetting.errors import InputError
from forgetting.io import read_json, read_jsonl_numbered


@dataclass(frozen=True)
class SourceLocator:
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
            return source_line(path, row_id)
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
            for number, row in read_jsonl_numbered(path) if path.is_file() else ():
                if row["id"] == row_id:
                    return f"{path}, line {number}"
        return row_id


MAX_REMEMBERED = 1_000_000
"""So many questions are compared with later ones: 100 MB of memory, whatever the table."""


def reject_leaked_questions(
    rows: Iterable[Row], old: Mapping[str, Sequence[Row]], where: Locate
) -> Iterator[Row]:
    """The rows that are trained on, as they are, if none asks what a probe asks as old knowledge.

    Args:
        rows: what is trained on.
        old: the rows of every probe of old knowledge, by its name.
        where: for the message.

    Raises, when the rows are read:
        InputError: names the question and both its places.
    """
    asked = {_normalized(row["question"]): (probe, row) for probe in old for row in old[probe]}
    for row in rows:
        question = _question_and_answer(row)[1]
        if question in asked:
            probe, other = asked[question]
            raise InputError(
                f"{where(other['id'])}: the question `{_shortened(question)}` of probe "
                f"`{probe}` is trained on, too ({where(row['id'])}), so it would not tell what is "
                "forgotten; take one of the two rows out"
            )
        yield row


def track_conflicting_answers(rows: Iterable[Row], found: list[Row]) -> Iterator[Row]:
    """The rows as they are; those that answer an earlier question otherwise are added to `found`.

    A question is another one after another system message. Of a conversation the first question and
    answer count.
    """
    answers: dict[int, int] = {}
    for row in rows:
        *asked, answer = _question_and_answer(row)
        if answer:
            key = hash(tuple(asked))
            if answers.get(key, hash(answer)) != hash(answer):
                found.append(row)
            elif len(answers) < MAX_REMEMBERED:
                answers[key] = hash(answer)
        yield row


def conflict_note(name: str, found: Sequence[Row], where: Locate) -> list[str]:
    """What to say of them: nothing of none."""
    if not found:
        return []
    questions = f"{len(found)} questions have" if len(found) > 1 else "a question has"
    return [
        f"{name}: {questions} another answer than before, of which a model can give but one: "
        f"{where(found[0]['id'])}, `{_shortened(_question_and_answer(found[0])[1])}`"
    ]


def conflicting_answers(
    rows: Iterable[Row], probes: Mapping[str, Sequence[Row]], found: dict[str, list[Row]]
) -> Iterator[Row]:
    """Yield the rows that are trained on, and find those that answer a probe's question otherwise.

    Where another row has the answer that the probe expects, they are `track_conflicting_answers`
    already.

    Args:
        rows: what is trained on.
        probes: the rows of the probes by name.
        found: by the name of a probe, the rows that disagree with it; complete after the last row.
    """
    expected = {
        name: {_normalized(row["question"]): _normalized(row["answer"]) for row in probe}
        for name, probe in probes.items()
    }
    other: dict[tuple[str, str], Row] = {}
    agreed: set[tuple[str, str]] = set()
    for row in rows:
        system, question, answer = _question_and_answer(row)
        for name, answers in expected.items():
            if answer and not system and question in answers:
                if answers[question] == answer:
                    agreed.add((name, question))
                else:
                    other.setdefault((name, question), row)
        yield row
    for (name, question), row in other.items():
        if (name, question) not in agreed:
            found.setdefault(name, []).append(row)


def conflicting_answer_notes(found: Mapping[str, Sequence[Row]], where: Locate) -> list[str]:
    """Return a note on each probe that expects other answers than those that are trained on."""
    return [
        f"probe {name}: {len(rows)} of its questions "
        f"{'are' if len(rows) > 1 else 'is'} trained on with another answer, so that learning it "
        f"lowers the score: {where(rows[0]['id'])}, "
        f"`{_shortened(_question_and_answer(rows[0])[1])}`"
        for name, rows in found.items()
    ]


def _question_and_answer(row: Row) -> tuple[str, str, str]:
    """System message, question and answer with which a row begins; empty if it has none."""
    if "question" in row:
        return "", _normalized(row["question"]), _normalized(row["answer"])
    said: dict[str, str] = {}
    for message in row.get("messages", []):
        if message["role"] in said:
            break
        said[message["role"]] = _normalized(message["content"])
    return said.get("system", ""), said.get("user", ""), said.get("assistant", "")


def _normalized(text: str) -> str:
    """A text whatever its spaces and line breaks."""
    return " ".join(text.split())


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
