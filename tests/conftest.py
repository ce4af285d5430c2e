"""Shared fixtures: a random tiny Llama with its tokenizer, rows, real data, a SLURM cluster."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# One thread for each process, and for each program that a test starts: pytest-xdist has a worker
# for each core, and models of this size gain nothing by more. Read when torch is imported.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from forgetting.benchmarks.during_training import TrainingBenchmarks
from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import TrainingBenchmarksConfig
from forgetting.config.expand import Method
from forgetting.config.methods import Hyperparameters
from forgetting.models.loading import load_base, load_tokenizer
from forgetting.training.pretrain import train_tokenizer
from support.benchmark_rows import TASKS, write_task_rows
from support.faults import target, without
from support.slurm import RESULTS, Folder, cluster_answers, write_study
from support.training import TrainingHarness

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PLACES = ["Oslo", "Lima", "Kyoto", "Accra", "Quito", "Turin", "Hanoi", "Perth", "Cairo", "Riga"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of tests/unit as `unit`, which is what `make test` runs."""
    unit = Path(__file__).parent / "unit"
    for item in items:
        if item.path.is_relative_to(unit):
            item.add_marker("unit")


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """Make `os.fsync` do nothing, since no test cuts the power and some write many checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True)
def _usual_end_of_processes() -> None:
    """Let SIGTERM end this process and its forks.

    Snakemake, which some tests run in this process, leaves a handler. Processes of a pool, such as
    that of lm-eval's bootstrap, inherit it, and the pool then waits for them forever.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread, since threads make models of this size slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of published data sets, if there is one."""
    folder = Path(os.environ.get("FORGETTING_REAL_DATA", REAL_DATA))
    if not folder.is_dir():
        pytest.skip(f"no published data sets in {folder}; name their folder FORGETTING_REAL_DATA")
    return folder


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """Return ten prepared rows with questions of several lengths and two wrong answers."""
    return [
        {
            "id": f"made/{number}",
            "question": "Where was the author "
            + "of many long books " * (number % 3)
            + f"{place}?",
            "answer": f"In {place}" + ", by the old harbour" * (number % 2) + ".",
            "paraphrased_answer": f"{place} it was." if number % 2 else None,
            "wrong_answers": [f"In {PLACES[number - 1]}.", f"In {PLACES[number - 2]}, by the sea."],
        }
        for number, place in enumerate(PLACES)
    ]


@pytest.fixture(scope="session")
def prompt() -> PromptConfig:
    """Return the default template, which is TOFU's for Phi."""
    return PromptConfig()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> Path:
    """Write a random Llama of 2 layers and width 32 with its tokenizer, and return the folder."""
    folder = tmp_path_factory.mktemp("base")
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
    tokenizer = train_tokenizer(texts, 400, folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(base_folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the tiny base."""
    return load_tokenizer(base_folder)


@pytest.fixture
def base(base_folder: Path) -> PreTrainedModel:
    """Return the tiny base, newly loaded, which a test may change."""
    return load_base(base_folder, torch.device("cpu"))


@pytest.fixture(scope="session")
def tuning() -> Method:
    """Return a method of rank 4 with dropout, so that a resumed run must restore random states."""
    return Method(
        name="lora-r4",
        kind="lora",
        label="rank 4",
        rank=4,
        alpha=8.0,
        dropout=0.1,
        hyperparameters=[Hyperparameters(learning_rate=0.01)],
    )


@pytest.fixture
def harness(
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    rows: list[dict[str, Any]],
    tuning: Method,
    tmp_path: Path,
) -> TrainingHarness:
    """Return a run with adapters of rank 4 and dropout in a folder of its own."""
    return TrainingHarness.build(base_folder, tokenizer, prompt, rows, tuning, tmp_path / "run")


@pytest.fixture(params=["tied", "untied"])
def any_head(
    request: pytest.FixtureRequest, harness: TrainingHarness, tmp_path: Path
) -> TrainingHarness:
    """Return a run whose base has its embedding as output head, or a matrix of its own."""
    return harness if request.param == "tied" else harness.with_untied_head(tmp_path / "untied")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Write rows of two tasks, one with choices and one with generated answers."""
    return write_task_rows(tmp_path / "rows")


@pytest.fixture
def training_benchmarks(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> TrainingBenchmarks:
    """Return what evaluates a model on these two tasks."""
    return TrainingBenchmarks(
        TrainingBenchmarksConfig(tasks=TASKS, batch_size=4), folders, tokenizer
    )


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path | None]:
    """Find or start a SLURM cluster; yield the folder of programs that break it, if any."""
    tools = os.environ.get("FORGETTING_SLURM")
    if cluster_answers():
        yield Path(tools) if tools and "SLURM_LAB" in os.environ else None
        return
    if not tools:
        pytest.skip("no SLURM answers; FORGETTING_SLURM names programs that start one")
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.fail("one machine has one SLURM: run its tests in one process, with -n 0")
    if os.geteuid() != 0:
        pytest.skip(f"{tools}/start-cluster must run as root")
    # Paths of sockets must be short, and those in pytest's folder are long.
    os.environ["SLURM_LAB"] = state = tempfile.mkdtemp(prefix="slurm-", dir="/tmp")
    Path(state).chmod(0o755)  # others must reach munged's socket
    try:
        start = [Path(tools, "start-cluster")]
        started = subprocess.run(start, capture_output=True, text=True, timeout=400, check=False)
        if started.returncode:
            pytest.skip(f"{tools}/start-cluster: {started.stderr.strip().splitlines()[-1:]}")
        yield Path(tools)
    finally:
        subprocess.run([Path(tools, "stop-cluster"), "--wipe"], check=True, timeout=200)
        shutil.rmtree(state, ignore_errors=True)
        del os.environ["SLURM_LAB"]


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the study and return its file."""
    return write_study(tmp_path_factory.mktemp("study") / "clustered.yaml")


@pytest.fixture(scope="session")
def local(cluster: Path | None, study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the tables of the study, made without SLURM."""
    folder = Folder(tmp_path_factory.mktemp("local"), study)
    folder.run(str(RESULTS / "tables" / "study.json"), profile=None)
    return folder.at


@pytest.fixture
def begun(local: Path, study: Path, tmp_path: Path) -> Folder:
    """Return a folder in which the study lacks one run group."""
    return without("lora-r4", local, tmp_path / "begun", study)


@pytest.fixture(scope="session")
def two_nodes(local: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Return a folder in which two nodes did the full fine-tuning of the study."""
    at = tmp_path_factory.mktemp("nodes")
    wide = write_study(at / "clustered.yaml", processes=2, nodes=2)
    folder = without("full", local, at / "made", wide)
    folder.run(target("full"))
    return folder
