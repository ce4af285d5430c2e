"""Read, check and subsample tables of rows of any length.

A probe row has TOFU's columns: question, answer, and optionally paraphrased_answer (a string) and
perturbed_answer (a list of wrong answers). After preparation it has id, question, answer,
paraphrased_answer (or null) and wrong_answers. A training row has question and answer, or messages,
or text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from forgetting.config.data import ColumnsConfig, PromptConfig
from forgetting.data.table_files import (
    STANDARD_COLUMNS,
    Row,
    describe_value,
    is_text,
    read_rows,
    required_text,
)
from forgetting.errors import InputError
from forgetting.io import check_file, read_jsonl, read_jsonl_numbered

Item = TypeVar("Item")
PROBE_COLUMNS = {"question", "answer", "paraphrased_answer", "perturbed_answer"}
MESSAGE_ROLES = ("system", "user", "assistant")


def evenly_spaced(rows: Sequence[Item], limit: int | None) -> Sequence[Item]:
    """Return at most `limit` rows, evenly spaced over the table, in its order."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index * len(rows) // limit] for index in range(limit)]


@dataclass(frozen=True)
class LazyRows:
    """Rows that are read from disk one by one, again at every iteration."""

    read: Callable[[], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        return self.read()

    def evenly_spaced(self, limit: int | None) -> Iterator[Row]:
        """Yield at most `limit` rows, those of the function `evenly_spaced`, and check all rows."""
        total = None if limit is None else sum(1 for _ in self)
        if limit is None or total is None or limit >= total:
            yield from self
            return
        numbers = (index * total // limit for index in range(limit))
        next_number = next(numbers)
        for number, row in enumerate(self):
            if number == next_number:
                yield row
                next_number = next(numbers, -1)


def prepared_rows(path: Path) -> LazyRows:
    """Return the rows of a file that `prepare_data` checked and wrote, for reading one by one."""
    check_file(path)
    return LazyRows(lambda: (row for _, row in read_jsonl_numbered(path)))


def read_prepared(path: Path) -> list[Row]:
    """Return all rows of a file that `prepare_data` wrote."""
    check_file(path)
    return read_jsonl(path)


def read_probe_rows(
    path: Path,
    table: str,
    *,
    wrong_answers: bool,
    probe: str = "",
    columns: ColumnsConfig = STANDARD_COLUMNS,
) -> list[Row]:
    """Read and check a table of questions and answers.

    Args:
        path: JSON lines.
        table: its name in the study, the first part of each row's id.
        wrong_answers: whether every row needs wrong answers.
        probe: name of the probe, for messages.
        columns: names of the columns in the dataset.

    Raises:
        InputError: names the file, the line and the column.
    """
    prepared = []
    for number, (where, row) in enumerate(read_rows(path, columns)):
        wrong = row.get("perturbed_answer") or []
        if wrong_answers and not wrong:
            raise InputError(
                f"{where}: no `perturbed_answer`, a list of wrong answers, which the truth ratio "
                f"of probe `{probe}` needs; add it, or set probes.{probe}.truth_ratio: false"
            )
        if not isinstance(wrong, list) or not all(is_text(answer) for answer in wrong):
            invalid = next(v for v in wrong if not is_text(v)) if isinstance(wrong, list) else wrong
            raise InputError(
                f"{where}: `perturbed_answer` must be a list of non-empty strings, found "
                f"{describe_value(invalid)}"
            )
        paraphrase = row.get("paraphrased_answer")
        if paraphrase is not None and not is_text(paraphrase):
            raise InputError(
                f"{where}: `paraphrased_answer` must be a non-empty string or absent, found "
                f"{describe_value(paraphrase)}"
            )
        answer = required_text(row, "answer", where)
        if wrong_answers:
            _check_wrong_answers(wrong, answer, paraphrase, where)
        prepared.append(
            {
                "id": f"{table}/{number}",
                "question": required_text(row, "question", where),
                "answer": answer,
                "paraphrased_answer": paraphrase,
                "wrong_answers": wrong,
            }
        )
    return prepared


def _check_wrong_answers(wrong: list[str], answer: str, paraphrase: str | None, where: str) -> None:
    """Refuse a right answer among the wrong ones, since the truth ratio compares the two."""
    for column, right in (("answer", answer), ("paraphrased_answer", paraphrase)):
        if right is not None and right.strip() in [text.strip() for text in wrong]:
            raise InputError(
                f"{where}: `{column}`, `{right.strip()[:80]}`, is among the wrong answers in "
                "`perturbed_answer`; take it out there"
            )


def document_texts(
    path: Path, prompt: PromptConfig, columns: ColumnsConfig = STANDARD_COLUMNS
) -> Iterator[str]:
    """Yield the pretraining documents of a table: `text`, or question and answer in the prompt.

    Conversations, and with `prompt.chat` also questions and answers, use the chat template of the
    small models that are pretrained here.
    """
    for row in read_training_rows(path, path.stem, columns):
        if "text" in row:
            yield row["text"]
        elif "messages" in row or prompt.chat:
            yield _conversation(prompt, row)
        else:
            yield prompt.render_question(row["question"]) + prompt.render_answer(row["answer"])


def _conversation(prompt: PromptConfig, row: Row) -> str:
    system = [] if prompt.system is None else [("system", prompt.system)]
    if "messages" in row:
        turns = [(message["role"], message["content"]) for message in row["messages"]]
        system = [] if turns[0][0] == "system" else system
    else:
        turns = [("user", row["question"]), ("assistant", row["answer"])]
    return "\n".join(f"{role.capitalize()}:\n{content}" for role, content in [*system, *turns])


def read_training_rows(
    path: Path, table: str, columns: ColumnsConfig = STANDARD_COLUMNS
) -> LazyRows:
    """Return training rows: each has an id, and question and answer, or messages, or text.

    Raises:
        InputError: while the rows are read; names the file, the line and the column.
    """

    def read() -> Iterator[Row]:
        for number, (where, row) in enumerate(read_rows(path, columns)):
            yield {"id": f"{table}/{number}", **_row_content(row, where)}

    return LazyRows(read)


def read_prompts(path: Path, table: str, columns: ColumnsConfig = STANDARD_COLUMNS) -> LazyRows:
    """Return questions without a right answer: each row has an id and a question.

    Raises:
        InputError: while the rows are read; names the file, the line and the column.
    """

    def read() -> Iterator[Row]:
        for number, (where, row) in enumerate(read_rows(path, columns)):
            yield {"id": f"{table}/{number}", "question": required_text(row, "question", where)}

    return LazyRows(read)


def _row_content(row: Mapping[str, Any], where: str) -> Row:
    if "question" in row:
        pair = {column: required_text(row, column, where) for column in ("question", "answer")}
        if not is_text(row.get("system")):
            return pair
        turns = zip(MESSAGE_ROLES, (row["system"], *pair.values()), strict=True)
        return {"messages": [{"role": role, "content": content} for role, content in turns]}
    if "messages" in row:
        return {"messages": _messages(row["messages"], where)}
    if "text" in row:
        return {"text": required_text(row, "text", where)}
    raise InputError(
        f"{where}: expected `question` and `answer`, `messages`, or `text`; the row has "
        f"{', '.join(row) or 'nothing'}; `columns` of the dataset can give other names"
    )


def content_columns(row: Mapping[str, Any]) -> set[str]:
    """Return the columns of a training row that `read_training_rows` reads."""
    if "question" in row:
        return {"question", "answer", "system"}
    return {"messages"} if "messages" in row else {"text"}


def _messages(messages: Any, where: str) -> list[Row]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise InputError(f"{where}: `messages` must be a list of objects with `role` and `content`")
    for number, message in enumerate(messages):
        if message.get("role") not in MESSAGE_ROLES:
            raise InputError(
                f"{where}: message {number} has role {message.get('role')!r}; expected one of "
                + ", ".join(MESSAGE_ROLES)
            )
        required_text(message, "content", f"{where}, message {number}")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles or roles[0] == "assistant":
        raise InputError(
            f"{where}: `messages` need an assistant's answer to learn, after something to answer"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def joined_text(path: Path, columns: ColumnsConfig = STANDARD_COLUMNS) -> list[str]:
    """Return the `text` of every row unchanged, including blank ones, for joining into one text.

    Raises:
        InputError: names the file, the line and the column.
    """
    texts = []
    for where, row in read_rows(path, columns):
        if "text" not in row:
            names = ", ".join(row) or "nothing"
            raise InputError(f"{where}: expected a string `text`; the row has {names}")
        if not isinstance(row["text"], str):
            raise InputError(
                f"{where}: expected a string `text`, found {describe_value(row['text'])}"
            )
        texts.append(row["text"])
    return texts
