"""Questions that stand in two places: trained on and asked as old knowledge, or answered twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from forgetting.data.table_files import Row, Where
from forgetting.records import InputError

REMEMBERED = 1_000_000
"""So many questions are compared with later ones: 100 MB of memory, whatever the table."""


def kept_apart(
    rows: Iterable[Row], old: Mapping[str, Sequence[Row]], where: Where
) -> Iterator[Row]:
    """The rows that are trained on, as they are, if none asks what a probe asks as old knowledge.

    Args:
        rows: what is trained on.
        old: the rows of every probe of old knowledge, by its name.
        where: for the message.

    Raises, when the rows are read:
        InputError: names the question and both its places.
    """
    asked = {_plain(row["question"]): (probe, row) for probe in old for row in old[probe]}
    for row in rows:
        question = _exchange(row)[1]
        if question in asked:
            probe, other = asked[question]
            raise InputError(
                f"{where(other['id'])}: the question `{_short(question)}` of probe `{probe}` is "
                f"trained on, too ({where(row['id'])}), so it would not tell what is forgotten; "
                "take one of the two rows out"
            )
        yield row


def contradictions(rows: Iterable[Row], found: list[Row]) -> Iterator[Row]:
    """The rows as they are; those that answer an earlier question otherwise are added to `found`.

    A question is another one after another system message. Of a conversation the first question and
    answer count.
    """
    answers: dict[int, int] = {}
    for row in rows:
        *asked, answer = _exchange(row)
        if answer:
            key = hash(tuple(asked))
            if answers.get(key, hash(answer)) != hash(answer):
                found.append(row)
            elif len(answers) < REMEMBERED:
                answers[key] = hash(answer)
        yield row


def contradiction_note(name: str, found: Sequence[Row], where: Where) -> list[str]:
    """What to say of them: nothing of none."""
    if not found:
        return []
    questions = f"{len(found)} questions have" if len(found) > 1 else "a question has"
    return [
        f"{name}: {questions} another answer than before, of which a model can give but one: "
        f"{where(found[0]['id'])}, `{_short(_exchange(found[0])[1])}`"
    ]


def disagreements(
    rows: Iterable[Row], probes: Mapping[str, Sequence[Row]], found: dict[str, list[Row]]
) -> Iterator[Row]:
    """Yield the rows that are trained on, and find those that answer a probe's question otherwise.

    Where another row has the answer that the probe expects, they are `contradictions` already.

    Args:
        rows: what is trained on.
        probes: the rows of the probes by name.
        found: by the name of a probe, the rows that disagree with it; complete after the last row.
    """
    expected = {
        name: {_plain(row["question"]): _plain(row["answer"]) for row in probe}
        for name, probe in probes.items()
    }
    other: dict[tuple[str, str], Row] = {}
    agreed: set[tuple[str, str]] = set()
    for row in rows:
        system, question, answer = _exchange(row)
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


def disagreement_notes(found: Mapping[str, Sequence[Row]], where: Where) -> list[str]:
    """Return a note on each probe that expects other answers than those that are trained on."""
    return [
        f"probe {name}: {len(rows)} of its questions "
        f"{'are' if len(rows) > 1 else 'is'} trained on with another answer, so that learning it "
        f"lowers the score: {where(rows[0]['id'])}, `{_short(_exchange(rows[0])[1])}`"
        for name, rows in found.items()
    ]


def _exchange(row: Row) -> tuple[str, str, str]:
    """System message, question and answer with which a row begins; empty if it has none."""
    if "question" in row:
        return "", _plain(row["question"]), _plain(row["answer"])
    said: dict[str, str] = {}
    for message in row.get("messages", []):
        if message["role"] in said:
            break
        said[message["role"]] = _plain(message["content"])
    return said.get("system", ""), said.get("user", ""), said.get("assistant", "")


def _plain(text: str) -> str:
    """A text whatever its spaces and line breaks."""
    return " ".join(text.split())


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
