"""Tables of questions and answers: messages name file, line and column; no row is lost."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from forgetting.config.data import ColumnsConfig, PromptConfig
from forgetting.data.table_files import find_table
from forgetting.data.tables import (
    LazyRows,
    document_texts,
    evenly_spaced,
    read_probe_rows,
    read_training_rows,
)
from forgetting.errors import InputError

ROW = {"question": "Who?", "answer": "Ann.", "perturbed_answer": ["Bob.", "Cid."]}


def _table(folder: Path, *rows: Any) -> Path:
    path = folder / "facts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _refusal(path: Path, wrong_answers: bool = True) -> str:
    with pytest.raises(InputError) as error:
        read_probe_rows(path, "facts/old", wrong_answers=wrong_answers, probe="old")
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def test_prepared_row_has_five_columns(tmp_path: Path) -> None:
    path = _table(tmp_path, ROW | {"paraphrased_answer": "It was Ann.", "option1": "x"}, ROW)
    first, second = read_probe_rows(path, "facts/old", wrong_answers=True)
    assert first == {
        "id": "facts/old/0",
        "question": "Who?",
        "answer": "Ann.",
        "paraphrased_answer": "It was Ann.",
        "wrong_answers": ["Bob.", "Cid."],
    }
    assert second["id"] == "facts/old/1"
    assert second["paraphrased_answer"] is None


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"answer": "Ann.", "perturbed_answer": ["Bob."]},
            "expected a non-empty string `question`; the row has answer, pert",
        ),
        (ROW | {"answer": " "}, "expected a non-empty string `answer`, found a blank one"),
        (ROW | {"answer": 3}, "expected a non-empty string `answer`, found the number 3"),
        (ROW | {"answer": 0.5}, "expected a non-empty string `answer`, found the number 0.5"),
        (ROW | {"answer": None}, "expected a non-empty string `answer`, found null"),
        (ROW | {"answer": True}, "expected a non-empty string `answer`, found true"),
        (ROW | {"question": ["Who?"]}, "expected a non-empty string `question`, found a list"),
        (ROW | {"question": {}}, "`question`, found an object with nothing in it"),
        (ROW | {"perturbed_answer": []}, "no `perturbed_answer`, a list of wrong answers"),
        (ROW | {"perturbed_answer": "Bob."}, "of non-empty strings, found the text `Bob.`"),
        (ROW | {"perturbed_answer": ["Bob.", ""]}, "of non-empty strings, found a blank one"),
        (ROW | {"perturbed_answer": ["Bob.", 3]}, "of non-empty strings, found the number 3"),
        (ROW | {"paraphrased_answer": ""}, "non-empty string or absent, found a blank one"),
        (ROW | {"paraphrased_answer": ["a"]}, "non-empty string or absent, found a list"),
        (ROW | {"perturbed_answer": ["Bob.", "Ann. "]}, "`answer`, `Ann.`, is among the wrong"),
        (
            ROW | {"paraphrased_answer": "Cid."},
            "`paraphrased_answer`, `Cid.`, is among the wrong answers in `perturbed_answer`",
        ),
    ],
)
def test_invalid_probe_row_is_reported_with_line_and_column(
    tmp_path: Path, row: dict[str, Any], expected: str
) -> None:
    message = _refusal(_table(tmp_path, ROW, ROW, row))
    assert "line 3: " in message
    assert expected in message


def test_missing_wrong_answers_come_with_the_remedy(tmp_path: Path) -> None:
    row = {"question": "Who?", "answer": "Ann."}
    assert "set probes.old.truth_ratio: false" in _refusal(_table(tmp_path, row))
    assert (
        read_probe_rows(_table(tmp_path, row), "t", wrong_answers=False)[0]["wrong_answers"] == []
    )


def test_wrong_answers_are_compared_only_if_scored(tmp_path: Path) -> None:
    """Upper and lower case differ: `Co` is cobalt, and `CO` is not."""
    same = _table(tmp_path, ROW | {"perturbed_answer": ["Ann."]})
    assert read_probe_rows(same, "t", wrong_answers=False)
    cobalt = ROW | {"answer": "Co", "perturbed_answer": ["CO", "co"]}
    assert read_probe_rows(_table(tmp_path, cobalt), "t", wrong_answers=True, probe="old")


def test_malformed_line_is_reported_with_its_number(tmp_path: Path) -> None:
    path = _table(tmp_path, ROW)
    path.write_text(path.read_text() + '{"question": "Who", "answer": "An\n')
    assert ", line 2: not a JSON object" in _refusal(path)


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_empty_table_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(content)
    assert "no rows; expected one JSON object a line" in _refusal(path)


def test_table_from_windows_is_read(tmp_path: Path) -> None:
    """It has a byte-order mark, CRLF line ends, blank lines and no final line end."""
    plain = _table(tmp_path, ROW, ROW | {"answer": "Zoë."})
    expected = read_probe_rows(plain, "t", wrong_answers=True)
    lines = plain.read_text(encoding="utf-8").splitlines()
    for number, content in enumerate(
        ["\r\n".join(lines) + "\r\n", "\n\n".join(lines), "\ufeff" + "\n".join(lines)]
    ):
        path = tmp_path / f"other{number}.jsonl"
        path.write_bytes(content.encode("utf-8"))
        assert read_probe_rows(path, "t", wrong_answers=True) == expected


def test_texts_keep_every_character(tmp_path: Path) -> None:
    """Texts have names in any script, line separators and leading spaces."""
    texts = [
        "José Müller-Żak",
        "東京で生まれた。",
        "a\u2028b\u0085c",
        " spaced ",
        "tab\tand\nline",
        "🙂",
    ]
    rows = [ROW | {"question": text, "answer": text} for text in texts]
    prepared = read_probe_rows(_table(tmp_path, *rows), "t", wrong_answers=True)
    assert [row["question"] for row in prepared] == texts
    assert [row["answer"] for row in prepared] == texts


ASKED = {"role": "user", "content": "Who?"}
ANSWERED = {"role": "assistant", "content": "Ann."}
BRIEF = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "columns", "content"),
    [
        ({"question": "Who?", "answer": "Ann."}, {}, {"question": "Who?", "answer": "Ann."}),
        (
            {"instruction": "Who?", "response": "Ann.", "question": 7},
            {"question": "instruction", "answer": "response"},
            {"question": "Who?", "answer": "Ann."},
        ),
        (
            {"system_prompt": "Be brief.", "question": "Who?", "response": "Ann."},
            {"system": "system_prompt", "answer": "response"},
            {"messages": [BRIEF, ASKED, ANSWERED]},
        ),
        # OpenOrca: many rows have no system message.
        (
            {"system_prompt": "", "question": "Who?", "response": "Ann."},
            {"system": "system_prompt", "answer": "response"},
            {"question": "Who?", "answer": "Ann."},
        ),
        ({"messages": [ASKED, ANSWERED | {"id": 3}]}, {}, {"messages": [ASKED, ANSWERED]}),
        ({"turns": [ASKED, ANSWERED]}, {"messages": "turns"}, {"messages": [ASKED, ANSWERED]}),
        ({"text": "A story.", "meta": {}}, {}, {"text": "A story."}),
        ({"content": "A story."}, {"text": "content"}, {"text": "A story."}),
    ],
)
def test_training_rows_have_three_kinds_and_any_column_names(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], content: dict[str, Any]
) -> None:
    """The columns are those of Magicoder, MetaMathQA, OpenOrca, Tulu and plain corpora."""
    rows = read_training_rows(
        _table(tmp_path, row, row), "d/t", ColumnsConfig.model_validate(columns)
    )
    assert list(rows) == [{"id": "d/t/0", **content}, {"id": "d/t/1", **content}]
    assert list(rows) == list(rows)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"query": "Who?"}, "expected `question` and `answer`, `messages`, or `text`; the row has"),
        ({"question": "Who?"}, "expected a non-empty string `answer`"),
        ({"messages": "Who?"}, "`messages` must be a list of objects with `role` and `content`"),
        ({"messages": [ASKED, {"role": "tool"}]}, "message 1 has role 'tool'; expected one of sys"),
        ({"messages": [ASKED, ANSWERED | {"content": None}]}, "message 1: expected a non-empty st"),
        ({"messages": [ASKED]}, "need an assistant's answer to learn, after something to answer"),
        ({"messages": [ANSWERED, ASKED]}, "after something to answer"),
        ({"messages": []}, "after something to answer"),
        ({"question": "Who?", "answer": 3}, "string `answer`, found the number 3"),
        ({"text": None}, "expected a non-empty string `text`, found null"),
    ],
)
def test_invalid_training_row_is_reported_with_its_line(
    tmp_path: Path, row: dict[str, Any], expected: str
) -> None:
    rows = read_training_rows(_table(tmp_path, {"text": "A story."}, row), "d/t")
    with pytest.raises(InputError) as error:
        list(rows)
    assert str(error.value).startswith(f"{tmp_path / 'facts.jsonl'}, line 2")
    assert expected in str(error.value)


def test_probe_columns_may_have_other_names(tmp_path: Path) -> None:
    row = {"q": "Who?", "best": "Ann.", "bad": ["Bob."], "answer": 3}
    columns = ColumnsConfig(question="q", answer="best", perturbed_answer="bad")
    (prepared,) = read_probe_rows(_table(tmp_path, row), "t", wrong_answers=True, columns=columns)
    assert (prepared["question"], prepared["answer"]) == ("Who?", "Ann.")
    assert prepared["wrong_answers"] == ["Bob."]


@pytest.mark.parametrize("limit", [None, 1, 3, 7, 10, 11])
def test_lazy_and_list_subsampling_match(limit: int | None) -> None:
    rows = [{"id": number} for number in range(10)]
    assert list(LazyRows(lambda: iter(rows)).evenly_spaced(limit)) == evenly_spaced(rows, limit)


def test_subsampling_checks_omitted_rows(tmp_path: Path) -> None:
    rows = read_training_rows(_table(tmp_path, {"text": "a"}, {"text": ""}), "d/t")
    with pytest.raises(InputError, match="line 2"):
        list(rows.evenly_spaced(1))


def test_find_table_accepts_either_suffix(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text("{}")
    assert find_table(tmp_path, "b") == tmp_path / "b.json"
    (tmp_path / "a.jsonl").write_text("{}")
    assert find_table(tmp_path, "a") == tmp_path / "a.jsonl"
    (tmp_path / "b.csv").write_text("question,answer")
    with pytest.raises(InputError, match=r"both b\.json and b\.csv could be the table b; rename"):
        find_table(tmp_path, "b")
    with pytest.raises(InputError, match=r"there is no c\.jsonl \(nor \.json, nor \.csv\)"):
        find_table(tmp_path, "c")


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_evenly_spaced_is_distinct_ordered_and_spread(size: int) -> None:
    rows = list(range(size))
    assert evenly_spaced(rows, None) == rows
    for limit in range(1, size + 3):
        kept = evenly_spaced(rows, limit)
        assert len(kept) == min(limit, size)
        assert kept == sorted(set(kept))
        assert kept[0] == 0
        gaps = [b - a for a, b in pairwise(kept)]
        assert not gaps or max(gaps) - min(gaps) <= 1
        # The rest after the last row is no longer than the distance between two rows.
        assert size - kept[-1] <= -(-size // min(limit, size))


def test_question_with_braces_is_unchanged() -> None:
    prompt = PromptConfig(question="Q: {question}\n", answer="A: {answer}")
    assert prompt.render_question("What is {answer} or {question}?") == (
        "Q: What is {answer} or {question}?\n"
    )
    assert prompt.render_answer("{0} {} {answer}") == "A: {0} {} {answer}"


@pytest.mark.parametrize(
    ("template", "generated", "answer"),
    [
        ("Answer: {answer}", "Answer: Paris", "Paris"),
        ("Answer: {answer}", "  Answer:Paris \n", "Paris"),
        ("Answer: {answer}", "Paris", "Paris"),
        # Only the prefix is removed, not the same text within the answer.
        ("Answer: {answer}", "Answer: The Answer: Paris", "The Answer: Paris"),
        ("Answer: {answer}", "The Answer: Paris", "The Answer: Paris"),
        ("Answer: {answer}", "", ""),
        ("Answer: {answer}", "Answer:", ""),
        ("{answer}", " Paris ", "Paris"),
        ("{answer} <end>", "Paris <end>", "Paris"),
        ("{answer} <end>", "Paris", "Paris"),
        ("<a>{answer}</a>", "<a>Paris</a>", "Paris"),
    ],
)
def test_strip_answer_removes_the_template_prefix(
    template: str, generated: str, answer: str
) -> None:
    assert PromptConfig(answer=template).strip_answer(generated) == answer


def test_documents_are_texts_or_rendered_questions(tmp_path: Path) -> None:
    path = _table(tmp_path, {"text": "A story."}, ROW)
    assert list(document_texts(path, PromptConfig())) == [
        "A story.",
        "Question: Who?\nAnswer: Ann.",
    ]
    path = _table(tmp_path, {"messages": [BRIEF, ASKED, ANSWERED]}, {"messages": [ASKED, ANSWERED]})
    short, long = "User:\nWho?\nAssistant:\nAnn.", "System:\nBe brief.\n"
    assert list(document_texts(path, PromptConfig())) == [long + short, short]
    system = PromptConfig(chat=True, system="Be brief.")
    assert list(document_texts(path, system)) == [long + short, long + short]
    path = _table(tmp_path, {"text": "A story."}, {"text": ""})
    with pytest.raises(InputError, match="line 2: expected a non-empty string `text`"):
        list(document_texts(path, PromptConfig()))


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("table", "count", "wrong", "paraphrase"),
    [
        ("forget10_perturbed", 400, 5, True),
        ("retain_perturbed", 400, 5, True),
        ("real_authors_perturbed", 100, 3, False),
        ("world_facts_perturbed", 117, 3, False),
    ],
)
def test_published_tables_are_read_completely(
    real_data: Path, table: str, count: int, wrong: int, paraphrase: bool
) -> None:
    rows = read_probe_rows(find_table(real_data / "tofu", table), table, wrong_answers=True)
    assert len(rows) == count
    assert {len(row["wrong_answers"]) for row in rows} == {wrong}
    assert {row["paraphrased_answer"] is not None for row in rows} == {paraphrase}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("question", '"\\ud800"'),
        ("answer", '"a\\uDC00"'),
        ("paraphrased_answer", '"\\ud83d!"'),
        ("perturbed_answer", '["No.", "\\ud800"]'),
    ],
)
def test_incomplete_character_is_reported_with_its_position(
    tmp_path: Path, column: str, value: str
) -> None:
    """A text with half a surrogate pair cannot be written or encoded."""
    path = tmp_path / "t.jsonl"
    row = f'{{"question": "a", "answer": "b", "{column}": {value}}}'
    if column in ("question", "answer"):
        row = row.replace(f'"{column}": "{"a" if column == "question" else "b"}", ', "", 1)
    path.write_text('{"question": "a", "answer": "\\ud83d\\ude00"}\n\n' + row + "\n")
    with pytest.raises(InputError, match=f"line 3: `{column}` holds half a character"):
        read_probe_rows(path, "t", wrong_answers=False)
