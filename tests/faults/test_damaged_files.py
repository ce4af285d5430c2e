"""Damaged files between jobs: one line names the file and the command that heals it.

A chain of programs represents the study. It makes what is missing, as Snakemake does. After any
damage, the command of the message and the chain lead to the results of the undamaged chain.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from forgetting.benchmarks.programs import PassRate, Program, describe
from forgetting.benchmarks.scorer import models_to_score
from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig, SelectionConfig
from forgetting.config.expand import Method, RunGroupConfig
from forgetting.config.job_params import SelectCheckpointParams
from forgetting.config.methods import Hyperparameters
from forgetting.config.training import TrainingConfig
from forgetting.digests import file_damage, folder_damage, record_path
from forgetting.errors import InputError, reports_input_errors
from forgetting.io import (
    atomic_folder,
    read_json,
    read_jsonl,
    read_table,
    write_atomically,
    write_json,
    write_jsonl,
    write_table,
)
from forgetting.models.loading import PRETRAINED, load_meta_model, read_base
from forgetting.report.frames import read_tables
from forgetting.results.build_tables import benchmark_tables
from forgetting.training.checkpoints import run_damage
from scripts import finetune, run_programs, select_checkpoint
from support.damage import flip, truncate
from support.params import finetune_params
from support.result_tables import tables, write
from support.run_groups import record_base

Rows = list[dict[str, Any]]
Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("one_thread")

RULE = SelectionConfig(probe="new", metric="probability", threshold=0.9, if_not_reached="last")
RUN = "state/lora-r4/seed3/*/*"


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flip": flip,
    "truncate": truncate,
    "delete": Path.unlink,
}


class Chain:
    """Prepared data, a base, its scores, a run group and a selection, in the working folder."""

    def __init__(self, base: Path, rows: Rows, tuning: Method) -> None:
        self.base, self.rows = base, rows
        self.method = tuning.model_copy(
            update={"hyperparameters": [Hyperparameters(learning_rate=0.01)]}
        )

    def stages(self) -> list[tuple[list[str], Callable[[], None]]]:
        """Return the outputs of each stage, and the function that makes them."""
        return [
            (["data/train.jsonl", "data/probes/new.jsonl"], self.prepare),
            (["base.json"], self.pretrain),
            (["base_items.parquet"], self.score),
            (["items.parquet", "runs.json", "state/checkpoints/lora-r4.json"], self.train),
            (["selection.json", "selected/index.json"], self.select),
            (["chosen.json"], self.use),
        ]

    def run(self) -> None:
        """Make what is missing and all that depends on it."""
        remade = False
        for outputs, make in self.stages():
            remade = remade or not all(map(os.path.exists, outputs))
            if remade:
                for output in outputs:
                    Path(output).unlink(missing_ok=True)
                make()

    def prepare(self) -> None:
        write_jsonl(Path("data/train.jsonl"), self.rows[:8])
        write_jsonl(Path("data/probes/new.jsonl"), self.rows[:2])

    def pretrain(self) -> None:
        with atomic_folder(Path("model")) as folder:
            shutil.copytree(self.base, folder, dirs_exist_ok=True)
        record_base(Path("base.json"), Path("model"))
        write_json(Path("base.json"), {**read_json(Path("base.json")), "origin": PRETRAINED})

    def score(self) -> None:
        read_base(Path("base.json"))
        write_table(
            Path("base_items.parquet"), pd.DataFrame({"probe": ["new"], "probability": [0.0]})
        )

    def train(self) -> None:
        spec = RunGroupConfig(
            method=self.method,
            seed=3,
            prompt=PromptConfig(),
            training=TrainingConfig(epochs=2.0, batch_size=4, warmup_epochs=0.0),
            evaluation=EvaluationConfig(max_new_tokens=3),
            selection=RULE,
            precision="float32",
            knowledge={"new": "new"},
        )
        options = {
            "params": str(finetune_params(Path(), spec)),
            "base": "base.json",
            "base-items": "base_items.parquet",
            "data": "data",
            "state": "state",
            "items": "items.parquet",
            "runs": "runs.json",
            "checkpoints": "state/checkpoints/lora-r4.json",
        }
        finetune.main([part for key, value in options.items() for part in (f"--{key}", value)])

    def select(self) -> None:
        params = SelectCheckpointParams(method=self.method, selection=RULE, seeds=[3], durations=[])
        write_atomically(Path("select.json"), params.model_dump_json())
        options = {
            "params": "select.json",
            "base-items": "base_items.parquet",
            "runs": "runs.json",
            "stored": "state/checkpoints/lora-r4.json",
            "selection": "selection.json",
            "checkpoints": "selected",
            "index": "selected/index.json",
        }
        select_checkpoint.main(
            [part for key, value in options.items() for part in (f"--{key}", value)]
        )

    def use(self) -> None:
        @reports_input_errors
        def main(_: list[str] | None = None) -> None:
            read_table(Path("items.parquet"))
            (chosen,) = models_to_score(Path("selection.json"), Path("selected"), ["seed3"])
            write_json(Path("chosen.json"), chosen.origin)

        main()


@pytest.fixture(scope="module")
def made(
    base_folder: Path, rows: Rows, tuning: Method, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Chain, Path]:
    """Run the chain, and return it with its folder."""
    chain, folder = Chain(base_folder, rows, tuning), tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        chain.run()
    return chain, folder


def results() -> list[Any]:
    """Return the results of the chain: items, digests of the selected files, training rows."""
    items = pd.read_parquet("items.parquet").to_json()
    return [items, read_json(Path("chosen.json"))["files"], read_jsonl(Path("data/train.jsonl"))]


def heal(capsys: Capture, path: Path, run: Callable[[], None]) -> bool:
    """Run; on an error check the message, run its command and repeat. Return whether it failed."""
    capsys.readouterr()
    try:
        run()
    except SystemExit as ended:
        assert ended.code == 1
    else:
        return False
    (line,) = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("lora-r4")]
    assert line.startswith("error: ")
    assert str(path) in line or path.parent.name in line
    command = re.search(r"`([^`]+)`", line)
    assert command, line
    subprocess.run(command[1], shell=True, check=True)
    run()
    return True


KINDS: list[tuple[str, list[str]]] = [
    ("data/train.jsonl", ["runs.json", "chosen.json"]),
    ("data/probes/new.jsonl", ["runs.json", "chosen.json"]),
    ("base.json", ["runs.json", "chosen.json"]),
    ("model/model.safetensors", ["runs.json", "chosen.json"]),
    ("model/config.json", ["runs.json", "chosen.json"]),
    ("model/tokenizer.json", ["runs.json", "chosen.json"]),
    ("base_items.parquet", ["runs.json", "chosen.json"]),
    (f"{RUN}/run.json", ["runs.json", "chosen.json"]),
    (f"{RUN}/items-0000002.parquet", ["runs.json", "chosen.json"]),
    ("runs.json", ["selection.json", "chosen.json"]),
    ("state/checkpoints/lora-r4.json", ["selection.json", "chosen.json"]),
    (f"{RUN}/step-0000004/adapter_model.safetensors", ["selection.json", "chosen.json"]),
    (f"{RUN}/step-0000004/adapter_config.json", ["selection.json", "chosen.json"]),
    (f"{RUN}/step-0000004/progress.json", ["selection.json", "chosen.json"]),
    ("items.parquet", ["chosen.json"]),
    ("selection.json", ["chosen.json"]),
    ("selected/seed3/adapter_model.safetensors", ["chosen.json"]),
    ("selected/seed3/adapter_config.json", ["chosen.json"]),
]
MADE_AGAIN = {"base.json", "base_items.parquet", "runs.json", "items.parquet", "selection.json"}
"""Files that Snakemake makes again if they are missing."""


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize(("file", "removed"), KINDS, ids=[kind for kind, _ in KINDS])
def test_command_of_the_message_restores_a_damaged_file(
    made: tuple[Chain, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    file: str,
    removed: list[str],
    how: str,
) -> None:
    chain, folder = made
    at = tmp_path / "at"
    # A copy of the results folder that keeps links.
    subprocess.run(["cp", "-a", folder, at], check=True)
    monkeypatch.chdir(at)
    expected = results()
    for output in removed:
        Path(output).unlink()
    (path,) = Path().glob(file)
    DAMAGES[how](path)
    refused = heal(capsys, path, chain.run)
    declared = file.startswith(("data/", "state/checkpoints")) or file in MADE_AGAIN
    assert refused or (how == "delete" and (declared or file.endswith("run.json")))
    assert results() == expected
    assert not list(Path().rglob("*.partial")) + list(Path().rglob("*.old"))


def test_checkpoint_without_method_state_is_damaged(tmp_path: Path) -> None:
    """AdaLoRA's averages; older checkpoints lose them with the state of the optimizer."""
    checkpoint = tmp_path / "step-0000004"
    with atomic_folder(checkpoint) as folder:
        write_json(folder / "progress.json", {"evaluations": []})
        (folder / "optimizer.safetensors").write_bytes(b"o")
        (folder / "method.safetensors").write_bytes(b"m")
    assert run_damage(tmp_path) is None
    (checkpoint / "method.safetensors").unlink()
    assert run_damage(tmp_path) == (checkpoint / "method.safetensors", "is missing")


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize(
    "file", ["step-0000002/optimizer.safetensors", "step-0000002/adapter_model.safetensors"]
)
def test_damaged_checkpoint_is_never_resumed(
    made: tuple[Chain, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    file: str,
    how: str,
) -> None:
    """The run restarts, prints one warning, and ends with the same numbers."""
    from forgetting.training import run_group

    chain, folder = made
    subprocess.run(["cp", "-a", folder, tmp_path / "at"], check=True)
    monkeypatch.chdir(tmp_path / "at")
    expected = results()
    shutil.rmtree("state")
    for output in ("runs.json", "chosen.json"):
        Path(output).unlink()
    whole = run_group.evaluate_run_items
    count = 0

    def killed(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(run_group, "evaluate_run_items", killed)
    with pytest.raises(KeyboardInterrupt):
        chain.run()
    monkeypatch.setattr(run_group, "evaluate_run_items", whole)
    (path,) = Path().glob(f"{RUN}/{file}")
    DAMAGES[how](path)
    capsys.readouterr()
    chain.run()
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    (line,) = [line for line in lines if str(path) in line]
    assert "the run starts from the beginning" in line
    assert results() == expected


def test_damaged_tokenized_dataset_is_written_again(
    made: tuple[Chain, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    chain, folder = made
    subprocess.run(["cp", "-a", folder, tmp_path / "at"], check=True)
    monkeypatch.chdir(tmp_path / "at")
    expected = results()
    (tokens,) = Path("state/tokens").glob("*.arrow")
    for path in [*Path().glob(RUN), Path("state/checkpoints")]:
        shutil.rmtree(path)
    Path("chosen.json").unlink()
    flip(tokens)
    capsys.readouterr()
    chain.run()
    assert "it is tokenized again" in capsys.readouterr().err
    assert file_damage(tokens) is None
    assert results() == expected


# --- results of benchmarks, tables --------------------------------------------------------------


def benchmarked(folder: Path) -> None:
    """Write the results of a benchmark job, and the outcomes of its two programs."""
    programs = [Program("humaneval", f"made/{n}", n, 0, "x = 1", "assert x") for n in range(2)]
    score = {"metric": "acc,none", "main": True, "value": 1.0, "stderr": 0.1, "n": 1, "chance": 0.5}
    item = {"task": "sciq", "item": 0, "metric": "acc,none", "value": 1.0}
    write_table(folder / "scores.parquet", pd.DataFrame([{"task": "sciq", **score}]))
    write_table(folder / "items.parquet", pd.DataFrame([item]))
    description = describe(programs, {"humaneval": PassRate()})
    write_json(folder / "programs.json", description)
    tasks = {"sciq": {"num_fewshot": 0}, "humaneval": {"num_fewshot": 0}}
    record = {"model": {"run": "base", "step": 0}, "notes": [], "tasks": tasks}
    write_json(folder / "record.json", record)
    execute(folder)


def execute(folder: Path) -> None:
    run_programs.main(
        [
            *("--programs", str(folder / "programs.json")),
            *("--sandbox", "none"),
            *("--output", str(folder / "outcomes.json")),
        ]
    )


FILES = ["scores.parquet", "items.parquet", "programs.json", "record.json", "outcomes.json"]


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_damaged_benchmark_results_are_named(tmp_path: Path, file: str, how: str) -> None:
    benchmarked(tmp_path)
    _, items, _ = benchmark_tables([tmp_path], {"base": {}})
    assert len(items) == 3
    DAMAGES[how](tmp_path / file)
    with pytest.raises(InputError) as error:
        benchmark_tables([tmp_path], {"base": {}})
    assert str(error.value).startswith(f"{tmp_path / file} ")
    assert f"run `rm -rf {tmp_path / file}`, then repeat the command" in str(error.value)


def test_outcomes_that_lack_a_program_are_named(tmp_path: Path) -> None:
    benchmarked(tmp_path)
    outcomes = read_json(tmp_path / "outcomes.json")
    outcomes["outcomes"].pop()
    write_json(tmp_path / "outcomes.json", outcomes)
    with pytest.raises(
        InputError,
        match=r"outcomes\.json has 1 outcomes, which are not those of",
    ):
        benchmark_tables([tmp_path], {"base": {}})


@pytest.mark.parametrize("how", ["flip", "truncate"])
@pytest.mark.parametrize("file", ["runs.parquet", "trajectory.parquet", "study.json"])
def test_damaged_tables_of_the_page_are_named(tmp_path: Path, file: str, how: str) -> None:
    write(tmp_path, tables())
    DAMAGES[how](tmp_path / file)
    with pytest.raises(InputError, match=re.escape(f"run `rm -rf {tmp_path / file}`")):
        read_tables(tmp_path)


# --- the base -----------------------------------------------------------------------------------


@pytest.fixture
def model(base_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny base, with `base.json` in the parent folder."""
    folder = tmp_path / "model"
    shutil.copytree(base_folder, folder)
    record_base(tmp_path / "base.json", folder)
    return folder


def test_new_file_in_the_folder_of_the_base_is_named(model: Path) -> None:
    read_base(model.parent / "base.json")
    (model / "merges.txt").write_text("a b")
    (model / "README.md").write_text("not read by anybody")
    with pytest.raises(InputError, match=r"merges\.txt .*was recorded") as error:
        read_base(model.parent / "base.json")
    assert "put the recorded file back, or run `rm -rf " in str(error.value)
    (model / "merges.txt").unlink()
    read_base(model.parent / "base.json")


def test_damaged_download_of_the_base_is_repeated(model: Path) -> None:
    record = model.parent / "base.json"
    write_json(record, {**read_json(record), "downloaded": True})
    flip(model / "model.safetensors")
    with pytest.raises(InputError) as error:
        read_base(record)
    assert f"run `rm -rf {model} {record}`" in str(error.value)


def test_wrong_number_of_parameters_is_refused(model: Path) -> None:
    import torch

    from forgetting.models.loading import load_base

    count, cpu = load_meta_model(model).num_parameters(), torch.device("cpu")
    assert load_base(model, cpu, count).num_parameters() == count
    with pytest.raises(InputError, match=f"{count:,} parameters were loaded, and {count - 1:,}"):
        load_base(model, cpu, count - 1)


# --- digests ------------------------------------------------------------------------------------


def test_sha256sum_reads_the_record(tmp_path: Path) -> None:
    write_json(tmp_path / "a b.json", [1])
    check = ["sha256sum", "--check", record_path(tmp_path / "a b.json").name]
    assert subprocess.run(check, cwd=tmp_path, check=False, capture_output=True).returncode == 0
    flip(tmp_path / "a b.json")
    assert subprocess.run(check, cwd=tmp_path, check=False, capture_output=True).returncode == 1


def test_copy_without_hidden_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is accepted where a storage plugin makes the copies."""
    path = tmp_path / "a.json"
    path.write_text("[1]")
    with pytest.raises(InputError, match=r"has no recorded sha256 \(\.a\.json\.sha256; copies"):
        read_json(path)
    monkeypatch.setenv("FORGETTING_STORAGE_COPIES", "1")
    assert read_json(path) == [1]


def test_only_tables_with_a_record_are_verified(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": 1}\n')
    assert read_jsonl(path) == [{"a": 1}]
    write_jsonl(path, [{"a": 1}])
    path.write_text('{"a": 2}\n')
    with pytest.raises(InputError, match="If you have changed it yourself, run `rm -rf "):
        read_jsonl(path)


@pytest.mark.parametrize("old", [None, "old"])
def test_killed_writer_leaves_a_file_that_fits_its_record(tmp_path: Path, old: str | None) -> None:
    """Kills come at every system call that changes a name, one after the other."""
    path, ends = tmp_path / "a.json", set()
    code = """
import os, pathlib, sys
from forgetting.io import write_json
path, left = pathlib.Path(sys.argv[1]), [int(sys.argv[2])]
def deadly(original):
    def call(*arguments, **named):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), 9)
        return original(*arguments, **named)
    return call
for name in ("replace", "unlink", "chmod"):
    setattr(pathlib.Path, name, deadly(getattr(pathlib.Path, name)))
os.fsync = deadly(os.fsync)
write_json(path, "new")
"""
    for call in range(1, 40):
        for leftover in tmp_path.iterdir():
            leftover.unlink()
        if old:
            write_json(path, old)
        command = [shutil.which("python") or "python", "-c", code, str(path), str(call)]
        killed = subprocess.run(command, check=False).returncode
        if path.exists():
            ends.add(read_json(path))
        else:
            assert old is None
        if killed == 0:
            break
    assert killed == 0
    assert ends == {"new", *([old] if old else [])}
    write_json(path, "newer")
    assert {p.name for p in tmp_path.iterdir()} == {path.name, record_path(path).name}
    assert len(record_path(path).read_text().splitlines()) == 1


def test_old_folder_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "selected"

    def write(content: str, *, fail: bool = False) -> None:
        with atomic_folder(folder) as partial:
            (partial / "weights").write_text(content)
            assert not folder.exists() or (folder / "weights").read_text() == "old"
            if fail:
                raise ValueError

    write("old")
    with pytest.raises(ValueError):
        write("half of the n", fail=True)
    assert (folder / "weights").read_text() == "old"
    write("new")
    assert (folder / "weights").read_text() == "new"
    assert folder_damage(folder) is None
    assert [path.name for path in tmp_path.iterdir()] == ["selected"]


def test_folder_moved_by_a_killed_writer_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "selected", Path.rename
    with atomic_folder(folder) as partial:
        (partial / "weights").write_text("old")

    def deadly(self: Path, target: Path) -> Path:
        if self.name == ".selected":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", deadly)
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder) as partial:
        (partial / "weights").write_text("new")
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ValueError), atomic_folder(folder):
        raise ValueError
    assert (folder / "weights").read_text() == "old"
