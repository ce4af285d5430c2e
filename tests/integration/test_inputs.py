"""Which jobs run again after a change of a file, a setting or a version."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from forgetting import inputs, versions
from forgetting.inputs import content_digest, is_model_file, model_files, model_identity
from forgetting.pipeline.paths import Paths
from support.snakemake import due, pretend_finished, restore_process
from support.user_files import write_files

LAST = {"make_tables": 1, "report": 1, "publish": 1}
BENCHMARKS = {"benchmark": 2, "benchmark_base": 1}
CHOICE = {"select_checkpoint": 2, **BENCHMARKS, **LAST}
ALL = {"prepare_data": 1, "register_base": 1, "evaluate_base": 1, "finetune": 2} | CHOICE
"""Jobs of the study by their rules."""

FROM_BASE = {rule: count for rule, count in ALL.items() if rule != "prepare_data"}
FROM_DATA = {"prepare_data": 1, "evaluate_base": 1, "finetune": 2, "select_checkpoint": 2}
FROM_DATA |= {"benchmark": 2} | LAST
FROM_SCORES = {rule: count for rule, count in FROM_DATA.items() if rule != "prepare_data"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """Return a folder with a user's files, in which the study seems to be finished."""
    folder = tmp_path_factory.mktemp("finished")
    write_files(folder, base_folder)
    with restore_process():
        pretend_finished(folder, folder / "study.yaml")
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """Return a copy of that folder, which a test may change."""
    copy = Path(shutil.copytree(finished, tmp_path / "copy", symlinks=True))
    with restore_process():
        yield copy


def _due(folder: Path, **config: Any) -> dict[str, int]:
    return due(folder, folder / "study.yaml", **config)


def _edit(path: Path, text: str = "") -> None:
    """Change a file and give it an old date."""
    path.write_text(text or path.read_text().replace("1", "7"))
    os.utime(path, (1e9, 1e9))


def _add_file(name: str) -> Callable[[Path], None]:
    return lambda folder: _edit(folder / "model" / name, "{}")


def _edit_file(name: str) -> Callable[[Path], None]:
    return lambda folder: _edit(folder / name)


def _move_link(folder: Path) -> None:
    (folder / "model").unlink()
    (folder / "model").symlink_to("model-b")


def _edit_study(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        study = yaml.safe_load((folder / "study.yaml").read_text())
        change(study)
        (folder / "study.yaml").write_text(yaml.safe_dump(study))

    return edit


def test_changed_dates_rerun_nothing(folder: Path) -> None:
    """All tables and files of the model have new dates."""
    later = time.time() + 1000
    for path in [*folder.glob("tables/*"), *folder.glob("tasks/*/*"), *folder.glob("model-a/*")]:
        os.utime(path, (later, later))
    os.utime(folder / "study.yaml", (later, later))
    assert _due(folder) == {}


CHANGES: dict[str, tuple[Callable[[Path], None], dict[str, int]]] = {
    "trained rows": (_edit_file("tables/new.jsonl"), FROM_DATA),
    "old knowledge": (_edit_file("tables/old.jsonl"), FROM_DATA),
    "general text": (_edit_file("tables/text.jsonl"), FROM_SCORES),
    "replayed rows": (
        _edit_file("tables/general.jsonl"),
        {"finetune": 1, "select_checkpoint": 1, "benchmark": 1} | LAST,
    ),
    "prompts": (_edit_file("tables/prompts.jsonl"), BENCHMARKS | LAST),
    "rows of a benchmark": (_edit_file("tasks/sciq/test.jsonl"), BENCHMARKS | LAST),
    "chat template": (
        lambda folder: _edit(folder / "model" / "chat_template.jinja", "other"),
        FROM_BASE,
    ),
    "chat in place of a plain prompt": (
        _edit_study(lambda study: study.update(prompt={"chat": True})),
        ALL,
    ),
    "new vocabulary": (_add_file("added.spm"), FROM_BASE),
    "generation settings": (
        lambda folder: _edit(folder / "model" / "generation_config.json", "{}"),
        FROM_BASE,
    ),
    "another model under the same link": (_move_link, FROM_BASE),
    "readme of the model": (_add_file("README.md"), {}),
    "state of an optimizer": (_add_file("optimizer.pt"), {}),
    "learning rate of one method": (
        _edit_study(lambda study: study["methods"][0].update(learning_rate=[2e-3])),
        {"finetune": 1, "select_checkpoint": 1, "benchmark": 1} | LAST,
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_reruns_exactly_the_dependent_jobs(folder: Path, name: str) -> None:
    change, expected = CHANGES[name]
    change(folder)
    assert _due(folder) == expected


STAGES = {
    "prepare": FROM_DATA,
    "pretrain": FROM_BASE,
    "train": {"finetune": 2, "select_checkpoint": 2, "benchmark": 2} | LAST,
    "evaluate": FROM_SCORES,
    "benchmark": BENCHMARKS | LAST,
    "select": {"select_checkpoint": 2, "benchmark": 2} | LAST,
    "tables": LAST,
    "report": {"report": 1, "publish": 1},
}


@pytest.mark.parametrize("stage", versions.VERSIONS)
def test_raised_version_reruns_the_stage_and_dependent_jobs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setitem(versions.VERSIONS, stage, versions.VERSIONS[stage] + 1)
    assert _due(folder) == STAGES[stage]


LOST = {
    "results/study/tables/runs.parquet": LAST,
    "results/study/runs/lora-r2/seed0/runs.json": (
        {"finetune": 1, "select_checkpoint": 1, "benchmark": 1} | LAST
    ),
    "results/study/benchmarks/base/scores.parquet": {"benchmark_base": 1} | LAST,
    "reports/study.html": {"report": 1, "publish": 1},
}


@pytest.mark.parametrize("name", LOST)
def test_lost_result_is_made_again(folder: Path, name: str) -> None:
    """The page that was made from the lost file exists."""
    assert (folder / name).is_file()
    (folder / name).unlink()
    shutil.rmtree(folder / "logs", ignore_errors=True)
    assert _due(folder) == LOST[name]


def test_result_lost_twice_is_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page was copied last when the same results were missing."""
    lost = "results/study/tables/runs.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(Paths, "lost_results", lambda *_: [lost])
        pretend_finished(folder, folder / "study.yaml")
        assert (folder / lost).is_file()
    (folder / lost).unlink()
    assert _due(folder) == LAST


def test_lost_page_and_tables_are_made_again(folder: Path) -> None:
    """Snakemake would take the copy of the page for up to date."""
    for path in (folder / "results/study/tables").glob("*.*"):
        path.unlink()
    (folder / "results/study/study.json").unlink()
    (folder / "reports/study.html").unlink()
    log = folder / "logs/study/publish.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    assert _due(folder) == LAST


def test_digest_of_the_code_counts_on_request(folder: Path) -> None:
    assert _due(folder, rerun_on_code_change=False) == {}
    assert _due(folder, rerun_on_code_change=True) == ALL


def test_model_files_are_those_that_loading_reads(tmp_path: Path) -> None:
    read = [
        "additional_chat_templates/tool_use.jinja",
        *("bpe.codes", "chat_template.jinja", "config.json", "merges.txt"),
        *("model-00001-of-00002.safetensors", "sentencepiece.bpe.model", "source.spm"),
        *("tokenizer.model.v3", "vocab.bpe", "vocab.txt"),
    ]
    others = ["README.md", "LICENSE.txt", "pytorch_model.bin", "optimizer.pt", "picture.png"]
    others += [".git/config.json", "onnx/config.json", ".cache.json", "trainer_state.json"]
    for name in [*read, *others]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [path.relative_to(tmp_path).as_posix() for path in model_files(tmp_path)] == read
    assert all(map(is_model_file, read)) and not any(map(is_model_file, others))
    before = model_identity(tmp_path)
    assert [*before[0]] == read
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("other")
    assert model_identity(tmp_path)[1] != before[1]


def test_shards_in_subfolders_are_part_of_a_model(tmp_path: Path) -> None:
    """Files outside the folder of the model are not part of it."""
    for name in ("shards/one.safetensors", "shards/unnamed.safetensors"):
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).touch()
    (tmp_path / "two.safetensors").touch()
    named = {"a": "shards/one.safetensors", "b": "../two.safetensors"}
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": named}))
    files = model_files(tmp_path / "model")
    assert [path.name for path in files] == [index.name, "one.safetensors"]


def _aged(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every file as unchanged for a long time."""
    monkeypatch.setattr(inputs, "SETTLED_SECONDS", -1.0)


@pytest.mark.usefixtures("settled")
def test_file_is_hashed_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: _aged(tmp_path / name, name) for name in ("a", "b")}
    cache, read = tmp_path / "cache" / "digests.json", []
    plain = inputs.sha256
    monkeypatch.setattr(inputs, "sha256", lambda path: read.append(path.name) or plain(path))
    first = content_digest(files, cache)
    assert content_digest(files, cache) == first and read == ["a", "b"]

    stat = files["a"].stat()
    _aged(files["a"], "c")
    os.utime(files["a"], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content_digest(files, cache) != first and read == ["a", "b", "a"]
    assert content_digest({"a": files["a"]}, cache) != content_digest({"x": files["a"]}, cache)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("broken", ["", "[1]", '{"', "\udcff", "folder"])
def test_broken_cache_is_ignored(tmp_path: Path, broken: str) -> None:
    file, cache = _aged(tmp_path / "a", "a"), tmp_path / "digests.json"
    expected = content_digest({"a": file}, tmp_path / "other.json")
    if broken == "folder":
        cache.mkdir()
    else:
        cache.write_bytes(broken.encode(errors="surrogateescape"))
    assert content_digest({"a": file}, cache) == expected
    cache.is_dir() or cache.write_text(json.dumps({str(file): ["x"]}))
    assert content_digest({"a": file}, cache) == expected


def test_recently_changed_file_is_not_cached(tmp_path: Path) -> None:
    """A second change within the resolution of the clock could not be noticed otherwise."""
    cache = tmp_path / "digests.json"
    content_digest({"a": _aged(tmp_path / "a", "a")}, cache)
    assert not cache.exists()
