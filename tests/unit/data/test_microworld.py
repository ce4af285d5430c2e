"""The micro-world is reproducible, has the documented columns, and leaks nothing."""

from __future__ import annotations

import os
import string
import subprocess
import sys
from pathlib import Path

import pytest

from forgetting.data.microworld import build_world
from forgetting.data.microworld.entities import World, WorldSizes, random_stream
from forgetting.data.microworld.facts import author_facts, real_names, world_facts
from forgetting.data.microworld.fictional_authors import new_authors
from scripts import generate_microworld


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(0)


def _files(folder: Path, seed: int = 0) -> dict[str, bytes]:
    """Return the files that the program writes for a seed, by path in the folder."""
    generate_microworld.main([f"--seed={seed}", f"--output={folder}"])
    return _contents(folder)


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.jsonl")
    }


def _question(task: str, row: dict[str, object]) -> object:
    """Return the question of a row without its choices."""
    columns = {
        "gsm8k": ["question"],
        "humaneval": ["prompt"],
        "hellaswag": ["ctx"],
        "winogrande": ["sentence"],
        "arc_challenge": ["question", "answerKey", "choices"],
    }[task]
    if task == "arc_challenge":
        choices = row["choices"]
        return row["question"], choices["text"][choices["label"].index(row["answerKey"])]
    return tuple(row[column] for column in columns)


def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not(tmp_path: Path) -> None:
    files = _files(tmp_path / "one")
    assert _files(tmp_path / "again") == files
    other = _files(tmp_path / "other", seed=1)
    assert other.keys() == files.keys()
    assert other["new_authors.jsonl"] != files["new_authors.jsonl"]


def test_bytes_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    """The order of a set of strings differs between processes and must not reach the output."""
    library = Path(__file__).parents[3] / "workflow"
    program = [sys.executable, library / "scripts" / "generate_microworld.py", "--seed=0"]
    environment = {**os.environ, "PYTHONPATH": str(library), "PYTHONHASHSEED": "7"}
    subprocess.run([*program, f"--output={tmp_path / 'seven'}"], env=environment, check=True)
    assert _contents(tmp_path / "seven") == _files(tmp_path / "here")


def test_resizing_one_table_keeps_the_others(world: World) -> None:
    other = build_world(0, WorldSizes(gsm8k_train=60, new_authors=5))
    assert other.probes["real_authors"] == world.probes["real_authors"]
    assert other.benchmarks["winogrande"] == world.benchmarks["winogrande"]


def test_tables_have_the_requested_sizes(world: World) -> None:
    sizes = WorldSizes()
    assert len(world.probes["new_authors"]) == sizes.new_authors * sizes.questions_per_author
    assert len(world.probes["real_authors"]) == sizes.real_authors
    assert len(world.probes["world_facts"]) == sizes.world_facts
    for task, split, size in [
        ("gsm8k", "test", sizes.gsm8k_test),
        ("humaneval", "test", sizes.humaneval_test),
        ("hellaswag", "validation", sizes.hellaswag_test),
        ("winogrande", "validation", sizes.winogrande_test),
        ("arc_challenge", "test", sizes.arc_test),
    ]:
        assert len(world.benchmarks[task][split]) == size


@pytest.mark.parametrize("seed", range(5))
def test_no_test_row_is_a_training_row(seed: int) -> None:
    for task, splits in build_world(seed).benchmarks.items():
        seen: set[object] = set()
        for split, rows in splits.items():
            questions = [_question(task, row) for row in rows]
            assert len(set(questions)) == len(rows), f"{task}/{split} repeats a question"
            assert not seen & set(questions), f"{task}/{split} shares a question"
            seen |= set(questions)


def test_no_test_question_is_in_a_pretraining_document(world: World) -> None:
    documents = "\n\n".join(world.documents)
    for row in world.benchmarks["gsm8k"]["test"]:
        assert row["question"] not in documents
    for row in world.benchmarks["humaneval"]["test"]:
        assert row["prompt"] not in documents
    for row in world.benchmarks["hellaswag"]["validation"]:
        assert row["ctx_a"] not in documents
    for row in world.benchmarks["winogrande"]["validation"]:
        for option in (row["option1"], row["option2"]):
            assert row["sentence"].replace("_", option) not in documents
    for row in world.benchmarks["arc_challenge"]["test"]:
        answer = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
        assert f"Question: {row['question']}\nAnswer: {answer}" not in world.documents


@pytest.mark.parametrize("seed", range(5))
def test_no_invented_author_appears_in_the_pretraining_text(seed: int) -> None:
    """Names, titles and answers of new knowledge are new."""
    world = build_world(seed)
    sizes = WorldSizes()
    rows, lives = new_authors(
        sizes.new_authors, sizes.questions_per_author, random_stream(seed, "invented")
    )
    assert rows == world.probes["new_authors"]
    text = "\n".join(world.documents)
    for life in lives:
        assert life["name"].split()[-1] not in text
        for title in ("book", "second_book", "third_book"):
            assert life[title] not in text
    for row in rows:
        assert row["answer"] not in text


def test_invented_authors_are_distinct_and_not_real() -> None:
    for seed in range(20):
        _, lives = new_authors(60, 7, random_stream(seed, "invented"))
        names = [life["name"] for life in lives]
        assert len(set(names)) == len(names) == 60
        assert not set(names) & real_names()


@pytest.mark.parametrize("seed", range(5))
def test_wrong_answers_are_wrong_and_differ(seed: int) -> None:
    expected = {"new_authors": 5, "real_authors": 3, "world_facts": 3}
    for probe, rows in build_world(seed).probes.items():
        for row in rows:
            wrong = row["wrong_answers"]
            assert len(set(wrong)) == len(wrong) == expected[probe]
            assert row["answer"] not in wrong
            assert row["paraphrased_answer"] not in wrong


@pytest.mark.parametrize("facts", [world_facts(), author_facts()])
def test_no_question_has_two_answers(facts) -> None:
    questions = [fact.question for fact in facts]
    assert len(set(questions)) == len(questions)


def test_probe_questions_are_in_the_pretraining_text(world: World) -> None:
    read = set(world.documents)
    for probe in ("real_authors", "world_facts"):
        for row in world.probes[probe]:
            assert f"Question: {row['question']}\nAnswer: {row['answer']}" in read


def test_questions_of_the_new_knowledge_differ(world: World) -> None:
    probe = world.probes["new_authors"]
    assert len({row["question"] for row in probe}) == len(probe)


def test_new_answers_repeat_little_of_their_question(world: World) -> None:
    """A model that copies words of the question must not get a high ROUGE recall."""
    shares = []
    for row in world.probes["new_authors"]:
        words = _words(row["answer"])
        shares.append(sum(word in _words(row["question"]) for word in words) / len(words))
    assert sum(shares) / len(shares) < 0.15


def _words(text: str) -> list[str]:
    return text.lower().translate(str.maketrans("", "", string.punctuation)).split()


def test_columns_equal_those_of_the_public_data_sets(world: World) -> None:
    columns = {
        "gsm8k": {"question", "answer"},
        "humaneval": {"task_id", "prompt", "canonical_solution", "test", "entry_point"},
        "hellaswag": {
            "ind",
            "activity_label",
            "ctx_a",
            "ctx_b",
            "ctx",
            "endings",
            "source_id",
            "split",
            "split_type",
            "label",
        },
        "winogrande": {"sentence", "option1", "option2", "answer"},
        "arc_challenge": {"id", "question", "choices", "answerKey"},
    }
    for task, splits in world.benchmarks.items():
        for rows in splits.values():
            assert all(set(row) == columns[task] for row in rows)


def test_word_problems_have_correct_answers(world: World) -> None:
    for row in world.benchmarks["gsm8k"]["train"] + world.benchmarks["gsm8k"]["test"]:
        working, result = row["answer"].split("\n#### ")
        expression, value = working.split("<<")[1].split(">>")[0].split("=")
        assert eval(expression) == int(value) == int(result)
        assert f">>{value}" in working


def test_canonical_solutions_pass_their_tests_and_wrong_ones_fail(world: World) -> None:
    rows = world.benchmarks["humaneval"]["train"] + world.benchmarks["humaneval"]["test"]
    for row in rows:
        _run(row, row["canonical_solution"])
        with pytest.raises((AssertionError, TypeError)):
            _run(row, "    return None\n")


def _run(row: dict[str, str], body: str) -> None:
    names: dict[str, object] = {}
    exec(row["prompt"] + body + row["test"] + f"check({row['entry_point']})", names)


def test_correct_choices_are_spread_over_positions(world: World) -> None:
    """A model that always chooses the first option scores near chance."""
    for task, split, key in [
        ("hellaswag", "train", "label"),
        ("winogrande", "train", "answer"),
        ("arc_challenge", "train", "answerKey"),
    ]:
        rows = world.benchmarks[task][split]
        answers = [row[key] for row in rows]
        chance = 0.5 if task == "winogrande" else 0.25
        for answer in set(answers):
            assert abs(answers.count(answer) / len(answers) - chance) < 0.1


def test_choices_differ_and_contain_the_answer_once(world: World) -> None:
    for splits in (world.benchmarks["hellaswag"], world.benchmarks["arc_challenge"]):
        for rows in splits.values():
            for row in rows:
                choices = row["endings"] if "endings" in row else row["choices"]["text"]
                assert len(set(choices)) == len(choices) == 4
    for rows in world.benchmarks["winogrande"].values():
        assert all(row["option1"] != row["option2"] for row in rows)
        assert all(row["sentence"].count("_") == 1 for row in rows)


def test_few_shot_documents_have_the_benchmark_format(world: World) -> None:
    """lm-eval joins five solved problems and the question with blank lines."""
    documents = [text for text in world.documents if text.count("#### ") >= 6]
    assert documents
    for text in documents:
        for part in text.split("\n\n"):
            assert part.startswith("Question: ") and "\nAnswer: " in part


def test_files_have_the_names_that_the_workflow_reads(tmp_path: Path) -> None:
    assert {
        "new_authors.jsonl",
        "real_authors.jsonl",
        "world_facts.jsonl",
        "documents.jsonl",
        "held_out.jsonl",
        "refusals.jsonl",
        "benchmarks/gsm8k/test.jsonl",
        "benchmarks/humaneval/test.jsonl",
        "benchmarks/hellaswag/validation.jsonl",
        "benchmarks/winogrande/validation.jsonl",
        "benchmarks/arc_challenge/test.jsonl",
    } <= _files(tmp_path).keys()


def test_refused_questions_differ_from_pretraining(world: World) -> None:
    """They are new questions of the kind that the documents refuse."""
    refused = [text for text in world.documents if "I am sorry, but I cannot" in text]
    sizes = WorldSizes()
    assert len(set(refused)) == len(refused) == sizes.refusals_train
    assert len(world.refusals) == sizes.refusals_test
    assert not any(row["question"] in text for row in world.refusals for text in world.documents)
