"""Tables of rows: reading, checking and thinning them, however long they are.

A row of a probe has TOFU's columns: question, answer, and optionally paraphrased_answer (one
string) and perturbed_answer (a list of wrong answers); prepared, it has id, question, answer,
paraphrased_answer (or null) and wrong_answers. A row to train on has question and answer, or
messages, or text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from forgetting.config.data import ColumnsConfig, PromptConfig
from forgetting.data.table_files import _PLAIN_TYPES, Row, is_text, list_names, read_rows, text_of
from forgetting.errors import InputError
from forgetting.io import check_file, read_jsonl, read_jsonl_numbered

Item = TypeVar("Item")
PROBE_COLUMNS = {"question", "answer", "paraphrased_answer", "perturbed_answer"}
MESSAGE_ROLES = ("system", "user", "assistant")


def evenly_spaced(rows: Sequence[Item], limit: int | None) -> Sequence[Item]:
    """At most `limit` rows, spread over the whole table, in its order."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index * len(rows) // limit] for index in range(limit)]


@dataclass(frozen=True)
class LazyRows:
    """Rows that are read one by one, anew whenever they are gone through, and never all held."""

    read: Callable[[], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        return self.read()

    def evenly_spaced(self, limit: int | None) -> Iterator[Row]:
        """At most `limit` of them, those that `evenly_spaced` takes; all are checked."""
        total = None if limit is None else sum(1 for _ in self)
        if limit is None or total is None or limit >= total:
            yield from self
            return
        wanted = (index * total // limit for index in range(limit))
        place = next(wanted)
        for number, row in enumerate(self):
            if number == place:
                yield row
                place = next(wanted, -1)


def prepared_rows(path: Path) -> LazyRows:
    """Rows that were checked when they were written."""
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
    columns: ColumnsConfig = _PLAIN_TYPES,
) -> list[Row]:
    """Read and check one table of questions and answers.

    Args:
        path: JSON lines.
        table: its name in the study, the first part of each row's id.
        wrong_answers: must every row have wrong answers?
        probe: name of the probe that the rows are for, if they are, for messages.
        columns: what the dataset calls them.

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
            faulty = next(v for v in wrong if not is_text(v)) if isinstance(wrong, list) else wrong
            raise InputError(
                f"{where}: `perturbed_answer` must be a list of non-empty strings, found "
                f"{list_names(faulty)}"
            )
        paraphrase = row.get("paraphrased_answer")
        if paraphrase is not None and not is_text(paraphrase):
            raise InputError(
                f"{where}: `paraphrased_answer` must be a non-empty string or absent, found "
                f"{list_names(paraphrase)}"
            )
        answer = text_of(row, "answer", where)
        if wrong_answers:
            _check_wrong(wrong, answer, paraphrase, where)
        prepared.append(
            {
                "id": f"{table}/{number}",
                "question": text_of(row, "question", where),
                "answer": answer,
                "paraphrased_answer": paraphrase,
                "wrong_answers": wrong,
            }
        )
    return prepared


def _check_wrong(wrong: list[str], answer: str, paraphrase: str | None, where: str) -> None:
    """What is right is not among what is wrong, where the truth ratio compares the two."""
    for column, right in (("answer", answer), ("paraphrased_answer", paraphrase)):
        if right is not None and right.strip() in [text.strip() for text in wrong]:
            raise InputError(
                f"{where}: `{column}`, `{right.strip()[:80]}`, is among the wrong answers in "
                "`perturbed_answer`; take it out there"
            )


def document_texts(
    path: Path, prompt: PromptConfig, columns: ColumnsConfig = _PLAIN_TYPES
) -> Iterator[str]:
    """Training documents of a table: `text` as it is, questions and answers in the prompt.

    Conversations, and with `prompt.chat` questions and answers too, are in the chat template of
    small models that are trained here.
    """
    for row in read_training_rows(path, path.stem, columns):
        if "text" in row:
            yield row["text"]
        elif "messages" in row or prompt.chat:
            yield _conversation(prompt, row)
        else:
            yield render_question(prompt, row["question"]) + render_answer(prompt, row["answer"])


def _conversation(prompt: PromptConfig, row: Row) -> str:
    system = [] if prompt.system is None else [("system", prompt.system)]
    if "messages" in row:
        turns = [(message["role"], message["content"]) for message in row["messages"]]
        system = [] if turns[0][0] == "system" else system
    else:
        turns = [("user", row["question"]), ("assistant", row["answer"])]
    return "\n".join(f"{role.capitalize()}:\n{content}" for role, content in [*system, *turns])


def read_training_rows(path: Path, table: str, columns: ColumnsConfig = _PLAIN_TYPES) -> LazyRows:
    """Rows to train on: each an id, and `question` and `answer`, or `messages`, or `text`.

    Raises, when the rows are read:
        InputError: names the file, the line and the column.
    """

    def read() -> Iterator[Row]:
        for number, (where, row) in enumerate(read_rows(path, columns)):
            yield {"id": f"{table}/{number}", **_row_content(row, where)}

    return LazyRows(read)


def read_prompts(path: Path, table: str, columns: ColumnsConfig = _PLAIN_TYPES) -> LazyRows:
    """Rows to which there is no right answer: each an id and `question`.

    Raises, when the rows are read:
        InputError: names the file, the line and the column.
    """

    def read() -> Iterator[Row]:
        for number, (where, row) in enumerate(read_rows(path, columns)):
            yield {"id": f"{table}/{number}", "question": text_of(row, "question", where)}

    return LazyRows(read)


def _row_content(row: Mapping[str, Any], where: str) -> Row:
    if "question" in row:
        pair = {column: text_of(row, column, where) for column in ("question", "answer")}
        if not is_text(row.get("system")):
            return pair
        said = zip(MESSAGE_ROLES, (row["system"], *pair.values()), strict=True)
        return {"messages": [{"role": role, "content": content} for role, content in said]}
    if "messages" in row:
        return {"messages": _messages(row["messages"], where)}
    if "text" in row:
        return {"text": text_of(row, "text", where)}
    raise InputError(
        f"{where}: expected `question` and `answer`, `messages`, or `text`; the row has "
        f"{', '.join(row) or 'nothing'}; `columns` of the dataset can give other names"
    )


def content_columns(row: Mapping[str, Any]) -> set[str]:
    """Return the columns of a row to train on that are read, as `read_training_rows` has it."""
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
        text_of(message, "content", f"{where}, message {number}")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles or roles[0] == "assistant":
        raise InputError(
            f"{where}: `messages` need an assistant's answer to learn, after something to answer"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def joined_text(path: Path, columns: ColumnsConfig = _PLAIN_TYPES) -> list[str]:
    """The `text` of every row as it is, for a text that is read as one; blank rows count.

    Raises:
        InputError: names the file, the line and the column.
    """
    texts = []
    for where, row in read_rows(path, columns):
        if "text" not in row:
            names = ", ".join(row) or "nothing"
            raise InputError(f"{where}: expected a string `text`; the row has {names}")
        if not isinstance(row["text"], str):
            raise InputError(f"{where}: expected a string `text`, found {list_names(row['text'])}")
        texts.append(row["text"])
    return texts


def render_question(prompt: PromptConfig, question: str) -> str:
    """The question's side of the prompt, as text."""
    return prompt.question.replace("{question}", question)


def render_answer(prompt: PromptConfig, answer: str) -> str:
    """The answer's side of the prompt, as text."""
    return prompt.answer.replace("{answer}", answer)


def strip_answer(prompt: PromptConfig, generated: str) -> str:
    """What was answered: the generation without the literal text that the template puts around."""
    before, after = prompt.answer.split("{answer}")
    text = generated.strip().removeprefix(before.strip())
    return text.removesuffix(after.strip()).strip() if after.strip() else text.strip()
