"""One run trained by several processes: equal numbers, also after failures and restarts."""

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
from forgetting.config.evaluation import (
    EvaluationConfig,
    SelectionConfig,
    TaskConfig,
    TrainingBenchmarksConfig,
)
from forgetting.config.expand import Method, RunGroupConfig
from forgetting.config.methods import Hyperparameters, RankBudgetConfig
from forgetting.config.mitigations import MitigationConfig
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
from forgetting.training.training_job import RunContext, TrainingJob, run_group_items, run_key
from support.benchmark_rows import sciq
from support.params import finetune_params
from support.processes import FORKS, Stopped, run_in_processes, train, train_in_group, weights
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
    """Return a context of nine rows in batches of four, four and one, and five questions."""
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
    """Return methods of six steps with evaluations at 3 and 6: full, adapters, and dropout.

    About half of the gradients are clipped, since Adam would not notice if all were halved.
    Dropout masks differ between processes.
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
    """Return reference(kind, size), the record of an uninterrupted run, trained once."""

    @cache
    def made(kind: str, size: int) -> dict[str, Any]:
        return train(size, specs[kind], context, tmp_path_factory.mktemp("reference"))

    return made


def _training(spec: RunGroupConfig, **changes: Any) -> RunGroupConfig:
    return spec.model_copy(update={"training": spec.training.model_copy(update=changes)})


def _agree(found: dict[str, Any], expected: dict[str, Any], rel: float = 2e-5) -> None:
    """Compare losses, weights and items up to the order of summation."""
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
    """Compare losses, evaluations and weights bit for bit."""
    assert found["losses"] == expected["losses"]
    assert found["evaluations"] == expected["evaluations"]
    theirs = weights(expected, STEPS)
    for name, tensor in weights(found, STEPS).items():
        assert torch.equal(tensor, theirs[name]), name


# --- division of the work -------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [1, 2, 3, 4, 7])
def test_split_by_tokens_balances_the_shares(shares: int) -> None:
    """Two shares differ at most by the tokens of the longest example."""
    lengths = [(7 * n) % 23 + 1 for n in range(40)]
    dealt = split_by_tokens(lengths, shares)
    assert sorted(index for share in dealt for index in share) == list(range(40))
    tokens = [sum(lengths[index] for index in share) for share in dealt]
    assert max(tokens) - min(tokens) <= max(lengths)
    assert split_by_tokens(lengths[:2], 3) == [[1], [0], []]


@pytest.mark.parametrize("most", [1, 2, 32])
def test_all_processes_make_equally_many_passes(most: int) -> None:
    """Each example is in one pass of one process; fillers have no targets."""
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


def test_rank_seed_differs_between_processes() -> None:
    """A single process keeps the seed of the run."""
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
    """Uneven batches, sometimes smaller than the world size; clipping by the norm of all gradients;
    evaluation.
    """
    one, several = reference(kind, 1), reference(kind, size)
    _agree(several, one)
    assert (one["processes"], several["processes"]) == (1, size)
    assert one["trainable_parameters"] == several["trainable_parameters"]
    unclipped = train(1, _training(specs[kind], max_grad_norm=None), context, tmp_path)
    assert unclipped["losses"] != pytest.approx(one["losses"], rel=1e-3)


def test_bfloat16_rounds_alike_in_two_processes(
    specs: dict[str, RunGroupConfig], context: RunContext, reference: Reference, tmp_path: Path
) -> None:
    """Matrices and their inputs are rounded; norms, embeddings, sums and weights stay float32.

    A pass has one row, since the gradients of each pass are rounded.
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
    """Replay and KL are divided like the batch; EWC and L2-SP are not counted twice."""
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
"""By name: the configuration, changes of the method, changes of the training."""


@pytest.mark.parametrize("name", COMBINED)
def test_every_method_resumes_in_two_processes(
    specs: dict[str, RunGroupConfig], context: RunContext, tmp_path: Path, name: str
) -> None:
    """Stopped after a checkpoint and resumed, it equals one process that was never stopped."""
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
def test_general_text_is_evaluated_in_two_processes(
    specs: dict[str, RunGroupConfig],
    context: RunContext,
    rows: Rows,
    reference: Reference,
    tmp_path: Path,
    kind: str,
) -> None:
    """Every process reads all of the text; the run does not change."""
    blocks = cut_blocks(context.tokenizer, [row["answer"] for row in rows] * 4, 16)
    base = load_base(context.base, torch.device("cpu"))
    changed = replace(context, base_predictions=compute_base_predictions(base, blocks, 3))
    one, two = (train(size, specs[kind], changed, tmp_path / str(size)) for size in (1, 2))
    _agree(two, one)
    assert two["losses"] == reference(kind, 2)["losses"]
    items = pd.read_parquet(Path(two["folder"]) / "items-0000006.parquet")
    assert items["forgetting_kl"].max() > 1e-4


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_benchmarks_run_in_two_processes(
    specs: dict[str, RunGroupConfig],
    context: RunContext,
    reference: Reference,
    tmp_path: Path,
    kind: str,
) -> None:
    """Answers are the same, and the run does not change."""
    sums = [{"question": f"{n} + {n}", "answer": f"#### {2 * n}"} for n in range(6)]
    rows = {"sciq": sciq(6), "gsm8k": sums}
    for task, found in rows.items():
        for split in ("train", "validation", "test"):
            write_jsonl(tmp_path / "rows" / task / f"{split}.jsonl", found)
    tasks = {"sciq": TaskConfig(), "gsm8k": TaskConfig(num_fewshot=2, limit=3, max_new_tokens=5)}
    benchmarks = TrainingBenchmarks(
        TrainingBenchmarksConfig(tasks=tasks, batch_size=2),
        {task: tmp_path / "rows" / task for task in tasks},
        context.tokenizer,
    )
    changed = replace(context, training_benchmarks=benchmarks)
    # In this order, since benchmarks that have run can no longer be pickled.
    records = [train(size, specs[kind], changed, tmp_path / str(size)) for size in (2, 1)]
    assert records[0]["losses"] == reference(kind, 2)["losses"]
    (_, two), (_, one) = (run_group_items([record]) for record in records)
    assert len(one) == 2 * (6 + 3)
    columns = ["step", "epoch", "task", "item", "metric", "value", "choice"]
    pd.testing.assert_frame_equal(two[columns], one[columns])
    for ours, theirs in zip(two["response"], one["response"], strict=True):
        if ours != theirs:
            assert json.loads(ours) == pytest.approx(json.loads(theirs), abs=1e-3)


def _trunk_and_branch(spec: RunGroupConfig, context: RunContext, state: Path) -> Records:
    """Train the branch of the shorter duration in this process of a group, as the programs do."""
    process_group = ProcessGroup.init()
    changed = replace(context, process_group=process_group)

    def log(*_: Any) -> None:
        """Log nothing."""

    try:
        trunks = train_trunks(TrainingJob(spec, changed, {"base": "b"}, state, log))
        return train_cooldowns(TrainingJob(spec, changed, {"base": "b"}, state, log), 1.0, trunks)
    finally:
        process_group.destroy()


def test_a_branch_leaves_a_sharded_trunk(
    specs: dict[str, RunGroupConfig], context: RunContext, tmp_path: Path
) -> None:
    """It ends as the run of its duration that a single process trained."""
    durations = {"durations": [1.0, 3.0], "epochs": 3.0, "schedule": "wsd"}
    spec = _training(specs["full"], **durations)
    (two, other) = run_in_processes(2, _trunk_and_branch, spec, context, tmp_path / "two")
    assert two == other
    one = train(1, branches.single_duration(spec, 1.0), context, tmp_path / "one")
    assert (one["steps"], two[0]["duration"]) == (3, 1.0)
    _agree(two[0], one)


def test_lionw_is_sharded(
    specs: dict[str, RunGroupConfig], context: RunContext, tmp_path: Path
) -> None:
    """Signs of gradients near 0 may differ; the losses show that almost none does."""
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
    """The dropout mask of the adapter is drawn again; the key of the run does not change."""
    frugal = _training(specs[kind], activation_checkpointing=True)
    kept, recomputed = reference(kind, size), train(size, frugal, context, tmp_path)
    _same(recomputed, kept)
    assert kept["losses"][-1] < kept["losses"][0]
    setting = frugal.method.hyperparameters[0]
    assert run_key(frugal, setting, {}) == run_key(specs[kind], setting, {})


# --- resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "dropout"])
def test_stopped_process_group_resumes_bit_for_bit(
    specs: dict[str, RunGroupConfig],
    context: RunContext,
    reference: Reference,
    tmp_path: Path,
    kind: str,
) -> None:
    """Including the dropout of each process."""
    assert train(2, specs[kind], context, tmp_path, stop_at=5) is None
    _same(train(2, specs[kind], context, tmp_path), reference(kind, 2))


@pytest.mark.parametrize(
    ("before", "after"),
    [(2, 1), (1, 2), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(4, 2), (2, 4)])],
)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_run_resumes_with_another_world_size(
    specs: dict[str, RunGroupConfig],
    context: RunContext,
    reference: Reference,
    tmp_path: Path,
    kind: str,
    before: int,
    after: int,
) -> None:
    """Weights and moments are sharded again; no step before the checkpoint is repeated."""
    assert train(before, specs[kind], context, tmp_path, stop_at=4) is None
    (checkpoint,) = (path.parent for path in tmp_path.rglob("progress.json"))
    assert (checkpoint / "shards").exists() == (kind == "full" and before > 1)
    first = json.loads((checkpoint / "progress.json").read_text())["losses"]
    record = train(after, specs[kind], context, tmp_path)
    _agree(record, reference(kind, 1))
    assert record["losses"][:3] == first


def test_sharded_run_ends_as_transformers_models(context: RunContext, reference: Reference) -> None:
    """A single file, as one process writes it, without shards and training state."""
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


def test_half_removed_shards_make_no_model(
    specs: dict[str, RunGroupConfig],
    context: RunContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process killed while it removes the shards leaves the consolidated model intact."""
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


def test_large_model_is_saved_in_several_files(
    specs: dict[str, RunGroupConfig],
    context: RunContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Consolidation can be repeated after an interruption.

    A damaged shard is refused: the consolidated file would get a digest of its own.
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


# --- failures ----------------------------------------------------------------------------

FAULTY = """
import os, signal, sys
from forgetting.training import train_step, trainer
from finetune import main

step, forward = trainer.train_batch, train_step.target_logits
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
    return forward(model, batch)

trainer.train_batch, train_step.target_logits = watched, limited
main()
"""


@pytest.fixture
def launched(
    specs: dict[str, RunGroupConfig], context: RunContext, tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs the program in two processes, with a fault in one.

    The fault occurs at the moment `rank:step`: the process is killed, or it raises a RuntimeError
    with the text of `fault` in a pass of more than `most` rows.
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
def test_killing_one_process_ends_all_and_resumes(
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
    """Return the environment of a SLURM job on two nodes."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN)
    squeue = srun.with_name("squeue")
    squeue.write_text("#!/bin/sh\necho 2 4\n")
    for program in (srun, squeue):
        program.chmod(0o755)
    # Snakemake's plugin removes all SLURM variables but the id of the job.
    path = os.pathsep.join([str(srun.parent), os.environ["PATH"]])
    return {"PATH": path, "SLURM_JOB_ID": "7"}


@pytest.mark.slow
def test_two_nodes_train_like_two_processes_of_one(
    launched: Callable[..., subprocess.CompletedProcess[str]],
    specs: dict[str, RunGroupConfig],
    reference: Reference,
    tmp_path: Path,
) -> None:
    """The launchers rendezvous at the first node; every bit is the same."""
    done = launched("never", specs["full"], "2", **_two_nodes(tmp_path))
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((tmp_path / "runs.json").read_text())
    _same(record, reference("full", 2))
    assert record["processes"] == 2


def _leave_a_child(pipe: Any) -> None:
    """Act as a launcher with one process, which ends only with it."""
    if os.fork() == 0:
        parent = os.getppid()
        pipe.send("started")
        distributed.abort_with(parent)
    time.sleep(60)


def test_no_process_outlives_its_launcher() -> None:
    """The pipe is closed once all processes have ended after kill -9 of the launcher."""
    ours, theirs = FORKS.Pipe(duplex=False)
    launcher = FORKS.Process(target=_leave_a_child, args=(theirs,))
    launcher.start()
    theirs.close()
    assert ours.recv() == "started"
    launcher.kill()
    assert ours.poll(20)
    with pytest.raises(EOFError):
        ours.recv()


def _fail_in(ranks: list[int]) -> str | None:
    """Raise an input error in some ranks; return the message or status of this process."""
    process_group, outcome = ProcessGroup.init(), None
    try:
        with process_group.report_once():
            if process_group.rank in ranks:
                raise InputError("training.max_length: 8 tokens leave nothing")
    except InputError as error:
        outcome = str(error)
    except SystemExit as end:
        outcome = f"status {end.code}"
    process_group.barrier()  # the main process holds the store
    return outcome


def test_error_is_reported_once() -> None:
    """The first failing process reports it; the others exit silently with status 1."""
    message = "training.max_length: 8 tokens leave nothing"
    assert sorted(map(str, run_in_processes(2, _fail_in, [0, 1]))) == ["status 1", message]
    assert run_in_processes(2, _fail_in, [1]) == [None, message]
    with pytest.raises(InputError), SINGLE_PROCESS.report_once():
        raise InputError(message)


OOM_MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "nodes"), [("full", "1"), ("full", "2"), ("lora", "1")])
def test_out_of_memory_in_one_process_restarts_all(
    launched: Callable[..., subprocess.CompletedProcess[str]],
    specs: dict[str, RunGroupConfig],
    reference: Reference,
    tmp_path: Path,
    kind: str,
    nodes: str,
) -> None:
    """The launcher restarts all processes from the checkpoint; the numbers are those of an
    undisturbed run, and of one process.
    """
    there = _two_nodes(tmp_path) if nodes == "2" else {}
    done = launched("1:4", specs[kind], nodes, fault=OOM_MESSAGE, most=1, **there)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    message = "memory ran out with 2 examples in a pass; continuing with 1 from step 3"
    assert done.stdout.count("memory ran out") == done.stdout.count(message) == 1
    assert done.stdout.count("step 6/6") == 1
    (record,) = json.loads((tmp_path / "runs.json").read_text())
    _agree(record, reference(kind, 2))
    _agree(record, reference(kind, 1))
    assert not list(tmp_path.rglob("oom.json"))


def _memory_for_one_row(spec: RunGroupConfig, context: RunContext, state: Path) -> Records:
    """Train; the second process is out of memory with two rows in a pass."""
    original = train_step.target_logits

    def limited(model: Any, batch: Any) -> torch.Tensor:
        if examples_in(batch) > 1 and dist.get_rank() == 1:
            raise RuntimeError(OOM_MESSAGE)
        return original(model, batch)

    train_step.target_logits = limited
    return train_in_group(spec, context, state)


def test_later_job_knows_that_memory_ran_out(
    specs: dict[str, RunGroupConfig], context: RunContext, reference: Reference, tmp_path: Path
) -> None:
    """A job that ended before a checkpoint is resumed with larger passes allowed. The passes that
    did not fit are not tried again, and a finished run keeps no record of them.
    """
    with pytest.raises(OutOfMemory):
        run_in_processes(2, _memory_for_one_row, specs["full"], context, tmp_path)
    assert [path.read_text() for path in tmp_path.rglob("oom.json")] == ["2\n"]
    roomy = _training(specs["full"], micro_batch_size=4)
    (record,), _ = run_in_processes(2, _memory_for_one_row, roomy, context, tmp_path)
    _agree(record, reference("full", 1))
    assert not list(tmp_path.rglob("oom.json"))


def test_single_example_out_of_memory_ends_all(
    launched: Callable[..., subprocess.CompletedProcess[str]],
    specs: dict[str, RunGroupConfig],
    tmp_path: Path,
) -> None:
    """Nothing is restarted, and a single line reports the error."""
    ended = launched("1:4", _training(specs["full"], micro_batch_size=1), fault=OOM_MESSAGE)
    assert ended.returncode == 1
    message = "error: memory runs out with a single example in a forward pass of one of 2 processes"
    assert ended.stderr.startswith(message)
    assert ended.stderr.count("\n") == 1
    assert "training.max_length" in ended.stderr
    assert "memory ran out" not in ended.stdout
    assert not list(tmp_path.rglob("oom.json"))


@pytest.mark.slow
def test_other_failures_are_not_restarted(
    launched: Callable[..., subprocess.CompletedProcess[str]], specs: dict[str, RunGroupConfig]
) -> None:
    """The job ends with one traceback."""
    ended = launched("1:4", specs["full"], fault="mat1 and mat2 shapes cannot be multiplied")
    assert ended.returncode == 1
    assert ended.stderr.count("Traceback") == ended.stderr.count("RuntimeError: mat1") == 1
    assert "error:" not in ended.stderr
    assert "memory" not in ended.stdout


def _small_disk(spec: RunGroupConfig, context: RunContext, state: Path) -> None:
    """Train; the second process may write at most 10 kB to a file."""
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    train_in_group(spec, context, state)


def test_full_disk_of_one_process_leaves_no_checkpoint(
    specs: dict[str, RunGroupConfig], context: RunContext, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="step-0000003: not written by process 1"):
        run_in_processes(2, _small_disk, specs["full"], context, tmp_path)
    assert not list(tmp_path.rglob("progress.json"))


def test_job_without_gpus_is_one_process() -> None:
    """A site without GPUs passes 0 processes; the program runs once."""
    program = ["-c", "import os; print(os.environ.get('WORLD_SIZE'))"]
    for processes in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-m", "forgetting.training.launch", processes, "1", *program],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "None\n"
