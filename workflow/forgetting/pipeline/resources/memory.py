"""Bytes that jobs take: on the device, in the machine's memory, on disk.

What is trained is float32, with AdamW 16 bytes a weight: 4 of itself, 4 of its gradient, 8 of two
moments; Lion has one moment, 12 bytes, Adafactor about none, 8. `full` in several processes has a
share of these in each. In bfloat16 arithmetic frozen matrices under an adapter take 2 bytes, other
frozen weights 4, and trained matrices have a copy of 2 for as long as a pass lasts.
"""

from __future__ import annotations

from collections.abc import Sequence

from forgetting.config.expand import Method
from forgetting.config.variants import VARIANTS
from forgetting.pipeline.resources.workload import ProcessCount, Workload
from forgetting.study.run_groups import rows_per_pass

OPTIMIZER_MOMENTS = {"adamw": 8, "lionw": 4, "adafactor": 0.1}
"""Bytes of the optimizer's state, for each weight that is trained."""

PROCESS_BYTES = {True: 4e9, False: 1.5e9}
"""Bytes of the machine's memory that Python and its libraries take, with CUDA's and without."""


def activation_bytes(case: Workload, tuning: Method | None = None) -> float:
    """Bytes that a token's forward pass keeps in one block for the backward pass.

    28 width + 4 (queries + 2 keys) + 8 inner: with float32 between the layers, inputs and outcomes
    of the norms (5 of 4 bytes), what enters the projections and comes back in bfloat16 (4 of 2),
    queries, keys and values before and after their rotation, and of the MLP both sides, the
    activation and the product. The graphs of Llama's and Phi's blocks hold up to a quarter less
    (tests/test_costs.py). Dropout before adapters keeps masks and what it lets through, a third
    more; in float32 arithmetic it is two thirds more.
    """
    shape = case.model_size
    sizes = (
        28 * shape.hidden_size + 4 * (shape.queries + 2 * shape.keys) + 8 * shape.intermediate_size
    )
    more = 1.35 if tuning and tuning.kind != "full" and tuning.dropout else 1.0
    return sizes * more * (1.0 if case.half else 1.7)


def training_row_bytes(case: Workload, tuning: Method) -> float:
    """Bytes of one sequence in a forward and backward pass: activations and logits.

    With activation checkpointing what enters each block is kept, and one block is computed again.
    Logits are there in bfloat16 and float32, with their gradients: 12 bytes each.
    """
    shape, tokens = case.model_size, case.training_sequences.longest
    if case.study.training.activation_checkpointing:
        kept = 4.0 * shape.hidden_size * shape.blocks + activation_bytes(case, tuning)
    else:
        kept = activation_bytes(case, tuning) * shape.blocks
    return tokens * (kept + 12.0 * shape.vocab_size * case.training_sequences.targets)


def trained_state_bytes(case: Workload, runs: Sequence[Method], team: ProcessCount) -> float:
    """Bytes of weights, gradients and moments in one process.

    Args:
        runs: the method of each that is trained in one pass.
    """
    shape, tuning = case.model_size, runs[0]
    trained = shape.trained(tuning)
    each = 8 + OPTIMIZER_MOMENTS[case.study.training.optimizer]
    state = each * trained
    if tuning.kind == "full":
        frozen = 4.0 * (shape.parameters - trained)
        copies = 2.0 * shape.linear if case.half else 0.0
        # Of several processes, each gathers a block at a time.
        gathered = copies if team.processes == 1 else 2 * copies / max(1, shape.blocks)
        return (state + frozen) / team.processes + gathered + _kept_bytes(case, tuning, team)
    rounded = (
        shape.adapted(tuning) if case.half and VARIANTS[tuning.variant].rounds_frozen_weights else 0
    )
    base = 4.0 * shape.parameters - 2.0 * rounded
    if (
        tuning.second_stage
    ):  # in the second part, the base is trained; when it begins, it is there twice
        base = 4.0 * shape.parameters + max(2.0 * shape.linear, 4.0 * shape.parameters - state)
    return base + each * sum(map(shape.trained, runs)) + _kept_bytes(case, tuning, team)


def _kept_bytes(case: Workload, tuning: Method, team: ProcessCount) -> float:
    """Bytes of what a mitigation compares with: the base, and its information."""
    mitigation, shape = tuning.mitigation, case.model_size
    if not mitigation:
        return 0.0
    compared = shape.adapted(tuning) if tuning.kind == "lora" else shape.parameters
    sections = mitigation.sections.values()
    total = compared * sum(section.bytes_per_weight for section in sections)
    if tuning.kind != "lora" and any(section.needs_base_model for section in sections):
        total += 4.0 * shape.parameters
    return total / (team.processes if tuning.kind == "full" else 1)


def evaluation_bytes(case: Workload) -> float:
    """Return the bytes of an evaluation without the weights: keys and values of a batch, logits of
    " "a pass."""
    study, shape, asked = case.study, case.model_size, case.probe_workloads
    number = 2 if case.half else 4
    rows = min(study.evaluation.batch_size, asked.count)
    cache = rows * (asked.prompt + study.evaluation.max_new_tokens) * shape.cache * number
    scored = rows * asked.answer * shape.vocab_size * 8.0
    text = study.general_text
    read = text.batch_size * text.block * shape.vocab_size * 8.0 if text else 0.0
    return max(cache, scored, read)


def training_bytes(
    case: Workload, run_group: Sequence[Method], team: ProcessCount, rows: int | None = None
) -> float:
    """Largest use of a device by a run group: while it trains, measures, or begins.

    Args:
        run_group: the method of each member.
        rows: of a forward pass, of each run in it; by default what the study says, on a GPU as far
            as there is room, since a process that is alone goes on with half the rows where there
            is none.
    """
    passes = case.microbatches(run_group, team)
    peak = max(_pass_bytes(case, [run_group[n] for n in part], team, rows) for part in passes)
    if rows is None and team.processes == 1 and case.device.is_gpu:
        return max(min(peak, case.device.usable), training_bytes(case, run_group, team, rows=1))
    return peak


def _pass_bytes(
    case: Workload, runs: Sequence[Method], team: ProcessCount, rows: int | None
) -> float:
    """The same of runs that share a pass."""
    shape, tuning = case.model_size, runs[0]
    state = trained_state_bytes(case, runs, team)
    of_each = rows or case.rows(team)
    if not tuning.dropout:
        of_each = rows_per_pass(
            of_each, len(runs), case.training_sequences.longest, case.device.kind
        )
    passed = of_each * sum(training_row_bytes(case, run) for run in runs)
    evaluation = evaluation_bytes(case)
    if tuning.kind == "full" and team.processes > 1:  # whole on every process, in bfloat16
        evaluation += (2.0 if case.half else 4.0) * shape.parameters
    if tuning.kind != "full" and not case.half:  # an adapter is merged, and the matrices kept
        evaluation += 4.0 * shape.adapted(tuning)
    return max(state + passed, state + evaluation, 4.0 * shape.parameters)


def benchmark_bytes(case: Workload) -> float:
    """Largest use of a device by a job that scores one model."""
    study, shape = case.study, case.model_size
    weights = 4.0 * shape.parameters + (2.0 * shape.linear if case.half else 0.0)
    number, batch = (2 if case.half else 4), study.benchmarks.batch_size
    most = max((b.prompt + b.choices + b.most for b in case.task_workloads.values()), default=0.0)
    return weights + batch * most * shape.cache * number + batch * 256 * shape.vocab_size * 8.0


def scoring_bytes(case: Workload) -> float:
    """Largest use of a device by a job that measures the base on the probes."""
    shape = case.model_size
    return 4.0 * shape.parameters + 2.0 * shape.linear * case.half + evaluation_bytes(case)


def host_bytes(case: Workload, device_bytes: float, copied: float = 0.0) -> float:
    """Memory of the machine for one process.

    A base is read into it in float32, and checkpoints pass through it; a process without a GPU has
    there all that it computes with.

    Args:
        copied: bytes of the largest checkpoint that is written by this process.
    """
    own = PROCESS_BYTES[case.device.is_gpu]
    if case.device.is_gpu:
        return own + max(4.0 * case.model_size.parameters, copied)
    return own + max(device_bytes, 4.0 * case.model_size.parameters) + copied


def checkpoint_bytes(case: Workload, tuning: Method) -> float:
    """Bytes of a checkpoint from which a run goes on: weights, and the optimizer's moments."""
    return (4 + OPTIMIZER_MOMENTS[case.study.training.optimizer]) * case.model_size.trained(tuning)


def disk_bytes(case: Workload, run_group: Sequence[Method], team: ProcessCount) -> float:
    """Largest use of the disk by a run group: tokens, checkpoints of the runs in training, results.

    While a run goes on, the newest checkpoint is there, the one that is being written, and the one
    that the rule may select (weights only); for a finished run up to two, without
    moments. A trunk stores one for each duration.

    Args:
        run_group: the method of each member.
    """
    tokens = 4.0 * case.training_sequences.count * case.training_sequences.tokens
    stored = len(case.study.training.durations)
    going = max(
        sum(unfinished_bytes(case, run_group[owner], team, stored) for owner in part)
        for part in case.microbatches(run_group, team)
    )
    finished = sum(
        len(tuning.hyperparameters) * finished_bytes(case, tuning) for tuning in run_group
    )
    return tokens + going + finished


def unfinished_bytes(case: Workload, tuning: Method, team: ProcessCount, stored: int = 0) -> float:
    """Bytes of the checkpoints of a run in training, and of as many more as are stored of it."""
    whole, picked = checkpoint_bytes(case, tuning), 4.0 * case.model_size.trained(tuning)
    # The parts of sharded weights and moments are in the same files.
    sharded = tuning.kind == "full" and team.processes > 1
    return (2 + stored) * whole + (whole if sharded else picked)


def finished_bytes(case: Workload, tuning: Method) -> float:
    """Bytes of a finished run: the checkpoint that was picked and the last one, and its items."""
    evaluations = len(case.schedule.evaluations) + 1
    return (
        2 * 4.0 * case.model_size.trained(tuning) + evaluations * case.probe_workloads.count * 500.0
    )
