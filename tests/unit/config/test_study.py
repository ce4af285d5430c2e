"""A mistake in a study or on the command line is one message: file, line or key, and remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from forgetting.config.expand import expand_methods
from forgetting.config.study import StudyConfig
from forgetting.errors import InputError
from forgetting.study.load import load_study, study_source
from forgetting.study.preflight import check_folders, check_inputs

STUDY = """\
title: A small study
seeds: [0, 1]
datasets:
  facts: {folder: FOLDER}
  world: {generate: micro-world}
base:
  pretrain:
    documents: [world/documents]
    hidden_size: 64
    intermediate_size: 128
train: facts/new
probes:
  new:
    table: facts/new
    knowledge: new
  old:
    table: facts/old
    knowledge: old
methods:
  - method: lora
    rank: [2, 8]
    learning_rate: [1.0e-3, 5.0e-3]
  - method: full
    learning_rate: 1.0e-4
    weight_decay: [0, 0.01]
selection:
  probe: new
  threshold: 0.9
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write the study with some of its text replaced, and the tables that it reads."""
    folder = tmp_path / "facts"
    folder.mkdir()
    row = {"question": "Who?", "answer": "Ann.", "perturbed_answer": ["Bob.", "Cid."]}
    for table, more in (("new", {}), ("old", {"question": "Where?", "answer": "Oslo."})):
        (folder / f"{table}.jsonl").write_text(json.dumps(row | more) + "\n")

    def with_changes(*changes: tuple[str, str]) -> Path:
        text = STUDY.replace("FOLDER", str(folder))
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / "small.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return with_changes


def _line(path: Path, part: str) -> int:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, start=1) if part in line)


def _told(path: Path, **config: Any) -> str:
    """The message of the one mistake, which is one line."""
    with pytest.raises(InputError) as error:
        _plan(path, **config)
    message = str(error.value)
    assert "\n" not in message, message
    return message


def _plan(path: Path, **config: Any) -> None:
    """What is read and checked before any job, as the Snakefile does it."""
    asked = {"study": str(path), **config}
    _, study = load_study(asked, path.parent)
    check_inputs(study, study_source(asked, path.parent).locate)


def _load(path: Path, **config: Any) -> StudyConfig:
    return load_study({"study": str(path), **config}, path.parent)[1]


def test_a_study_becomes_its_methods_and_settings(write: Any) -> None:
    name, study = load_study({"study": str(write())}, Path("nowhere"))
    assert name == "small"
    assert [tuning.name for tuning in expand_methods(study)] == ["lora-r2", "lora-r8", "full"]
    assert [len(tuning.hyperparameters) for tuning in expand_methods(study)] == [2, 2, 2]
    assert expand_methods(study)[2].hyperparameters[1].model_dump() == {
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
    }


def test_a_study_is_found_by_name_and_a_wrong_name_tells_the_known_ones(write: Any) -> None:
    path = write()
    assert load_study({"study": "small"}, path.parent)[0] == "small"
    with pytest.raises(InputError, match=r"study=smal: there is no .*; give one of small"):
        load_study({"study": "smal"}, path.parent)


THEN = "second_stage: {layers: all, learning_rate: 1.0}"
MISTAKES = {
    "unknown key": ("threshold: 0.9", "treshold: 0.9", "selection.treshold", "unknown key"),
    "unknown key at the top": ("seeds:", "seed:", "seed", "unknown key; config/README.md"),
    "wrong type": ("seeds: [0, 1]", "seeds: [0, many]", "seeds.1", "integer, found 'many'"),
    "text in place of a mapping": (
        "\ntrain:",
        "\ntraining: long\ntrain:",
        "training",
        "found 'long'",
    ),
    "number as text": ("1.0e-4", "1e-4", "methods.1.learning_rate.0", "write 1.0e-4"),
    "number as text in a list": ("5.0e-3]", "5e-3]", "methods.0.learning_rate.1", "5.0e-3"),
    "not a number": ("1.0e-4", "small", "methods.1.learning_rate.0", "number, found 'small'"),
    "negative": ("1.0e-4", "-1.0e-4", "methods.1.learning_rate.0", "greater than 0, found -0.0001"),
    "infinite": ("1.0e-4", ".inf", "methods.1.learning_rate.0", "found inf"),
    "true is no number": ("1.0e-4", "true", "methods.1.learning_rate.0", "number, found True"),
    "rank 0": ("[2, 8]", "[2, 0]", "methods.0.rank.1", "greater than or equal to 1, found 0"),
    "half a rank": ("[2, 8]", "[2, 8.5]", "methods.0.rank.1", "integer, found 8.5"),
    "same rank twice": ("[2, 8]", "[2, 2]", "methods.0.rank", "[2, 2] names a value twice"),
    "same rate twice": ("5.0e-3]", "1.0e-3]", "methods.0.learning_rate", "names a value twice"),
    "same seed twice": ("seeds: [0, 1]", "seeds: [1, 1]", "seeds", "names a value twice"),
    "unknown method": ("method: full", "method: fool", "methods.1.method", "found 'fool'"),
    "rank of full": ("method: full", "method: full\n    rank: 4", "methods.1", "has no `rank`"),
    "lora without rank": ("    rank: [2, 8]\n", "", "methods.0", "needs a `rank`"),
    **{
        f"no effect: {keys}": (
            "  - method: lora\n    rank: [2, 8]\n",
            f"  - {{{keys}, learning_rate: 1.0}}\n  - method: lora\n    rank: [2, 8]\n",
            "methods.0",
            told,
        )
        for keys, told in {
            "method: lora, rank: 2, adalora: {delta_t: 2}": "variant lora has no `adalora`",
            f"method: lora, rank: 2, {THEN}": "has no `second_stage`",
            "method: full, adalora: {}": "method full has no `adalora`",
            "method: full, embeddings: frozen, embedding_lr_ratio: 0.1": "needs `embeddings: "
            "trained`",
            "method: lora, rank: 2, embedding_lr_ratio: 0.1": "needs `embeddings: trained`",
            "method: lora, rank: 2, variant: adalora, loraplus_lr_ratio: 9.0": "adapters whose B",
            "method: hybrid, rank: 2": "needs a section `second_stage`",
            f"method: hybrid, {THEN}": "hybrid needs a `rank`",
            f"method: hybrid, rank: 2, embeddings: frozen, {THEN}": "hybrid has no `embeddings`",
            f"method: hybrid, rank: 2, variant: adalora, {THEN}": "starts from another variant",
        }.items()
    },
    "a duration without time": (
        "rank: [2, 8]",
        "rank: [2, 8]\n    variant: adalora\n    adalora: {tinit: 0.6, tfinal: 0.4}",
        "methods.0.adalora",
        "leave no time for the budget to fall",
    ),
    "layers in other words": (
        "  - method: lora\n    rank: [2, 8]",
        "  - method: hybrid\n    second_stage: {layers: [], learning_rate: 1.0}\n    rank: [2, 8]",
        "methods.0.second_stage.layers",
        "expected all, last N (such as last 4) or a list of names of modules, found []",
    ),
    "missing key": ("title: A small study\n", "", "title", "this key is required"),
    "missing key below": ("    knowledge: old\n", "", "probes.old.knowledge", "is required"),
    "threshold above 1": ("threshold: 0.9", "threshold: 90", "selection.threshold", "found 90"),
    "threshold 0": ("threshold: 0.9", "threshold: 0", "selection.threshold", "than 0, found 0"),
    "no evaluation on the way": (
        "\ntrain:",
        "\nevaluation: {every_epochs: 10.5}\ntrain:",
        "evaluation.every_epochs",
        "10.5 is more than training.epochs, 10, so that nothing would be measured",
    ),
    "deadline after the end": (
        "threshold: 0.9",
        "threshold: 0.9\n  hyperparameters: smallest-lr\n  deadline_epochs: 11",
        "selection.deadline_epochs",
        "11 is more than training.epochs, 10",
    ),
    **{
        f"only warm-up: {given}": ("\ntrain:", f"\ntraining: {{{given}}}\ntrain:", key, told)
        for given, key, told in [
            (
                "warmup_epochs: 10",
                "training.warmup_epochs",
                "10 leaves nothing of training.epochs, 10",
            ),
            (
                "warmup_epochs: 30",
                "training.warmup_epochs",
                "30 leaves nothing of training.epochs, 10",
            ),
            ("epochs: 1", "training.epochs", "1 leaves nothing after the warm-up, which"),
            ("warmup_ratio: 1", "training.warmup_ratio", "the warm-up takes all steps"),
        ]
    },
    "suffix that is no part of a name": (
        "rank: [2, 8]",
        "rank: [2, 8]\n    suffix: a/b",
        "methods.0.suffix",
        "expected a name of at most 100 letters",
    ),
    "bad alpha": (
        "rank: [2, 8]",
        "rank: [2, 8]\n    alpha: 1e2",
        "methods.0.alpha",
        "write 1.0e+2",
    ),
    "hub dataset without revision": (
        "{generate: micro-world}",
        "{hub: someone/something}",
        "datasets.world",
        "needs its `revision`",
    ),
    **{
        f"two origins: {given}": (
            "{generate: micro-world}",
            f"{{{given}}}",
            "datasets.world",
            f"a dataset comes from one place, found {told}",
        )
        for given, told in {
            "generate: micro-world, folder: .": "`generate` and `folder`",
            f"hub: a/b, revision: {'a' * 40}, folder: .": "`hub` and `folder`",
            f"generate: micro-world, hub: a/b, revision: {'a' * 40}": "`generate` and `hub`",
        }.items()
    },
    "dataset from nowhere": ("{generate: micro-world}", "{seed: 3}", "datasets.world", "one of"),
    "no base": ("  pretrain:", "  model: small\n  pretrain:", "base", "either `model` or"),
    "fixed outside the sweep": (
        "    learning_rate: 1.0e-4",
        "    learning_rate: 1.0e-4\n    selected_hyperparameters: {learning_rate: 2.0e-4}",
        "methods.1",
        "`selected_hyperparameters` are not among the",
    ),
    "deadline without rule": (
        "threshold: 0.9",
        "threshold: 0.9\n  deadline_epochs: 3.0",
        "selection",
        "belongs to `hyperparameters: smallest-lr`",
    ),
    "prompt without its question": (
        "\ntrain:",
        "\nprompt: {question: 'Q: '}\ntrain:",
        "prompt.question",
        "must hold {question} exactly once",
    ),
    "unknown dataset": ("train: facts/new", "train: fact/new", "train.0", "`fact` is not among"),
    "table without dataset": ("train: facts/new", "train: new", "train.0", "found 'new'"),
    "names a method has not": (
        "rank: [2, 8]",
        "rank: [2, 8]\n    target_modules: nope",
        "methods.0.target_modules",
        "'all-linear', 'attention' or 'mlp', or a valid list, found 'nope'",
    ),
    "no name of a layer": (
        "rank: [2, 8]",
        "rank: [2, 8]\n    target_modules: []",
        "methods.0.target_modules",
        "at least 1 item",
    ),
    "a number for a name": (
        "rank: [2, 8]",
        "rank: [2, 8]\n    target_modules: [q_proj, 1]",
        "methods.0.target_modules.1",
        "valid string, found 1",
    ),
    "alpha that is not a number": (
        "rank: [2, 8]",
        "rank: [2, 8]\n    alpha: .nan",
        "methods.0.alpha",
        "greater than 0, found nan",
    ),
    "all is dropped": (
        "rank: [2, 8]",
        "rank: [2, 8]\n    dropout: 1.0",
        "methods.0.dropout",
        "less than 1, found 1.0",
    ),
    "seed of more than 32 bits": ("[0, 1]", "[0, 2147483648]", "seeds.1", "32 bits"),
    "seed of a world": ("micro-world}", "micro-world, seed: 1e99}", "datasets.world.seed", "1e99"),
    "name of a probe": ("  old:", "  o/d:", "probes.o/d", "expected a name of at"),
    "old that is trained on": (
        "table: facts/old",
        "table: facts/new",
        "probes.old.table",
        "facts/new is trained on",
    ),
    "probe that is not there": ("probe: new", "probe: newer", "selection.probe", "`newer`"),
    "probe of old knowledge": ("probe: new", "probe: old", "selection.probe", "new knowledge"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_by_file_line_and_key(write: Any, mistake: str) -> None:
    old, new, key, told = MISTAKES[mistake]
    path = write((old, new))
    message = _told(path)
    assert message.startswith(f"{path}, line ")
    assert f": {key}: " in message
    assert told in message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("threshold: 0.9", "treshold: 0.9"),
        ("learning_rate: 1.0e-4", "learning_rate: 1e-4"),
        ("learning_rate: [1.0e-3, 5.0e-3]", "learning_rate: [1.0e-3, -5.0]"),
        ("knowledge: old", "knowledge: older"),
        ("hidden_size: 64", "hidden_size: wide"),
        ("  - method: full", "  - method: fool"),
    ],
)
def test_the_line_is_that_of_the_mistake(write: Any, old: str, new: str) -> None:
    path = write((old, new))
    assert f"{path}, line {_line(path, new)}: " in _told(path)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("table: facts/old", "table: fact/old", "table: fact/old"),
        ("table: facts/old", "table: facts/new", "table: facts/new\n    knowledge: old"),
        ("probe: new", "probe: newer", "probe: newer"),
        ("documents: [world/documents]", "documents: [word/documents]", "word/documents"),
        ("rank: [2, 8]", "rank: [2, 65]", "rank: [2, 65]"),
    ],
)
def test_a_mistake_between_sections_is_told_with_the_line_of_one(
    write: Any, old: str, new: str, line: str
) -> None:
    """What only the whole study shows stands at a key, too, and not at `line 1: the study`."""
    path = write((old, new))
    number = path.read_text(encoding="utf-8").split(line)[0].count("\n") + 1
    assert _told(path).startswith(f"{path}, line {number}: ")


@pytest.mark.parametrize(
    "sections",
    [
        "evaluation: {every_epochs: 10}",
        "training: {epochs: 1, batch_size: 1, warmup_epochs: 0.9}",
        "training: {epochs: 1, batch_size: 1, warmup_steps: 7}",
        "training: {epochs: 2, batch_size: 5, warmup_steps: 3}",
        "training: {epochs: 0.5, batch_size: 1, warmup_ratio: 0.8}\n"
        "evaluation: {every_epochs: 0.5}",
        "training: {epochs: 1, batch_size: 5, warmup_steps: 7, packing: true}",
        "training: {epochs: 8, batch_size: 8, warmup_steps: 6, schedule: wsd, durations: [1, 8]}",
        "training: {epochs: 4, batch_size: 2, warmup_ratio: 0.3, schedule: cosine, "
        "durations: [1, 4]}",
        "training: {epochs: 1, batch_size: 2, warmup_epochs: 0, schedule: wsd, decay_ratio: 1}",
    ],
)
def test_what_just_fits_into_the_training_is_let_through(
    write: Any, tmp_path: Path, sections: str
) -> None:
    """Eight rows; how many sequences they are when they are packed, only a tokenizer tells."""
    _eight_rows(tmp_path)
    _plan(write(("\ntrain:", f"\n{sections}\ntrain:")))


def _eight_rows(tmp_path: Path) -> None:
    path = tmp_path / "facts" / "new.jsonl"
    path.write_text("".join(path.read_text().replace("Who", f"Who {n}") for n in range(8)))


@pytest.mark.parametrize(
    ("training", "key", "told"),
    [
        ("epochs: 1, warmup_steps: 500", "warmup_steps", "500 steps of warm-up leave nothing of "),
        ("epochs: 2, batch_size: 4, warmup_steps: 4", "warmup_steps", "which has 4 (2 epochs of 8"),
        ("epochs: 1, batch_size: 8, warmup_epochs: 0.9", "warmup_epochs", "1 steps of warm-up"),
        ("epochs: 1, batch_size: 2, warmup_ratio: 0.9", "warmup_ratio", "which has 4 (1 epochs"),
        (
            "epochs: 4, batch_size: 2, warmup_epochs: 1, schedule: cosine, durations: [1, 4]",
            "warmup_epochs",
            "which has 4 (1 epochs",
        ),
        (
            "epochs: 2, batch_size: 1, warmup_epochs: 1, schedule: wsd, decay_ratio: 0.6",
            "warmup_epochs",
            "8 steps of warm-up go on when the cooldown begins, after 6 of 16 (2 epochs",
        ),
        (
            "epochs: 2, batch_size: 1, warmup_steps: 3, schedule: inverse_sqrt, decay_ratio: 1",
            "warmup_steps",
            "after 0 of 16",
        ),
        (
            "epochs: 8, batch_size: 8, warmup_steps: 8, schedule: wsd, durations: [1, 8]",
            "warmup_steps",
            "8 steps of warm-up",
        ),
    ],
)
def test_a_warm_up_that_the_rows_do_not_outlast_is_refused(
    write: Any, tmp_path: Path, training: str, key: str, told: str
) -> None:
    """The rate would never be at the peak whose number the report gives; of durations the "
    "longest."""
    _eight_rows(tmp_path)
    path = write(("\ntrain:", f"\ntraining: {{{training}}}\ntrain:"))
    message = _told(path)
    assert message.startswith(f"{path}, line {_line(path, 'training:')}: training.{key}: ")
    assert told in message
    assert "8 examples" in message
    _plan(path, scale="tiny")


def test_rows_of_text_are_counted_by_the_job(write: Any, tmp_path: Path) -> None:
    """How many blocks a text fills is not known before there is a tokenizer."""
    with (tmp_path / "facts" / "new.jsonl").open("a") as file:
        file.write(json.dumps({"text": "A long story. " * 1000}) + "\n")
    asked = ("table: facts/new", "table: facts/old")
    _plan(write(asked, ("\ntrain:", "\ntraining: {warmup_steps: 500}\ntrain:")))


@pytest.mark.parametrize("stem", ["a{b}", "my study", "-n", ".hidden", "a,b", "année", "a*"])
def test_a_file_whose_name_is_none_for_results_is_refused(write: Any, stem: str) -> None:
    """Snakemake would take braces for wildcards, and shells take others apart."""
    path = write()
    path = path.rename(path.with_name(f"{stem}.yaml"))
    message = _told(path)
    assert message.startswith(f"study={path}: results are kept under the name of the file")
    assert f"`{stem}`" in message


def test_an_optimizer_that_needs_whole_matrices_is_not_sharded(write: Any) -> None:
    """Adapters are whole in every process, so that there it may stay."""
    adafactor = ("train: facts/new", "training: {optimizer: adafactor}\ntrain: facts/new")
    message = _told(write(adafactor, ("  - method: full", "  - method: full\n    processes: 2")))
    assert "methods.1.processes: adafactor needs whole matrices" in message
    path = write(adafactor, ("    rank: [2, 8]", "    rank: [2, 8]\n    processes: 2"))
    _, study = load_study({"study": str(path)}, path.parent)
    assert [tuning.processes for tuning in expand_methods(study)] == [2, 2, None]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "full\n    processes: 3\n    nodes: 2",
            "methods.1.nodes: 3 processes cannot be spread evenly over 2 nodes",
        ),
        ("full\n    nodes: 2", "methods.1.nodes: nodes need `processes` to be spread over them"),
        (
            "hybrid\n    rank: 2\n    second_stage: {layers: all, learning_rate: 1.0e-3}\n    "
            "processes: 2",
            "methods.1.processes: the two parts of method hybrid are trained in one process",
        ),
    ],
)
def test_processes_that_cannot_share_a_run_are_told(write: Any, method: str, message: str) -> None:
    assert message in _told(write(("  - method: full", f"  - method: {method}")))


def test_a_missing_key_is_told_with_the_line_of_its_section(write: Any) -> None:
    path = write(("    knowledge: old\n", ""))
    assert f"line {_line(path, '  old:')}: " in _told(path)


def test_every_mistake_is_told_at_once(write: Any) -> None:
    path = write(("threshold: 0.9", "treshold: 0.9"), ("seeds: [0, 1]", "seeds: 3"))
    with pytest.raises(InputError) as error:
        load_study({"study": str(path)}, path.parent)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith(str(path)) for line in lines)


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("rank: [2, 8]", "rank: [2, 8", "learning_rate: [1.0e-3"),
        ("seeds: [0, 1]", "seeds: @many", "seeds: @many"),
        ("title: A small study", "title: A small study: of what", "title"),
        ("  pretrain:", "\tpretrain:", "\tpretrain:"),
    ],
)
def test_what_is_not_yaml_is_told_with_its_line(write: Any, old: str, new: str, part: str) -> None:
    path = write((old, new))
    assert f"{path}, line {_line(path, part)}: not YAML" in _told(path)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("[" * 3000 + "]" * 3000, "nested too deeply"),
        ("&a [*a]", "nested too deeply"),
        ("2026-13-45", "month must be in 1..12"),
        ("1" * 5000, "cannot be read"),
    ],
)
def test_a_value_that_yaml_cannot_hold_is_told_by_file(write: Any, value: str, told: str) -> None:
    path = write(("title: A small study", f"title: {value}"))
    message = _told(path)
    assert message.startswith(f"{path}: ")
    assert told in message


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("train_limit", "0200", "`0200` is an octal number to YAML; write 200, or, if it is text"),
        ("train_limit", "-010", "`-010` is an octal number to YAML; write -10"),
        ("train_limit", "1:30", "`1:30` is a number to the base of 60 to YAML; write it as one nu"),
        ("train_limit", "1:30.5", "`1:30.5` is a number to the base of 60"),
        ("description", "2026-01-31", '`2026-01-31` is a date to YAML; write "2026-01-31" with'),
        ("description", "[0200]", "`0200` is an octal number"),
    ],
)
def test_a_value_that_yaml_changes_in_silence_is_refused(
    write: Any, key: str, value: str, told: str
) -> None:
    path = write(("title: A small study\n", f"title: A small study\n{key}: {value}\n"))
    assert _told(path).startswith(f"{path}, line {_line(path, key + ':')}: {told}")


def test_numbers_and_quoted_text_that_yaml_does_not_change_are_read(write: Any) -> None:
    path = write(("title: A small study\n", "title: '0200'\ndescription: \"1:30\"\n"))
    study = load_study({"study": str(path)}, path.parent)[1]
    assert (study.title, study.description) == ("0200", "1:30")


@pytest.mark.parametrize("value", ["no", "on", "17"])
def test_a_text_that_yaml_reads_as_another_type_is_refused_with_the_remedy(
    write: Any, value: str
) -> None:
    path = write(("title: A small study", f"title: {value}"))
    assert "put it into quotation marks" in _told(path)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text\n"])
def test_a_file_without_keys_is_no_study(write: Any, text: str) -> None:
    path = write()
    path.write_text(text)
    assert "expected a study, a mapping of keys to values" in _told(path)


def test_a_key_given_twice_is_not_silently_halved(write: Any) -> None:
    """YAML would take the last: half of a sweep would be gone without a word."""
    path = write(("methods:\n", "methods:\n  - {method: full, learning_rate: 0.1}\nmethods:\n"))
    assert "methods" in _told(path)


def test_a_file_that_is_not_utf8_is_told_by_name(write: Any) -> None:
    path = write()
    path.write_bytes(STUDY.replace("small", "sm\xe5ll").encode("latin-1"))
    assert str(path) in _told(path)


def test_the_same_method_in_two_entries_is_refused(write: Any) -> None:
    path = write(
        (
            "  - method: full\n",
            "  - {method: lora, rank: 8, learning_rate: 0.1}\n  - method: full\n",
        )
    )
    place = f"{path}, line {_line(path, 'rank: 8')}: methods.1: "
    message = "lora-r8 stands there more than once; merge the entries, or tell them apart by"
    assert f"{place}{message} `suffix`" in _told(path)


def test_full_in_two_entries_is_refused(write: Any) -> None:
    """Though its name has no rank."""
    path = write(
        ("  - method: full\n", "  - {method: full, learning_rate: 0.1}\n  - method: full\n")
    )
    assert "methods.2: full stands there more than once; merge the entries" in _told(path)


ALIKE = {
    "alpha": ("lora, rank: 8, alpha: 16.0", "lora-r8-other", "rank 8, other"),
    "layers": ("lora, rank: 8, target_modules: [q_proj]", "lora-r8-other", "rank 8, other"),
    "dropout": ("lora, rank: 8, dropout: 0.1", "lora-r8-other", "rank 8, other"),
    "all weights": ("full", "full-other", "full, other"),
    "mitigated": (
        "lora, rank: 8, alpha: 16.0, mitigation: {l2_sp: {weight: 0.1}}",
        "lora-r8-other-l2_sp0.1",
        "rank 8, other, l2_sp0.1",
    ),
}


@pytest.mark.parametrize("differs", ALIKE)
def test_a_suffix_tells_methods_of_one_rank_apart(write: Any, differs: str) -> None:
    """What no name holds, as alpha, can be compared within one study, at every scale."""
    method, name, label = ALIKE[differs]
    entry = f"  - {{method: {method}, suffix: other, learning_rate: 0.1}}\n  - method: full\n"
    path = write(("  - method: full\n", entry))
    whole, tiny = expand_methods(_load(path)), expand_methods(_load(path, scale="tiny"))
    assert [t.name for t in whole] == ["lora-r2", "lora-r8", name, "full"]
    assert [t.name for t in tiny] == [t.name for t in whole]
    assert whole[2].label == label


def test_variants_of_one_rank_are_methods_of_their_own(write: Any) -> None:
    path = write(
        (
            "  - method: full\n",
            "  - {method: lora, variant: rslora, rank: 8, learning_rate: 0.1}\n  - method: full\n",
        )
    )
    assert "rslora-r8" in [tuning.name for tuning in expand_methods(_load(path))]


def test_the_fixed_rule_needs_one_setting_or_its_name(write: Any) -> None:
    """Several settings without `fixed` are an error; with it, or with one setting, they are not."""
    rule = ("threshold: 0.9", "threshold: 0.9\n  hyperparameters: fixed")
    path = write(rule)
    told = _told(path)
    assert f"{path}, line {_line(path, '- method: lora')}: methods.0: " in told
    assert (
        "lora-r2 has 2 settings; the rule `fixed` needs `selected_hyperparameters: {learning_rate"
        in told
    )
    one = ("[1.0e-3, 5.0e-3]", "[1.0e-3]")
    named = (
        "[0, 0.01]",
        "[0, 0.01]\n    selected_hyperparameters: {learning_rate: 1.0e-4, weight_decay: 0.01}",
    )
    study = _load(write(rule, one, named))
    fixed = expand_methods(study)[2].selected_hyperparameters
    assert fixed is not None
    assert fixed.weight_decay == 0.01


def test_model_on_the_command_line_takes_the_bases_place(write: Any) -> None:
    study = _load(write(), model="someone/something@" + "b" * 40)
    assert (study.base.model, study.base.pretrain) == ("someone/something", None)
    assert study.base.revision == "b" * 40


def test_a_hub_model_on_the_command_line_needs_its_commit(write: Any) -> None:
    """What is not pinned can change under a study."""
    assert "OWNER/NAME@COMMIT" in _told(write(), model="someone/something")


def test_a_folder_on_the_command_line_takes_a_datasets_place(write: Any, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    study = _load(write(), world_dir=str(mine))
    assert study.datasets["world"].folder == str(mine)
    assert study.datasets["world"].generate is None


def test_a_folder_below_the_home_folder_is_found(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    path = write()
    name = next(iter(load_study({"study": str(path)}, path.parent)[1].datasets))
    asked = {"study": str(path), f"{name}_dir": "~/mine"}
    assert load_study(asked, path.parent)[1].datasets[name].folder == str(tmp_path / "mine")


def test_a_folder_of_benchmark_rows_can_be_given_to_any_study(write: Any, tmp_path: Path) -> None:
    study = _load(write(), benchmarks_dir=str(tmp_path))
    assert study.benchmarks.dataset is not None
    assert study.datasets[study.benchmarks.dataset].folder == str(tmp_path)
    assert "there is no such folder" in _told(write(), benchmarks_dir=str(tmp_path / "gone"))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("wrld_dir", ".", "has no dataset `wrld`, only facts, world"),
        ("world_dir", "/nowhere/at/all", "there is no such folder"),
        (
            "thresold",
            0.8,
            "unknown; expected study, scale, model, rerun_on_code_change or DATASET_dir",
        ),
        ("scale", "small", "expected full or tiny"),
        ("rerun_on_code_change", "yes", "expected true or false"),
    ],
)
def test_a_wrong_option_is_told_by_its_key(write: Any, key: str, value: Any, told: str) -> None:
    message = _told(write(), **{key: value})
    assert message.startswith(f"--config {key}")
    assert told in message


def test_tiny_scale_keeps_the_plan_and_shrinks_the_work(write: Any) -> None:
    """The same methods, seeds and probes, at toy size, under a name of its own, from no hub."""
    hub = "{hub: someone/something, revision: " + "a" * 40 + "}"
    path = write(
        ("{generate: micro-world}", hub),
        ("rank: [2, 8]", "rank: [2, 512]"),
        ("hidden_size: 64", "hidden_size: 1024"),
        ("intermediate_size: 128", "num_layers: 8"),
    )
    whole = _load(path)
    name, tiny = load_study({"study": str(path), "scale": "tiny"}, path.parent)
    assert name == "small-tiny"
    assert [t.name for t in expand_methods(tiny)] == [t.name for t in expand_methods(whole)]
    assert tiny.seeds == whole.seeds[:1]
    assert list(tiny.probes) == list(whole.probes)
    assert all(dataset.hub is None for dataset in tiny.datasets.values())
    assert tiny.base.pretrain is not None
    assert tiny.base.pretrain.num_layers == 1
    assert tiny.base.pretrain.hidden_size >= 512
    assert [len(tuning.hyperparameters) for tuning in expand_methods(tiny)] == [2, 2, 1]


DURATIONS = """\
training: {schedule: wsd, epochs: 20, warmup_steps: 1000, durations: [0.25, 1, 20]}
selection:
"""


def test_tiny_scale_keeps_every_duration_and_its_share(write: Any) -> None:
    """Of two epochs; the warm-up of a whole study is longer than a tiny one."""
    tiny = _load(write(("selection:\n", DURATIONS)), scale="tiny")
    assert tiny.training.durations == pytest.approx([0.025, 0.1, 2.0])
    assert (tiny.training.epochs, tiny.training.warmup_steps) == (2.0, None)
    assert StudyConfig.model_validate_json(tiny.model_dump_json()) == tiny


def test_durations_need_the_whole_trunk(write: Any) -> None:
    path = write(("selection:\n", DURATIONS), ("threshold: 0.9", "stop_after_evaluations: 1"))
    assert "selection.stop_after_evaluations: it would end the trunk" in _told(path)


@pytest.mark.parametrize("betas", ["[0.9, 1.0]", "[1, 0.9]", "[-0.1, 0.9]"])
def test_moments_that_never_move_are_refused(write: Any, betas: str) -> None:
    """PyTorch would, when the base is pretrained already."""
    path = write(("\ntrain:", f"\ntraining: {{betas: {betas}}}\ntrain:"))
    assert "training.betas" in _told(path)


def test_the_tokens_of_a_penalty_are_named_as_documented(write: Any, tmp_path: Path) -> None:
    """By a key that YAML does not read as true."""
    replay = ", replay: {table: facts/more, ratio: 0.5}"
    kept = f"mitigation: {{kl: {{weight: 1, tokens: replay}}{replay}}}"
    path = write(("  - method: lora\n", f"  - method: lora\n    {kept}\n"))
    (tmp_path / "facts" / "more.jsonl").write_text('{"text": "More."}\n')
    _plan(path)
    path.write_text(path.read_text().replace(replay, ""))
    assert "`kl: {tokens: replay}` needs a `replay` beside it" in _told(path)


@pytest.mark.parametrize(
    ("along", "told"),
    [
        ("gsm8k: 5", "`during_training`: gsm8k is not among the `tasks` (humaneval)"),
        (
            "humaneval: 5",
            "benchmarks.during_training.humaneval: the answers of humaneval are programs",
        ),
        ("humaneval: 0", "benchmarks.during_training.humaneval"),
    ],
)
def test_only_tasks_of_the_study_that_need_no_sandbox_are_asked_along(
    write: Any, along: str, told: str
) -> None:
    section = (
        f"benchmarks: {{tasks: {{humaneval: {{}}}}, during_training: {{{along}}}}}\nselection:\n"
    )
    assert told in _told(write(("selection:\n", section)))


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (
            "lambada_openai: {}",
            "benchmarks.during_training.lambada_openai: perplexity,none of lambada_openai is no "
            "mean over items, so that the first of them do not tell it; take it out, or have "
            "benchmarks.tasks.lambada_openai.metric name acc,none",
        ),
        (
            "lambada_openai: {metric: bleu}",
            "lambada_openai has no metric bleu, but perplexity,none",
        ),
        (
            "wikitext: {}",
            "benchmarks.during_training.wikitext: word_perplexity,none of wikitext is no mean",
        ),
    ],
)
def test_a_metric_that_single_items_do_not_tell_is_refused_before_any_job(
    write: Any, task: str, told: str
) -> None:
    """Where a training would find it at its first evaluation."""
    name = task.partition(":")[0]
    section = f"benchmarks: {{tasks: {{{task}}}, during_training: {{{name}: 5}}}}\nselection:\n"
    assert told in _told(write(("selection:\n", section)))
    mean = section.replace(task, f"{name}: {{metric: acc}}")
    if "acc,none" in told:
        assert "is no mean" not in _told(write(("selection:\n", mean)))


def test_the_ends_of_durations_are_benchmarked_only_where_there_are_durations(write: Any) -> None:
    path = write(("selection:\n", "benchmarks: {models: durations}\nselection:\n"))
    assert "benchmarks.models: `durations` needs training.durations" in _told(path)


def test_tiny_scale_has_no_names_of_layers(write: Any) -> None:
    """The model that stands in for a large one may have none of its names, and fewer blocks."""
    named = "    rank: [2, 8]\n    target_modules: [Wqkv]\n"
    hybrid = (
        "  - {method: hybrid, rank: 2, learning_rate: 0.1, "
        "second_stage: {layers: last 9, learning_rate: 0.1}}\n  - method: full\n"
    )
    deep = ("    hidden_size: 64\n", "    hidden_size: 64\n    num_layers: 12\n")
    path = write(("    rank: [2, 8]\n", named), ("  - method: full\n", hybrid), deep)
    whole = _load(path)
    _, tiny = load_study({"study": str(path), "scale": "tiny"}, path.parent)
    assert [t.name for t in expand_methods(tiny)] == [t.name for t in expand_methods(whole)]
    _plan(path, scale="tiny")
    with pytest.raises(InputError, match="no linear layer Wqkv"):
        _plan(path)


def test_tiny_scale_trains_the_fixed_setting(write: Any) -> None:
    """The rule `fixed` finds its setting in the shrunk sweep, too."""
    fixed = "    selected_hyperparameters: {learning_rate: 5.0e-3, weight_decay: 0.0}\n"
    three = ("[1.0e-3, 5.0e-3]\n", "[1.0e-3, 2.0e-3, 5.0e-3]\n" + fixed)
    path = write(three)
    _, tiny = load_study({"study": str(path), "scale": "tiny"}, path.parent)
    assert [setting.learning_rate for setting in expand_methods(tiny)[0].hyperparameters] == [5e-3]


def test_what_sets_a_method_apart_stands_in_its_name(write: Any) -> None:
    more = (
        "    rank: [2, 8]\n    variant: pissa\n    target_modules: mlp\n"
        "    loraplus_lr_ratio: 16.0\n"
    )
    _, study = load_study({"study": str(write(("    rank: [2, 8]\n", more)))}, Path("nowhere"))
    assert [t.name for t in expand_methods(study)][:2] == [
        "pissa-r2-mlp-plus16",
        "pissa-r8-mlp-plus16",
    ]


def test_methods_of_one_rank_have_names_of_their_own(write: Any) -> None:
    """AdaLoRA's durations, embeddings and hybrids stand side by side in one study."""
    entries = [
        "{method: lora, rank: 2, variant: adalora, learning_rate: 1.0}",
        "{method: lora, rank: 2, variant: adalora, adalora: {tinit: 0.2, delta_t: 10}, "
        "learning_rate: 1.0}",
        "{method: lora, rank: 2, embeddings: trained, learning_rate: 1.0}",
        "{method: lora, rank: 2, embeddings: trained, embedding_lr_ratio: 0.1, learning_rate: 1.0}",
        "{method: full, embeddings: frozen, learning_rate: 1.0}",
        "{method: hybrid, rank: 2, second_stage: {layers: last 4, learning_rate: 1.0e-5}, "
        "learning_rate: 1.0}",
        "{method: hybrid, variant: dora, rank: 2, second_stage: {start: 0.25, "
        "layers: [layers.*.mlp, lm_head], learning_rate: 1.0e-5}, learning_rate: 1.0}",
        "{method: hybrid, rank: 2, second_stage: {layers: all, learning_rate: 1.0, "
        "suffix: all-late}, learning_rate: 1.0}",
    ]
    found = expand_methods(
        _load(write(("methods:\n", "methods:\n  - " + "\n  - ".join(entries) + "\n")))
    )
    assert [(tuning.name, tuning.label) for tuning in found[:8]] == [
        ("adalora-r2", "adalora 2"),
        ("adalora-r2-tinit0.2-delta10", "adalora 2, tinit0.2-delta10"),
        ("lora-r2-embeddings", "rank 2, embeddings trained"),
        ("lora-r2-embeddings0.1", "rank 2, embeddings at 0.1"),
        ("full-frozen-embeddings", "full, embeddings frozen"),
        ("hybrid-r2-last4-at0.5-lr1e-05", "hybrid 2, then last4"),
        (
            "hybrid-dora-r2-layers._.mlp-lm_head-at0.25-lr1e-05",
            "hybrid dora 2, then layers._.mlp-lm_head",
        ),
        ("hybrid-r2-all-late", "hybrid 2, then all-late"),
    ]


def test_adaloras_ranks_are_held_against_the_initial_one(write: Any) -> None:
    """`2r` is a scale of 2, and a matrix must hold the rank from which the budget falls."""
    adalora = "[2, 8]\n    variant: adalora\n    alpha: 2r\n    adalora: {init_r_ratio: 2.0}"
    first, second = expand_methods(_load(write(("[2, 8]", adalora))))[:2]
    assert (first.initial_rank, second.initial_rank) == (4, 16)
    assert (first.scale, second.scale) == pytest.approx((2.0, 2.0), rel=1e-5)
    assert "initial rank 66 is larger" in _told(write(("[2, 8]", adalora.replace("8", "33"))))


def test_a_probe_without_wrong_answers_is_found_before_any_job(write: Any, tmp_path: Path) -> None:
    path = write()
    check_folders(_load(path))
    (tmp_path / "facts" / "old.jsonl").write_text('{"question": "Who?", "answer": "Ann."}\n')
    with pytest.raises(InputError) as error:
        check_folders(_load(path))
    message = str(error.value)
    assert f"{tmp_path / 'facts' / 'old.jsonl'}, line 1: no `perturbed_answer`" in message
    assert "or set probes.old.truth_ratio: false" in message
    silent = ("    table: facts/old\n", "    table: facts/old\n    truth_ratio: false\n")
    check_folders(_load(write(silent)))


def test_a_missing_table_is_found_before_any_job(write: Any, tmp_path: Path) -> None:
    path = write()
    (tmp_path / "facts" / "old.jsonl").unlink()
    with pytest.raises(InputError, match=r"there is no old\.jsonl \(nor \.json, nor \.csv\)"):
        check_folders(_load(path))


def test_no_two_runs_share_a_name(write: Any) -> None:
    """Rates that are equal to six digits would share a folder, and the first would be lost."""
    path = write(("[1.0e-3, 5.0e-3]", "[1.0e-3, 1.0000001e-3]"))
    assert "methods.0.learning_rate" in _told(path)


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[3] / "config" / "studies").glob("*.yaml")),
    ids=lambda path: path.stem,
)
@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_every_study_of_the_repository_is_valid(path: Path, scale: str) -> None:
    text = path.read_text(encoding="utf-8")
    document = yaml.safe_load(text)
    folders = {f"{name}_dir": "." for name in document["datasets"] if re.search(r"_dir\b", text)}
    name, study = load_study({"study": path.stem, "scale": scale, **folders}, path.parent)
    assert name.startswith(path.stem)
    assert expand_methods(study)
    # As the job that collects the results reads it.
    assert StudyConfig.model_validate_json(study.model_dump_json()) == study


NO_NAMES = {
    "boolean": (
        "  old:",
        "  no:",
        "`no` is a boolean to YAML, and keys are text; write 'no', in quot",
    ),
    "number": ("  old:", "  12:", "`12` is a number to YAML, and keys are text; write '12', in"),
    "date": ("  old:", "  2024-01-01:", "`2024-01-01` is a date to YAML"),
    "boolean as a value": ("probe: new", "probe: no", "put it into quotation marks"),
    "too long": ("  old:", f"  {'a' * 101}:", "expected a name of at most 100 letters"),
    "same but for case": (
        "  old:",
        "  NEW:",
        "`new` and `NEW` differ only in upper and lower case",
    ),
    "path of a table": ("table: facts/old", "table: facts/../old", "expected DATASET/TABLE"),
    "dataset's folder": ("table: facts/old", "table: ../old", "expected DATASET/TABLE"),
    "control character": ("table: facts/old", 'table: "facts/old\\n"', "expected DATASET/TABLE"),
    "option": ("table: facts/old", "table: facts/-old", "expected DATASET/TABLE"),
    "half a character": ("A small study", '"\\ud800"', "holds half a character"),
    "command on the hub": (
        "{generate: micro-world}",
        f'{{hub: "a/$(touch pwned)", revision: {"a" * 40}}}',
        "expected OWNER/NAME, as on huggingface.co",
    ),
    "parent on the hub": (
        "{generate: micro-world}",
        f"{{hub: a/b..c, revision: {'a' * 40}}}",
        "at most 96 characters without `..`",
    ),
    "no owner": (
        "{generate: micro-world}",
        f"{{hub: squad, revision: {'a' * 40}}}",
        "expected OWNER/NAME, as on huggingface.co",
    ),
    "revision": (
        "{generate: micro-world}",
        "{hub: a/b, revision: main}",
        "expected a commit, 40 hexadecimal digits",
    ),
    "long method": (
        "rank: [2, 8]",
        f"rank: [2, 8]\n    suffix: {'a' * 95}",
        f"lora-r2-{'a' * 95}, has 103 characters",
    ),
    "task": (
        "selection:",
        "benchmarks: {dataset: world, tasks: {'a;b': {}}}\nselection:",
        "expected a task's name",
    ),
}


@pytest.mark.parametrize("kind", NO_NAMES)
def test_what_cannot_be_part_of_a_file_name_is_refused(write: Any, kind: str) -> None:
    """Or would be another name to YAML, to a shell or to a file system that ignores case."""
    old, new, told = NO_NAMES[kind]
    path = write((old, new))
    message = _told(path)
    assert message.startswith(f"{path}, line ")
    assert told in message


def test_methods_that_differ_only_by_case_are_refused(write: Any) -> None:
    entry = "  - {{method: lora, rank: 4, suffix: {}, learning_rate: 0.1}}\n"
    path = write(
        ("  - method: full\n", f"{entry.format('a')}{entry.format('A')}  - method: full\n")
    )
    assert "lora-r4-A and lora-r4-a differ only in upper and lower case" in _told(path)


@pytest.mark.parametrize("model", ["a/x;touch pwned;", "gpt2", "a/../b", "$(touch pwned)"])
def test_a_model_is_a_folder_or_has_a_name_on_the_hub(write: Any, model: str) -> None:
    text = write().read_text()
    start, end = text.index("  pretrain:"), text.index("train: facts/new")
    path = write()
    named = f"  model: {model!r}\n  revision: {'a' * 40}\n"
    path.write_text(text[:start] + named + text[end:])
    assert "base.model: there is no such folder; expected OWNER/NAME" in _told(path)
    with pytest.raises(InputError, match=r"--config model=.*: there is no such folder"):
        load_study({"study": str(write()), "model": f"{model}@{'a' * 40}"}, path.parent)


def test_a_study_elsewhere_cannot_take_the_results_of_a_namesake(tmp_path: Path) -> None:
    """Results are kept by name: another `mini.yaml` would overwrite those of the first."""
    own = tmp_path / "own"
    own.mkdir()
    (tmp_path / "mini.yaml").write_text("title: a")
    (own / "mini.yaml").write_text("title: b")
    with pytest.raises(InputError):
        load_study({"study": str(own / "mini.yaml")}, tmp_path)


def test_a_text_that_is_trained_on_would_not_tell_what_is_forgotten(write: Any) -> None:
    text = ("selection:", "general_text: {table: world/held_out}\nselection:")
    assert _load(write(text)).general_text is not None
    replayed = (
        "    rank: [2, 8]\n",
        "    rank: [2, 8]\n    mitigation: {replay: {table: world/held_out}}\n",
    )
    with pytest.raises(InputError, match="world/held_out is trained on"):
        _load(write(text, replayed))
    with pytest.raises(InputError, match="the name belongs to the section general_text"):
        _load(write(("  old:\n", "  general_text:\n")))
    with pytest.raises(InputError, match="the name belongs to what all probes say together"):
        _load(write(("  old:\n", "  all_probes:\n")))


def test_a_row_without_text_is_found_before_any_job(write: Any, tmp_path: Path) -> None:
    (tmp_path / "facts" / "prose.jsonl").write_text('{"text": "A."}\n{"body": "B."}\n')
    with pytest.raises(InputError, match=r"prose.jsonl, line 2: expected a string `text`"):
        check_folders(
            _load(write(("selection:", "general_text: {table: facts/prose}\nselection:")))
        )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("{temperature: 0.2}", "`temperature` needs `samples`"),
        ("{k: 10}", "`k` needs `samples`"),
        ("{samples: 5, k: [1, 10]}", "pass@10 cannot be estimated from 5 samples"),
        ("{samples: 5, top_p: 0}", "greater than 0"),
        ("{samples: 5, k: []}", "at least 1 item"),
        ("{revision: main}", "revision"),
    ],
)
def test_samples_are_whole_or_refused(write: Any, settings: str, expected: str) -> None:
    tasks = f"benchmarks: {{tasks: {{humaneval: {settings}}}}}\nselection:\n"
    assert expected in _told(write(("selection:\n", tasks)))


def test_tiny_scale_draws_few_samples_and_leaves_out_what_only_the_hub_has(write: Any) -> None:
    """Rows of the micro-world stand in for those of tasks on the same data."""
    tasks = (
        "humaneval: {samples: 50, temperature: 0.8, k: [1, 10, 50]}, arc_easy: "
        f"{{revision: {'a' * 40}}}, sciq: {{revision: {'a' * 40}}}"
    )
    path = write(("selection:\n", f"benchmarks: {{tasks: {{{tasks}}}}}\nselection:\n"))
    tiny = _load(path, scale="tiny").benchmarks
    assert list(tiny.tasks) == ["humaneval", "arc_easy"]
    humaneval = tiny.tasks["humaneval"]
    assert (humaneval.samples, humaneval.k, humaneval.temperature) == (4, [1, 4], 0.8)
    assert (humaneval.limit, tiny.tasks["arc_easy"].limit) == (4, 4)


def test_sharing_passes_among_methods_is_refused_with_what_is_allowed(write: Any) -> None:
    path = write(("selection:", "training: {batched_lora: across}\nselection:"))
    message = _told(path)
    assert "batched_lora" in message
    assert "auto" in message
    assert "never" in message
