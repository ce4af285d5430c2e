"""Question-answer tables: reading, checking and thinning them.

A source row has TOFU's columns: question, answer, and optionally paraphrased_answer (one string)
and perturbed_answer (a list of wrong answers). A prepared row has id, question, answer,
paraphrased_answer (or null) and wrong_answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from forgetting.records import InputError, read_numbered
from forgetting.study import Prompt

Row = dict[str, Any]
Item = TypeVar("Item")


def find_table(folder: Path, table: str) -> Path:
    """The file of a table in a folder: TABLE.jsonl or TABLE.json."""
    for suffix in (".jsonl", ".json"):
        path = folder / f"{table}{suffix}"
        if path.is_file():
            return path
    raise InputError(f"{folder}: there is no {table}.jsonl (nor .json) in this folder")


def evenly_spaced(rows: list[Item], limit: int | None) -> list[Item]:
    """At most `limit` rows, spread over the whole list, in its order."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index * len(rows) // limit] for index in range(limit)]


def prepare_rows(path: Path, table: str, *, wrong_answers: bool, probe: str = "") -> list[Row]:
    """Read and check one table of questions and answers.

    Args:
        path: JSON lines.
        table: its name in the study, the first part of each row's id.
        wrong_answers: must every row have wrong answers?
        probe: name of the probe that the rows are for, if they are; its answers are scored.

    Raises:
        InputError: names the file, the line and the column.
    """
    rows = read_numbered(path)
    if not rows:
        raise InputError(f"{path}: no rows; expected one JSON object a line")
    prepared = []
    for number, (line, row) in enumerate(rows):
        where = f"{path}, line {line}"
        wrong = row.get("perturbed_answer") or []
        if wrong_answers and not wrong:
            raise InputError(
                f"{where}: no `perturbed_answer`, a list of wrong answers, which the truth ratio "
                f"of probe `{probe}` needs; add it, or set probes.{probe}.truth_ratio: false"
            )
        if not isinstance(wrong, list) or not all(_is_text(answer) for answer in wrong):
            raise InputError(f"{where}: `perturbed_answer` must be a list of non-empty strings")
        paraphrase = row.get("paraphrased_answer")
        if paraphrase is not None and not _is_text(paraphrase):
            raise InputError(f"{where}: `paraphrased_answer` must be a non-empty string or absent")
        answer = _text(row, "answer", where)
        if probe and not re.search(r"[a-z0-9]", answer.lower()):
            raise InputError(
                f"{where}: ROUGE sees the letters a to z and digits only, and `answer` has none of "
                "them: it would always score 0"
            )
        prepared.append(
            {
                "id": f"{table}/{number}",
                "question": _text(row, "question", where),
                "answer": answer,
                "paraphrased_answer": paraphrase,
                "wrong_answers": wrong,
            }
        )
    return prepared


def document_texts(path: Path, prompt: Prompt) -> list[str]:
    """Training documents of a table: `text` as it is, questions and answers in the prompt.

    With `prompt.chat` that is the chat template of small models that are trained here.
    """
    return [_document(prompt, row) for row in general_rows(path, path.stem)]


def _document(prompt: Prompt, row: Row) -> str:
    if "text" in row:
        return str(row["text"])
    if not prompt.chat:
        return render_question(prompt, row["question"]) + render_answer(prompt, row["answer"])
    system = [] if prompt.system is None else [("system", prompt.system)]
    turns = [*system, ("user", row["question"]), ("assistant", row["answer"])]
    return "\n".join(f"{role.capitalize()}:\n{content}" for role, content in turns)


def general_rows(path: Path, table: str) -> list[Row]:
    """Rows of a table of general text: each an id, and `text` or `question` and `answer`.

    Raises:
        InputError: names the file, the line and the column.
    """
    rows = []
    for number, (line, row) in enumerate(read_numbered(path)):
        columns = ("text",) if _is_text(row.get("text")) else ("question", "answer")
        cells = {column: _text(row, column, f"{path}, line {line}") for column in columns}
        rows.append({"id": f"{table}/{number}", **cells})
    if not rows:
        raise InputError(f"{path}: no rows; expected one JSON object a line")
    return rows


def joined_text(path: Path) -> list[str]:
    """The `text` of every row as it is, for a text that is read as one; blank rows count.

    Raises:
        InputError: names the file, the line and the column.
    """
    texts = []
    for line, row in read_numbered(path):
        if not isinstance(row.get("text"), str):
            found = ", ".join(row) or "nothing"
            raise InputError(f"{path}, line {line}: expected a string `text`; the row has {found}")
        texts.append(row["text"])
    return texts


def render_question(prompt: Prompt, question: str) -> str:
    """The question's side of the prompt, as text."""
    return prompt.question.replace("{question}", question)


def render_answer(prompt: Prompt, answer: str) -> str:
    """The answer's side of the prompt, as text."""
    return prompt.answer.replace("{answer}", answer)


def strip_answer(prompt: Prompt, generated: str) -> str:
    """What was answered: the generation without the literal text that the template puts around."""
    before, after = prompt.answer.split("{answer}")
    text = generated.strip().removeprefix(before.strip())
    return text.removesuffix(after.strip()).strip() if after.strip() else text.strip()


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        found = ", ".join(row) or "nothing"
        raise InputError(f"{where}: expected a non-empty string `{column}`; the row has {found}")
    return value
