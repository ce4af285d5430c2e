"""One run trained by several processes: the same numbers as by one, whatever becomes of them."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from forgetting.benchmarks.during_training import TrainingBenchmarks
from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig, TaskConfig, TrainingBenchmarksConfig
from forgetting.config.expand import Method, RunGroupConfig
from forgetting.config.methods import Hyperparameters, RankBudgetConfig
from forgetting.config.mitigations import MitigationConfig
from forgetting.config.selection import SelectionConfig
from forgetting.config.training import TrainingConfig
from forgetting.data.tokenize import Example
from forgetting.digests import visible_files
from forgetting.errors import InputError
from forgetting.evaluation.divergence import compute_base_predictions, cut_blocks
from forgetting.io import write_jsonl, write_table
from forgetting.models.loading import load_base
from forgetting.models.tuned import load_tuned
from forgetting.training import branches, distributed, sharded_checkpoints, train_step
from forgetting.training.branches import train_cooldowns, train_trunks
from forgetting.training.checkpoints import drop_training_state
from forgetting.training.distributed import (
    SINGLE_PROCESS,
    OutOfMemory,
    ProcessGroup,
    split_by_tokens,
)
from forgetting.training.run_group import RunContext, run_group_items, run_key
from support.benchmark_rows import sciq
from support.params import finetune_params
from support.processes import FORKS, Stopped, together, train, train_together, weights
from support.run_groups import examples_in, record_base

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
Rows = list[dict[str, Any]]
Records = list[dict[str, Any]]
Reference = Callable[[str, int], dict[str, Any]]
FULL = Method(
    name="full", kind="full", label="full", hyperparameters=[Hyperparameters(learning_rate=1e-3)]
)
STEPS = 6


@pytest.fixture(scope="module")
def context(base_folder: Path, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> RunContext:
    """Nine rows to learn in batches of four, four and one; five questions for two or four."""
    return RunContext(
        base=base_folder,
        tokenizer=tokenizer,
        train=rows[:9],
        probes={"new": rows[:3], "old": rows[8:]},
        base_value=0.1,
        device=torch.device("cpu"),
        precision=torch.float32,
        general_text={
            "world/documents": [{"id": f"text/{n}", "text": n * "la "} for n in range(3, 9)]
        },
    )


@pytest.fixture(scope="module")
def specs(tuning: Method) -> dict[str, RunGroupConfig]:
    """Six steps with evaluations at 3 and 6: full fine-tuning, adapters, adapters with dropout.

    About half of the gradients are clipped, since Adam would not notice if all were halved.
    Dropout is another one in each process.
    """
    spec = RunGroupConfig(
        method=FULL,
        seed=0,
        prompt=PromptConfig(),
        training=TrainingConfig(
            epochs=2.0, batch_size=4, micro_batch_size=2, warmup_epochs=0.0, max_grad_norm=7.1
        ),
        evaluation=EvaluationConfig(max_new_tokens=4),
        selection=SelectionConfig(probe="new"),
        precision="float32",
        knowledge={"new": "new", "old": "old"},
    )
    adapted = _training(spec, max_grad_norm=2.3).model_copy(update={"method": tuning})
    lora = tuning.model_copy(update={"dropout": 0.0})
    return {
        "full": spec,
        "lora": adapted.model_copy(update={"method": lora}),
        "dropout": adapted,
    }


@pytest.fixture(scope="module")
def reference(
    specs: dict[str, RunGroupConfig],
    context: RunContext,
    tmp_path_factory: pytest.TempPathFactory,
) -> Reference:
    """reference(kind, size): the record of an uninterrupted run, trained once for all tests."""

    @cache
    def made(kind: str, size: int) -> dict[str, Any]:
        return train(size, specs[kind], context, tmp_path_factory.mktemp("reference"))

    return made


def _training(spec: RunGroupConfig, **changes: Any) -> RunGroupConfig:
    return spec.model_copy(update={"training": spec.training.model_copy(update=changes)})


def _agree(found: dict[str, Any], expected: dict[str, Any], rel: float = 2e-5) -> None:
    """Losses, weights and items, but for the order of sums."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=rel)
    assert (found["steps"], found["tokens"]) == (expected["steps"], expected["tokens"])
    last = found["steps"]
    assert len(found["losses"]) == last
    theirs = weights(expected, last)
    ours = weights(found, last)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=10 * rel, atol=10 * rel)
    assert [point[:2] for point in found["evaluations"]] == [
        point[:2] for point in expected["evaluations"]
    ]
    for step, *_ in expected["evaluations"]:
        items, others = (
            pd.read_parquet(Path(record["folder"], f"items-{int(step):07d}.parquet"))
            for record in (found, expected)
        )
        pd.testing.assert_frame_equal(items, others, rtol=100 * rel, atol=100 * rel)


def _same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses, points and weights, bit for bit."""
    assert found["losses"] == expected["losses"]
    assert found["evaluations"] == expected["evaluations"]
    theirs = weights(expected, STEPS)
    for name, tensor in weights(found, STEPS).items():
        assert torch.equal(tensor, theirs[name]), name


# --- who does what ------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [1, 2, 3, 4, 7])
def test_every_example_is_dealt_once_and_the_shares_weigh_the_same(shares: int) -> None:
    """No two shares differ by more tokens than the longest example has."""
    lengths = [(7 * n) % 23 + 1 for n in range(40)]
    dealt = split_by_tokens(lengths, shares)
    assert sorted(index for share in dealt for index in share) == list(range(40))
    tokens = [sum(lengths[index] for index in share) for share in dealt]
    assert max(tokens) - min(tokens) <= max(lengths)
    assert split_by_tokens(lengths[:2], 3) == [[1], [0], []]


@pytest.mark.parametrize("most", [1, 2, 32])
def test_all_processes_make_as_many_passes(most: int) -> None:
    """Each example is in one pass of one process; what fills up has no targets."""
    rows = [Example(ids=[n] * (n + 2), prompt_length=1) for n in range(7)]
    passes = [ProcessGroup(rank, 4).microbatches(rows, most, 10) for rank in range(4)]
    assert len({len(own) for own in passes}) == 1
    found = [example for own in passes for part in own for example in part]
    assert sorted(e.ids[0] for e in found if e.targets) == list(range(7))
    assert max(len(part) for own in passes for part in own) <= most
    assert ProcessGroup(1, 2).microbatches(rows[:1], most, 10)[0][0].targets == 0
    assert (
        SINGLE_PROCESS.microbatches([], most, 10)
        == ProcessGroup(1, 2).microbatches([], most, 10)
        == []
    )


def test_each_process_draws_a_dropout_of_its_own() -> None:
    """A process alone draws what it always drew."""
    assert SINGLE_PROCESS.rank_seed(5) == ProcessGroup(0, 2).rank_seed(5) == 5
    assert (
        len({ProcessGroup(rank, 4).rank_seed(seed) for rank in range(4) for seed in range(9)}) == 36
    )


# --- the same numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_several_processes_train_like_one(
    specs: dict[str, RunGroupConfig],
    context: RunContext,
    reference: Reference,
    tmp_path: Path,
    kind: str,
    size: int,
) -> None:
    """Batches of uneven rows, fewer than processes at times; clipped by the norm of all gradients;
    and what is measured.
    """
    one, several = reference(kind, 1), reference(kind, size)
    _agree(several, one)
    assert (one["processes"], several["processes"]) == (1, size)
    assert one["trainable_parameters"] == several["trainable_parameters"]
    unclipped = train(1, _training(specs[kind], max_grad_norm=None), context, tmp_path)
    assert unclipped["losses"] != pytest.approx(one["losses"], rel=1e-3)


def test_bfloat16_rounds_in_two_processes_what_it_rounds_in_one(
    specs: dict[str, RunGroupConfig], context: RunContext, reference: Reference, tmp_path: Path
) -> None:
    """Matrices and what they multiply, but no norm, embedding or sum; weights stay float32.

    One row a pass, since the gradients of each pass are rounded.
    """
    rounded = replace(context, precision=torch.bfloat16)
    spec = _training(specs["full"], micro_batch_size=1)
    one, two = (train(size, spec, rounded, tmp_path / str(size)) for size in (1, 2))
    _agree(two, one, rel=1e-4)
    assert two["losses"] != pytest.approx(reference("full", 1)["losses"], rel=1e-4)
    assert {tensor.dtype for tensor in weights(two, STEPS).values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_mitigations_are_the_same_in_two_processes(
    specs: dict[str, RunGroupConfig], context: RunContext, tmp_path: Path, kind: str
) -> None:
    """Replay and KL are shared like the batch; EWC and L2-SP are not counted twice."""
    table = "world/documents"
    mitigation = MitigationConfig.model_validate(
        {
            "replay": {"table": table, "ratio": 0.3},
            "kl": {"weight": 0.5},
            "ewc": {"weight": 50.0, "table": table, "samples": 3},
            "l2_sp": {"weight": 0.5},
        }
    )
    tuning = specs[kind].method.model_copy(update={"mitigation": mitigation})
    spec = specs[kind].model_copy(update={"method": tuning})
    one, two = (train(size, spec, context, tmp_path / str(size)) for size in (1, 2))
    _agree(two, one, rel=1e-4)


COMBINED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "adalora": (
        "lora",
        {"variant": "adalora", "rank_budget": RankBudgetConfig(), "initial_rank": 6},
        {},
    ),
    "dora": ("lora", {"variant": "dora", "embeddings": "trained"}, {"packing": True}),
    "pissa": ("lora", {"variant": "pissa", "loraplus_lr_ratio": 4.0}, {"optimizer": "adafactor"}),
    "frozen": (
        "full",
        {"embeddings": "frozen"},
        {"packing": True, "schedule": "wsd", "activation_checkpointing": True},
    ),
    "ratio": ("full", {"embedding_lr_ratio": 0.5}, {"schedule": "cosine", "min_lr_ratio": 0.1}),
}
"""By name: the spec, what differs of the method, what differs of the training."""


@pytest.mark.parametrize("name", COMBINED)
def test_every_method_is_trained_and_goes_on_in_two_processes(
    specs: dict[str, RunGroupConfig], context: RunContext, tmp_path: Path, name: str
) -> None:
    """Stopped after its checkpoint and started again, as in one process and never stopped."""
    kind, method, training = COMBINED[name]
    if training.get("packing"):
        training = training | {"batch_size": 1, "max_length": 60}
    spec = _training(specs[kind], **training)
    spec = spec.model_copy(update={"method": spec.method.model_copy(update=method)})
    one = train(1, spec, context, tmp_path / "one")
    middle = one["steps"] // 2
    assert train(2, spec, context, tmp_path / "two", stop_at=middle + 1) is None
    two = train(2, spec, context, tmp_path / "two")
    _agree(two, one, rel=1e-4)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_general_text_is_measured_in_two_processes(
    specs: dict[str, RunGroupConfig],
    context: RunContext,
    rows: Rows,
    reference: Reference,
    tmp_path: Path,
    kind: str,
) -> None:
    """Every process reads it with the model that all of them hold; the run is the same run."""
    blocks = cut_blocks(context.tokenizer, [row["answer"] for row in rows] * 4, 16)
    base = load_base(context.base, torch.device("cpu"))
    told = replace(context, base_predictions=compute_base_predictions(base, blocks, 3))
    one, two = (train(size, specs[kind], told, tmp_path / str(size)) for size in (1, 2))
    _agree(two, one)
    assert two["losses"] == reference(kind, 2)["losses"]
    items = pd.read_parquet(Path(two["folder"]) / "items-0000006.parquet")
    assert items["forgetting_kl"].max() > 1e-4


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_benchmarks_are_asked_in_two_processes(
    specs: dict[str, RunGroupConfig],
    context: RunContext,
    reference: Reference,
    tmp_path: Path,
    kind: str,
) -> None:
    """Each process asks the model that all of them hold: the answers, and the run, are the same."""
    sums = [{"question": f"{n} + {n}", "answer": f"#### {2 * n}"} for n in range(6)]
    rows = {"sciq": sciq(6), "gsm8k": sums}
    for task, found in rows.items():
        for split in ("train", "validation", "test"):
            write_jsonl(tmp_path / "rows" / task / f"{split}.jsonl", found)
    tasks = {"sciq": TaskConfig(), "gsm8k": TaskConfig(num_fewshot=2, limit=3, max_new_tokens=5)}
    along = TrainingBenchmarks(
        TrainingBenchmarksConfig(tasks=tasks, batch_size=2),
        {task: tmp_path / "rows" / task for task in tasks},
        context.tokenizer,
    )
    told = replace(context, training_benchmarks=along)
    # In this order, since what has been asked once can no longer be sent to other processes.
    records = [train(size, specs[kind], told, tmp_path / str(size)) for size in (2, 1)]
    assert records[0]["losses"] == reference(kind, 2)["losses"]
    (_, two), (_, one) = (run_group_items([record]) for record in records)
    assert len(one) == 2 * (6 + 3)
    columns = ["step", "epoch", "task", "item", "metric", "value", "choice"]
    pd.testing.assert_frame_equal(two[columns], one[columns])
    for ours, theirs in zip(two["response"], one["response"], strict=True):
        if ours != theirs:
            assert json.loads(ours) == pytest.approx(json.loads(theirs), abs=1e-3)


def _trunk_and_branch(spec: RunGroupConfig, context: RunContext, state: Path) -> Records:
    """The branch of the shorter duration, as the programs train it in this process and its team."""
    joined = ProcessGroup.init()
    told = replace(context, process_group=joined)

    def tell(*_: Any) -> None:
        """Nothing is looked at."""

    try:
        trunks = train_trunks([spec], told, {"base": "b"}, state, tell)
        return train_cooldowns(spec, 1.0, trunks, told, {"base": "b"}, state, tell)
    finally:
        joined.destroy()


def test_a_branch_leaves_a_sharded_trunk(
    specs: dict[str, RunGroupConfig], context: RunContext, tmp_path: Path
) -> None:
    """It ends as the run of its duration that one process trained alone."""
    durations = {"durations": [1.0, 3.0], "epochs": 3.0, "schedule": "wsd"}
    spec = _training(specs["full"], **durations)
    (two, other) = together(2, _trunk_and_branch, spec, context, tmp_path / "two")
    assert two == other
    one = train(1, branches.single_duration(spec, 1.0), context, tmp_path / "one")
    assert (one["steps"], two[0]["duration"]) == (3, 1.0)
    _agree(two[0], one)


def test_lion_is_sharded_as_adam_is(
    specs: dict[str, RunGroupConfig], context: RunContext, tmp_path: Path
) -> None:
    """The sign of a gradient near 0 may be another; the losses tell that nearly none is."""
    spec = _training(specs["full"], optimizer="lionw")
    one, two = (train(size, spec, context, tmp_path / str(size)) for size in (1, 2))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)


# --- activation checkpointing -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "size"), [("full", 1), ("dropout", 1), ("full", 2), ("dropout", 2)]
)
def test_recomputed_activations_change_no_bit(
    specs: dict[str, RunGroupConfig],
    context: RunContext,
    reference: Reference,
    tmp_path: Path,
    kind: str,
    size: int,
) -> None:
    """The adapter's dropout is drawn again as it was; the run is the same run."""
    frugal = _training(specs[kind], activation_checkpointing=True)
    kept, recomputed = reference(kind, size), train(size, frugal, context, tmp_path)
    _same(recomputed, kept)
    assert kept["losses"][-1] < kept["losses"][0]
    setting = frugal.method.hyperparameters[0]
    assert run_key(frugal, setting, {}) == run_key(specs[kind], setting, {})


# --- going on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "dropout"])
def test_a_stopped_team_goes_on_as_if_it_had_not_been(
    specs: dict[str, RunGroupConfig],
    context: RunContext,
    reference: Reference,
    tmp_path: Path,
    kind: str,
) -> None:
    """Bit for bit, dropout of each process included."""
    assert train(2, specs[kind], context, tmp_path, stop_at=5) is None
    _same(train(2, specs[kind], context, tmp_path), reference(kind, 2))


@pytest.mark.parametrize(
    ("before", "after"),
    [(2, 1), (1, 2), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(4, 2), (2, 4)])],
)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_another_number_of_processes_goes_on(
    specs: dict[str, RunGroupConfig],
    context: RunContext,
    reference: Reference,
    tmp_path: Path,
    kind: str,
    before: int,
    after: int,
) -> None:
    """Weights and moments come back in other parts; no step before the checkpoint is repeated."""
    assert train(before, specs[kind], context, tmp_path, stop_at=4) is None
    (checkpoint,) = (path.parent for path in tmp_path.rglob("progress.json"))
    assert (checkpoint / "shards").exists() == (kind == "full" and before > 1)
    first = json.loads((checkpoint / "progress.json").read_text())["losses"]
    record = train(after, specs[kind], context, tmp_path)
    _agree(record, reference(kind, 1))
    assert record["losses"][:3] == first


def test_a_sharded_run_ends_as_models_that_transformers_reads(
    context: RunContext, reference: Reference
) -> None:
    """One file, as one process writes it; no parts, no training state."""
    one, two = (Path(reference("full", size)["folder"]) / "step-0000006" for size in (1, 2))
    assert sorted(file.name for file in visible_files(two)) == sorted(
        file.name for file in visible_files(one)
    )
    assert json.loads((two / "config.json").read_text()) == json.loads(
        (one / "config.json").read_text()
    )
    model = load_tuned(context.base, two, torch.device("cpu"))
    stored = weights(reference("full", 2), 6)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name]), name


def test_parts_that_were_half_removed_make_no_model(
    specs: dict[str, RunGroupConfig],
    context: RunContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed while they are removed, the model that was made of all of them stays as it is."""
    train(2, specs["full"], context, tmp_path, stop_at=4)
    (checkpoint,) = (path.parent for path in tmp_path.rglob("progress.json"))

    def killed(folder: Path, **_: Any) -> None:
        if folder.exists():
            next(folder.iterdir()).unlink()
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(sharded_checkpoints.shutil, "rmtree", killed)
        with pytest.raises(Stopped):
            drop_training_state(checkpoint.parent)
    before = (checkpoint / "model.safetensors").read_bytes()
    drop_training_state(checkpoint.parent)
    assert (checkpoint / "model.safetensors").read_bytes() == before
    assert {path.name for path in visible_files(checkpoint)} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "progress.json",
    }


def test_a_model_too_large_for_one_file_is_several(
    specs: dict[str, RunGroupConfig],
    context: RunContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And it may be made of its parts again, when the first attempt was interrupted.

    A part that is damaged is refused: joined, it would have a digest of its own.
    """
    train(2, specs["full"], context, tmp_path, stop_at=4)
    (checkpoint,) = (path.parent for path in tmp_path.rglob("progress.json"))
    again = shutil.copytree(checkpoint, tmp_path / "again")
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged" / "step")
    part = min((damaged / "shards").glob("*.safetensors"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 64
    part.write_bytes(content)
    with pytest.raises(InputError, match=f"{part.name} differs from what was written"):
        sharded_checkpoints.consolidate_shards(damaged)
    shutil.copytree(checkpoint / "shards", tmp_path / "shards")
    sharded_checkpoints.consolidate_shards(checkpoint)
    monkeypatch.setattr(sharded_checkpoints, "FILE_BYTES", 30_000)
    sharded_checkpoints.consolidate_shards(again)
    shutil.copytree(tmp_path / "shards", again / "shards")
    sharded_checkpoints.consolidate_shards(again)
    assert len(list(again.glob("model-*-of-*.safetensors"))) > 1
    several = AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for (name, tensor), other in zip(several.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(tensor, other), name


# --- what goes wrong ----------------------------------------------------------------------------

FAULTY = """
import os, signal, sys
from forgetting.training import gradients, train
from finetune import main

step, pass_ = train._step, gradients.target_logits
moment, fault, most = sys.argv.pop(1).split(",")
here = False

def watched(model, examples, runs, stack):
    global here
    here = f"{runs[0].config.process_group.rank}:{runs[0].state.step}" == moment
    if here and fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(model, examples, runs, stack)

def limited(model, batch):
    examples = (batch.positions == 0).sum() if batch.layout else len(batch.ids)
    if here and examples > int(most):
        raise RuntimeError(fault)
    return pass_(model, batch)

train._step, gradients.target_logits = watched, limited
main()
"""


@pytest.fixture
def launched(
    specs: dict[str, RunGroupConfig], context: RunContext, tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """launched(moment, spec): the program in two processes, with a fault in one.

    The moment is `rank:step`. The process is killed there, or with a `fault` that is another word
    raises that, in a pass of more than `most` rows.
    """
    (tmp_path / "faulty.py").write_text(FAULTY)
    data = tmp_path / "data"
    write_jsonl(data / "train.jsonl", context.train)
    for name, probe in context.probes.items():
        write_jsonl(data / "probes" / f"{name}.jsonl", probe)
    record_base(tmp_path / "base.json", context.base)
    items = [{"probe": "new", "rougeL_recall": 0.1}]
    write_table(tmp_path / "base.parquet", pd.DataFrame(items))

    def start(
        moment: str,
        spec: RunGroupConfig,
        nodes: str = "1",
        fault: str = "kill",
        most: int = 0,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        options = {
            "params": finetune_params(tmp_path, spec),
            "base": tmp_path / "base.json",
            "base-items": tmp_path / "base.parquet",
            "data": data,
            "state": tmp_path / "state",
            "items": tmp_path / "items.parquet",
            "checkpoints": tmp_path / "checkpoints.json",
            "runs": tmp_path / "runs.json",
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        program = [str(tmp_path / "faulty.py"), f"{moment},{fault},{most}", *arguments]
        paths = [str(ROOT / "workflow"), str(ROOT / "workflow" / "scripts")]
        return subprocess.run(
            [sys.executable, "-m", "forgetting.training.launch", "2", nodes, *program],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
            | environment,
            capture_output=True,
            text=True,
            timeout=900,
        )

    return start


@pytest.mark.slow
def test_killing_one_process_ends_all_and_the_next_start_goes_on(
    launched: Callable[..., subprocess.CompletedProcess[str]],
    specs: dict[str, RunGroupConfig],
    reference: Reference,
    tmp_path: Path,
) -> None:
    """kill -9 in the fifth step, after a checkpoint: no hang, and the same bits at the end."""
    killed = launched("1:4", specs["full"])
    assert killed.returncode == 1, killed.stderr
    assert killed.stderr.startswith("error: process 1 of 0 to 1 was killed by SIGKILL")
    assert killed.stderr.count("\n") == 1
    assert not (tmp_path / "runs.json").exists()
    assert [path.parent.name for path in tmp_path.rglob("progress.json")] == ["step-0000003"]
    done = launched("never", specs["full"])
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((tmp_path / "runs.json").read_text())
    _same(record, reference("full", 2))
    assert len(pd.read_parquet(tmp_path / "items.parquet")) == 2 * 5
    assert done.stdout.count("step 6/6") == 1


SRUN = """#!/bin/bash
# Starts a program on two nodes, as srun does, which are this machine: where one fails, the other is
# killed, and the status is the larger one.
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_NODEID=0 "$@" &
SLURM_NODEID=1 "$@" &
wait -n
first=$?
[ $first = 0 ] || kill -KILL $(jobs -pr)
wait -n
second=$?
exit $(( first > second ? first : second ))
"""


def _two_nodes(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of SLURM on two nodes."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN)
    squeue = srun.with_name("squeue")
    squeue.write_text("#!/bin/sh\necho 2 4\n")
    for program in (srun, squeue):
        program.chmod(0o755)
    # The number is all that Snakemake's plugin leaves of SLURM's variables.
    path = os.pathsep.join([str(srun.parent), os.environ["PATH"]])
    return {"PATH": path, "SLURM_JOB_ID": "7"}


@pytest.mark.slow
def test_two_nodes_train_like_two_processes_of_one(
    launched: Callable[..., subprocess.CompletedProcess[str]],
    specs: dict[str, RunGroupConfig],
    reference: Reference,
    tmp_path: Path,
) -> None:
    """The launchers meet at the first node; every bit is the same."""
    done = launched("never", specs["full"], "2", **_two_nodes(tmp_path))
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((tmp_path / "runs.json").read_text())
    _same(record, reference("full", 2))
    assert record["processes"] == 2


def _leave_a_child(pipe: Any) -> None:
    """As a launcher and a process of a team, which ends only with it."""
    if os.fork() == 0:
        parent = os.getppid()
        pipe.send("started")
        distributed._abort_with(parent)
    time.sleep(60)


def test_no_process_outlives_its_launcher() -> None:
    """kill -9 of the launcher, which then ends nobody: the pipe is closed when all have ended."""
    ours, theirs = FORKS.Pipe(duplex=False)
    launcher = FORKS.Process(target=_leave_a_child, args=(theirs,))
    launcher.start()
    theirs.close()
    assert ours.recv() == "started"
    launcher.kill()
    assert ours.poll(20)
    with pytest.raises(EOFError):
        ours.recv()


def _mistaken(ranks: list[int]) -> str | None:
    """How a program ends that is mistaken in these processes: with a message, or without."""
    joined, told = ProcessGroup.init(), None
    try:
        with joined.report_once():
            if joined.rank in ranks:
                raise InputError("training.max_length: 8 tokens leave nothing")
    except InputError as error:
        told = str(error)
    except SystemExit as end:
        told = f"status {end.code}"
    joined.barrier()  # the first process, here, holds what they write for each other
    return told


def test_a_mistake_is_told_once() -> None:
    """By whichever process meets it first; the others end without a word, but not well."""
    told = "training.max_length: 8 tokens leave nothing"
    assert sorted(map(str, together(2, _mistaken, [0, 1]))) == ["status 1", told]
    assert together(2, _mistaken, [1]) == [None, told]
    with pytest.raises(InputError), SINGLE_PROCESS.report_once():
        raise InputError(told)


NO_ROOM = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "nodes"), [("full", "1"), ("full", "2"), ("lora", "1")])
def test_memory_that_runs_out_in_one_process_halves_the_passes_of_all(
    launched: Callable[..., subprocess.CompletedProcess[str]],
    specs: dict[str, RunGroupConfig],
    reference: Reference,
    tmp_path: Path,
    kind: str,
    nodes: str,
) -> None:
    """All are started again, by themselves, and go on from the checkpoint: the numbers are those
    of an undisturbed run, and of one process.
    """
    there = _two_nodes(tmp_path) if nodes == "2" else {}
    done = launched("1:4", specs[kind], nodes, fault=NO_ROOM, most=1, **there)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    told = "memory ran out with 2 examples in a pass; going on with 1 from step 3"
    assert done.stdout.count("memory ran out") == done.stdout.count(told) == 1
    assert done.stdout.count("step 6/6") == 1
    (record,) = json.loads((tmp_path / "runs.json").read_text())
    _agree(record, reference(kind, 2))
    _agree(record, reference(kind, 1))
    assert not list(tmp_path.rglob("no-room.json"))


def _memory_for_one_row(spec: RunGroupConfig, context: RunContext, state: Path) -> Records:
    """The second process has no room for two rows at once."""
    original = train_step.target_logits

    def limited(model: Any, batch: Any) -> torch.Tensor:
        if examples_in(batch) > 1 and dist.get_rank() == 1:
            raise RuntimeError(NO_ROOM)
        return original(model, batch)

    train_step.target_logits = limited
    return train_together(spec, context, state)


def test_a_job_that_is_started_later_knows_that_memory_ran_out(
    specs: dict[str, RunGroupConfig], context: RunContext, reference: Reference, tmp_path: Path
) -> None:
    """Ended before a checkpoint could tell, and started with larger passes allowed: it is the same
    run, and what did not fit is not tried again. A finished run keeps no note of it.
    """
    with pytest.raises(OutOfMemory):
        together(2, _memory_for_one_row, specs["full"], context, tmp_path)
    assert [path.read_text() for path in tmp_path.rglob("no-room.json")] == ["2\n"]
    roomy = _training(specs["full"], micro_batch_size=4)
    (record,), _ = together(2, _memory_for_one_row, roomy, context, tmp_path)
    _agree(record, reference("full", 1))
    assert not list(tmp_path.rglob("no-room.json"))


def test_an_example_that_fits_no_memory_of_one_process_is_told_in_one_line(
    launched: Callable[..., subprocess.CompletedProcess[str]],
    specs: dict[str, RunGroupConfig],
    tmp_path: Path,
) -> None:
    """There is no half of it: nothing is started again, and nothing told of who was ended."""
    ended = launched("1:4", _training(specs["full"], micro_batch_size=1), fault=NO_ROOM)
    assert ended.returncode == 1
    told = "error: memory runs out with a single example in a forward pass of one of 2 processes"
    assert ended.stderr.startswith(told)
    assert ended.stderr.count("\n") == 1
    assert "training.max_length" in ended.stderr
    assert "memory ran out" not in ended.stdout
    assert not list(tmp_path.rglob("no-room.json"))


@pytest.mark.slow
def test_another_failure_than_of_memory_is_not_repeated(
    launched: Callable[..., subprocess.CompletedProcess[str]], specs: dict[str, RunGroupConfig]
) -> None:
    """It is told by its traceback, once, and the job ends."""
    ended = launched("1:4", specs["full"], fault="mat1 and mat2 shapes cannot be multiplied")
    assert ended.returncode == 1
    assert ended.stderr.count("Traceback") == ended.stderr.count("RuntimeError: mat1") == 1
    assert "error:" not in ended.stderr
    assert "memory" not in ended.stdout


def _small_disk(spec: RunGroupConfig, context: RunContext, state: Path) -> None:
    """The second process may write little."""
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    train_together(spec, context, state)


def test_a_disk_that_is_full_for_one_process_is_told_and_leaves_no_checkpoint(
    specs: dict[str, RunGroupConfig], context: RunContext, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="step-0000003: not written by process 1"):
        together(2, _small_disk, specs["full"], context, tmp_path)
    assert not list(tmp_path.rglob("progress.json"))


def test_a_job_that_has_no_gpu_to_ask_for_is_one_process() -> None:
    """A site without GPUs gives the launcher a 0, and the program is run once, by itself."""
    program = ["-c", "import os; print(os.environ.get('WORLD_SIZE'))"]
    for processes in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-m", "forgetting.training.launch", processes, "1", *program],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "None\n"
