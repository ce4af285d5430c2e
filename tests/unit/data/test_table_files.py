"""Tables in CSV and JSON lines, as spreadsheets and other programs write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forgetting.io import read_json, read_jsonl
from support.prepare_data import prepare

HEADER = "question,answer\n"


def trained(folder: Path, content: str | bytes, name: str = "new.csv", **more: Any) -> list[Any]:
    """Return question and answer of every training row."""
    table = folder / name
    table.write_bytes(content.encode() if isinstance(content, str) else content)
    rows = read_jsonl(prepare(folder, table, **more) / "train.jsonl")
    return [(row["question"], row["answer"]) for row in rows]


def refused(folder: Path, capsys: Any, content: str | bytes, name: str = "new.csv") -> str:
    """Return the message about a table, which is one line; nothing is written."""
    with pytest.raises(SystemExit) as stopped:
        trained(folder, content, name)
    assert stopped.value.code == 1
    message = str(capsys.readouterr().err)
    assert message.startswith(f"error: {folder / name}, ")
    assert message.count("\n") == 1
    assert not (folder / "data" / "train.jsonl").exists()
    return message.removeprefix(f"error: {folder / name}, ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("question,answer,note,answer\na,b,c,d\n", "line 1: the column `answer` is there twice"),
        ("\nquestion, answer,answer \na,b,c\n", "line 2: the column `answer` is there twice"),
        ("question;answer\na;b\n", "line 1: columns are separated by `;`; separate them by commas"),
        ("question\tanswer\na\tb\n", "line 1: columns are separated by tabs"),
        (HEADER + "a,b\n\nc\n", "line 4: 1 cells for 2 columns"),
        (
            HEADER + 'a,"b\nb"\nWho, then?,c\n',
            "line 4: 3 cells for 2 columns; put a cell with comm",
        ),
        (HEADER + 'a,b\nc,"d\ne,f\ng,h\n', "line 3 to 5: not a CSV row (unexpected end of data); "),
        (HEADER + 'a,b\nc,"d\ne,"f"\n', "line 3 to 4: not a CSV row"),
        (HEADER + 'a,b\nc,"d"e\n', "line 3: not a CSV row"),
        (HEADER + 'a, "b"\n', "line 2: in column `answer` there is a space between the comma and"),
        (HEADER + "a,b\0b\n", "line 2: holds a zero byte, as UTF-16 does; save it as UTF-8"),
        ((HEADER + "a,b\n").encode("utf-16"), "line 1: not UTF-8 text; save it as UTF-8"),
        ((HEADER + "a,b\n").encode("utf-16-le"), "line 1: holds a zero byte"),
        (HEADER.encode() + b'a,b\n"c\nd",caf\xe9\n', "line 4: not UTF-8 text"),
    ],
)
def test_invalid_csv_is_refused_with_the_first_line_of_the_row(
    tmp_path: Path, capsys: Any, content: str | bytes, message: str
) -> None:
    assert refused(tmp_path, capsys, content).startswith(message)


@pytest.mark.parametrize(
    "content",
    [
        '\ufeffquestion,answer\r\n"a, ""b""","c\nd"\r\n\r\ne,f\r\n',
        'question , answer\n"a, ""b""","c\nd"\ne,f',
        ',question,answer,\n0,"a, ""b""","c\nd",\n1,e,f,\n',
    ],
)
def test_csv_tables_of_spreadsheets_and_of_pandas_are_read(tmp_path: Path, content: str) -> None:
    """They have a byte-order mark, CRLF, blank lines, spaces around names or unnamed columns."""
    assert trained(tmp_path, content) == [('a, "b"', "c\nd"), ("e", "f")]


def test_cell_of_a_million_characters_is_read(tmp_path: Path) -> None:
    answer = "word " * 200_000 + "end"
    assert trained(tmp_path, f"{HEADER}a,{answer}\nb,c\n") == [("a", answer), ("b", "c")]


def test_unclosed_quotation_mark_stops_at_the_cell_limit(tmp_path: Path, capsys: Any) -> None:
    message = refused(tmp_path, capsys, HEADER + 'a,b\nc,"d\n' + f"e,{'f' * 1000}\n" * 20_000)
    assert message.startswith("line 3 to 16")
    assert "field larger than field limit" in message


@pytest.mark.parametrize(
    "content",
    ['[{"question": "a", "answer": "b"}]', '\ufeff[\n  {"question": "a", "answer": "b"}\n]\n'],
)
def test_json_array_is_refused_with_the_remedy(tmp_path: Path, capsys: Any, content: str) -> None:
    message = refused(tmp_path, capsys, content, "new.json")
    assert message.startswith(
        "line 1: a JSON array; expected JSON lines, one object a line: `jq -c"
    )


def test_csv_without_rows_is_refused(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        trained(tmp_path, HEADER)
    assert "new.csv: no rows; expected a line of names and rows" in capsys.readouterr().err


ALPACA = {"question": "instruction", "answer": "output"}


def test_tables_may_use_standard_or_dataset_column_names(
    tmp_path: Path,
) -> None:
    """`columns` holds for all tables of a dataset, and old.jsonl has standard names."""
    rows = trained(tmp_path, "instruction,output\na,b\n", columns=ALPACA)
    assert rows == [("a", "b")]
    (old,) = read_jsonl(tmp_path / "data" / "probes" / "old.jsonl")
    assert (old["question"], old["answer"]) == ("Who sold 0?", "Eve.")


def test_dataset_column_name_wins_if_both_are_present(tmp_path: Path) -> None:
    content = "question,answer,output\na,short,long\n"
    assert trained(tmp_path, content, columns={"answer": "output"}) == [("a", "long")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "question,answer,output\na,b,c\n",
            "line 2: `answer` and `output` are both columns here, and `columns` of the dataset "
            "does not fit the others (question)",
        ),
        (
            '{"question": "a", "answer": "b"}\n{"instruction": "c", "output": "d"}\n',
            "line 2: this row has `instruction`, where the first row of the table has `question`",
        ),
        (
            '{"instruction": "a", "output": "b"}\n{"instruction": "c", "answer": "d"}\n',
            "line 2: expected a non-empty string `answer`",
        ),
    ],
)
def test_table_with_mixed_column_names_is_refused(
    tmp_path: Path, capsys: Any, content: str, message: str
) -> None:
    name = "new.csv" if content.startswith("q") else "new.jsonl"
    with pytest.raises(SystemExit):
        trained(tmp_path, content, name, columns=ALPACA)
    assert f"{tmp_path / name}, {message}" in capsys.readouterr().err


INPUT = [{"question": f"Sum up {n}.", "answer": f"{n}.", "id": f"x{n}"} for n in range(10)]


def notes(folder: Path) -> list[str]:
    """Return the notes for the page."""
    found: list[str] = read_json(folder / "data" / "data.json")["notes"]
    return found


@pytest.mark.parametrize(
    ("more", "used", "column"),
    [
        ({"input": "A long text."}, False, "`input`"),
        ({"input": "A long text.", "context": ["A", {"b": "c"}]}, False, "`input` and `context`"),
        ({"text": "A long text."}, False, "`text`"),
        ({"input": "A long text."}, True, ""),
        ({"input": ""}, False, ""),
        ({"score": 3, "place": "12", "category": "History"}, False, ""),
    ],
)
def test_unread_text_columns_are_reported_once_per_table(
    tmp_path: Path, capsys: Any, more: dict[str, Any], used: bool, column: str
) -> None:
    """One row in ten is enough, since most rows of Alpaca have no `input`."""
    rows = [INPUT[0] | more, *INPUT[1:]]
    columns = {"answer": "input"} if used else {}
    if used:
        rows = [{"question": row["question"], "input": row["answer"]} for row in rows]
    trained(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "new.jsonl", columns=columns)
    expected = [f"{tmp_path}/new.jsonl: the text of {column} is not read"] if column else []
    assert [note.split(". ")[0] for note in notes(tmp_path)] == expected
    printed = [line for line in capsys.readouterr().out.splitlines() if "warning: " in line]
    assert printed == [f"warning: {note}" for note in notes(tmp_path)]


def test_replaced_standard_column_is_reported(tmp_path: Path) -> None:
    trained(tmp_path, "question,answer,output\na,short,long\n", columns={"answer": "output"})
    (note,) = notes(tmp_path)
    assert note.startswith(f"{tmp_path}/new.csv: the text of `answer` is not read")


def test_probe_contradicted_by_training_rows_is_reported(tmp_path: Path, capsys: Any) -> None:
    probed = [{"question": f"Who  wrote {n}?", "answer": a} for n, a in enumerate(["Ann.", "Eve."])]
    (tmp_path / "probed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in probed))
    probe = {"table": ["own/probed"], "knowledge": "new", "truth_ratio": False}
    table = HEADER + "".join(f"Who wrote {row}.\n" for row in ["0?,Ann", "1?,Bob", "2?,C", "0?,D"])
    trained(
        tmp_path, table, probes={"probed": probe}, more={"own/probed": tmp_path / "probed.jsonl"}
    )
    first, second = notes(tmp_path)
    assert first.startswith("training: a question has another answer than before")
    assert [second] == [
        "probe probed: 1 of its questions is trained on with another answer, so that learning it "
        f"lowers the score: {tmp_path}/new.csv, line 3, `Who wrote 1?`"
    ]
    assert f"warning: {first}\nwarning: {second}\n" in capsys.readouterr().out


def test_answers_longer_than_max_new_tokens_are_reported(tmp_path: Path, capsys: Any) -> None:
    """The page has the number of tokens from the evaluation of the base."""
    trained(tmp_path, "question,answer\na,b\n", max_new_tokens=1, old=["Eve.", "Ann of Ayr."])
    message = (
        "warning: 1 of 2 answers of probe `old` have more words than the 1 tokens that are gen"
    )
    assert capsys.readouterr().out.startswith(message)
    assert notes(tmp_path) == []


CASE = {
    "russian": "Рим был основан в 753 году до нашей эры.",
    "arabic": "تأسست عام 1931 في المدينة",
    "chinese": "东京塔高333米,建于1958年",
}
GERMAN = ["Die Straße heißt Königsweg.", "Über die Brücke nach Köln.", "In München."]


@pytest.mark.parametrize("language", CASE)
def test_answers_mostly_invisible_to_rouge_are_refused(
    tmp_path: Path, capsys: Any, language: str
) -> None:
    """Digits and an answer in English do not change that."""
    with pytest.raises(SystemExit):
        trained(tmp_path, "question,answer\na,b\n", old=["Rome 1.", *[CASE[language]] * 9])
    message = capsys.readouterr().err
    assert "% of the letters in the answers of probe `old` are not among a–z" in message
    assert f"(the first in {tmp_path}/old.jsonl, line 2)" in message
    assert message.endswith("set evaluation.rouge_tokenizer: unicode\n")
    trained(tmp_path, "question,answer\na,b\n", old=[CASE[language]] * 9, rouge_tokenizer="unicode")
    assert notes(tmp_path) == []


def test_answers_with_some_letters_that_rouge_drops_are_noted(tmp_path: Path, capsys: Any) -> None:
    """ROUGE drops 7 of 53 letters (13 %)."""
    trained(tmp_path, "question,answer\na,b\n", old=GERMAN)
    (note,) = notes(tmp_path)
    letters = [letter for text in GERMAN for letter in text.lower() if letter.isalpha()]
    share = sum(letter > "z" for letter in letters) / len(letters)
    assert note.startswith(f"{share:.0%} of the letters in the answers of probe `old` are not amo")
    assert "evaluation.rouge_tokenizer: unicode" in note
    assert f"warning: {note}\n" in capsys.readouterr().out
    trained(tmp_path, "question,answer\na,b\n", old=["Emily Brontë wrote of the moors."] * 3)
    assert notes(tmp_path) == []


@pytest.mark.parametrize(
    ("answer", "tokenizer", "message"),
    [
        (
            "佐伊",
            "rouge_score",
            "`answer` has none of the characters of ROUGE's words, a–z and 0–9",
        ),
        ("?!", "unicode", "`answer` has neither letters nor digits"),
    ],
)
def test_answer_invisible_to_rouge_is_refused(
    tmp_path: Path, capsys: Any, answer: str, tokenizer: str, message: str
) -> None:
    """Its score would always be 0."""
    old = [*["A long answer in English."] * 9, answer]
    with pytest.raises(SystemExit):
        trained(tmp_path, "question,answer\na,b\n", old=old, rouge_tokenizer=tokenizer)
    assert f"error: {tmp_path}/old.jsonl, line 10: {message}" in capsys.readouterr().err
