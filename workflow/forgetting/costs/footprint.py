"""Bytes that jobs take: on the device, in the machine's memory, on disk.

What is trained is float32, with AdamW 16 bytes a weight: 4 of itself, 4 of its gradient, 8 of two
moments; Lion has one moment, 12 bytes, Adafactor about none, 8. `full` in several processes has a
share of these in each. In bfloat16 arithmetic frozen matrices under an adapter take 2 bytes, other
frozen weights 4, and trained matrices have a copy of 2 for as long as a pass lasts.
"""

from __future__ import annotations

from collections.abc import Sequence

from forgetting.costs.case import Case, Team
from forgetting.settings.plan import Tuning
from forgetting.training.fusing import shared_rows

MOMENTS = {"adamw": 8, "lionw": 4, "adafactor": 0.1}
"""Bytes of the optimizer's state, for each weight that is trained."""

PROCESS = {True: 4e9, False: 1.5e9}
"""Bytes of the machine's memory that Python and its libraries take, with CUDA's and without."""


def activation(case: Case, tuning: Tuning | None = None) -> float:
    """Bytes that a token's forward pass keeps in one block for the backward pass.

    28 width + 4 (queries + 2 keys) + 8 inner: with float32 between the layers, inputs and outcomes
    of the norms (5 of 4 bytes), what enters the projections and comes back in bfloat16 (4 of 2),
    queries, keys and values before and after their rotation, and of the MLP both sides, the
    activation and the product. The graphs of Llama's and Phi's blocks hold up to a quarter less
    (tests/test_costs.py). Dropout before adapters keeps masks and what it lets through, a third
    more; in float32 arithmetic it is two thirds more.
    """
    shape = case.shape
    sizes = 28 * shape.width + 4 * (shape.queries + 2 * shape.keys) + 8 * shape.inner
    more = 1.35 if tuning and tuning.kind != "full" and tuning.dropout else 1.0
    return sizes * more * (1.0 if case.half else 1.7)


def training_row(case: Case, tuning: Tuning) -> float:
    """Bytes of one sequence in a forward and backward pass: activations and logits.

    With activation checkpointing what enters each block is kept, and one block is computed again.
    Logits are there in bfloat16 and float32, with their gradients: 12 bytes each.
    """
    shape, tokens = case.shape, case.trained_on.longest
    if case.study.training.activation_checkpointing:
        kept = 4.0 * shape.width * shape.blocks + activation(case, tuning)
    else:
        kept = activation(case, tuning) * shape.blocks
    return tokens * (kept + 12.0 * shape.vocabulary * case.trained_on.targets)


def trained_state(case: Case, runs: Sequence[Tuning], team: Team) -> float:
    """Bytes of weights, gradients and moments in one process.

    Args:
        runs: the method of each that is trained in one pass.
    """
    shape, tuning = case.shape, runs[0]
    trained = shape.trained(tuning)
    each = 8 + MOMENTS[case.study.training.optimizer]
    state = each * trained
    if tuning.kind == "full":
        frozen = 4.0 * (shape.parameters - trained)
        copies = 2.0 * shape.linear if case.half else 0.0
        # Of several processes, each gathers a block at a time.
        gathered = copies if team.processes == 1 else 2 * copies / max(1, shape.blocks)
        return (state + frozen) / team.processes + gathered + _kept(case, tuning, team)
    rounded = shape.adapted(tuning) if case.half and tuning.variant != "dora" else 0
    base = 4.0 * shape.parameters - 2.0 * rounded
    if tuning.then:  # in the second part, the base is trained; when it begins, it is there twice
        base = 4.0 * shape.parameters + max(2.0 * shape.linear, 4.0 * shape.parameters - state)
    return base + each * sum(map(shape.trained, runs)) + _kept(case, tuning, team)


def _kept(case: Case, tuning: Tuning, team: Team) -> float:
    """Bytes of what a mitigation compares with: the base, and its information."""
    mitigation, shape = tuning.mitigation, case.shape
    if not mitigation:
        return 0.0
    compared = shape.adapted(tuning) if tuning.kind == "lora" else shape.parameters
    total = 8.0 * compared if mitigation.ewc else 0.0
    total += 4.0 * compared if mitigation.l2_sp else 0.0
    total += 4.0 * shape.parameters if mitigation.kl and tuning.kind != "lora" else 0.0
    return total / (team.processes if tuning.kind == "full" else 1)


def measuring(case: Case) -> float:
    """Bytes of an evaluation beside the weights: keys and values of a batch, logits of a pass."""
    study, shape, asked = case.study, case.shape, case.asked
    number = 2 if case.half else 4
    rows = min(study.measurement.batch_size, asked.count)
    cache = rows * (asked.prompt + study.measurement.max_new_tokens) * shape.cache * number
    scored = rows * asked.answer * shape.vocabulary * 8.0
    text = study.general_text
    read = text.batch_size * text.block * shape.vocabulary * 8.0 if text else 0.0
    return max(cache, scored, read)


def training_bytes(
    case: Case, cohort: Sequence[Tuning], team: Team, rows: int | None = None
) -> float:
    """Largest use of a device by a cohort: while it trains, measures, or begins.

    Args:
        cohort: the method of each member.
        rows: of a forward pass, of each run in it; by default what the study says, on a GPU as far
            as there is room, since a process that is alone goes on with half the rows where there
            is none.
    """
    passes = case.passes(cohort, team)
    peak = max(_pass_bytes(case, [cohort[n] for n in part], team, rows) for part in passes)
    if rows is None and team.processes == 1 and case.device.is_gpu:
        return max(min(peak, case.device.usable), training_bytes(case, cohort, team, rows=1))
    return peak


def _pass_bytes(case: Case, runs: Sequence[Tuning], team: Team, rows: int | None) -> float:
    """The same of runs that share a pass."""
    shape, tuning = case.shape, runs[0]
    state = trained_state(case, runs, team)
    of_each = rows or case.rows(team)
    if not tuning.dropout:
        of_each = shared_rows(of_each, len(runs), case.trained_on.longest, case.device.kind)
    passed = of_each * sum(training_row(case, run) for run in runs)
    evaluation = measuring(case)
    if tuning.kind == "full" and team.processes > 1:  # whole on every process, in bfloat16
        evaluation += (2.0 if case.half else 4.0) * shape.parameters
    if tuning.kind != "full" and not case.half:  # an adapter is merged, and the matrices kept
        evaluation += 4.0 * shape.adapted(tuning)
    return max(state + passed, state + evaluation, 4.0 * shape.parameters)


def benchmark_bytes(case: Case) -> float:
    """Largest use of a device by a job that scores one model."""
    study, shape = case.study, case.shape
    weights = 4.0 * shape.parameters + (2.0 * shape.linear if case.half else 0.0)
    number, batch = (2 if case.half else 4), study.benchmarks.batch_size
    most = max((b.prompt + b.choices + b.most for b in case.benches.values()), default=0.0)
    return weights + batch * most * shape.cache * number + batch * 256 * shape.vocabulary * 8.0


def scoring_bytes(case: Case) -> float:
    """Largest use of a device by a job that measures the base on the probes."""
    shape = case.shape
    return 4.0 * shape.parameters + 2.0 * shape.linear * case.half + measuring(case)


def host_bytes(case: Case, device_bytes: float, copied: float = 0.0) -> float:
    """Memory of the machine for one process.

    A base is read into it in float32, and checkpoints pass through it; a process without a GPU has
    there all that it computes with.

    Args:
        copied: bytes of the largest checkpoint that is written by this process.
    """
    own = PROCESS[case.device.is_gpu]
    if case.device.is_gpu:
        return own + max(4.0 * case.shape.parameters, copied)
    return own + max(device_bytes, 4.0 * case.shape.parameters) + copied


def checkpoint_bytes(case: Case, tuning: Tuning) -> float:
    """Bytes of a checkpoint from which a run goes on: weights, and the optimizer's moments."""
    return (4 + MOMENTS[case.study.training.optimizer]) * case.shape.trained(tuning)


def disk_bytes(case: Case, cohort: Sequence[Tuning], team: Team) -> float:
    """Largest use of the disk by a cohort: tokens, checkpoints of the runs in training, results.

    While a run goes on, the newest checkpoint is there, the one that is being written, and the one
    that the rule may pick, of which only the weights are kept; of a finished run up to two, without
    moments. A trunk stores one for each budget.

    Args:
        cohort: the method of each member.
    """
    tokens = 4.0 * case.trained_on.count * case.trained_on.tokens
    stored = len(case.study.training.budgets)
    going = max(
        sum(going_bytes(case, cohort[owner], team, stored) for owner in part)
        for part in case.passes(cohort, team)
    )
    finished = sum(len(tuning.settings) * finished_bytes(case, tuning) for tuning in cohort)
    return tokens + going + finished


def going_bytes(case: Case, tuning: Tuning, team: Team, stored: int = 0) -> float:
    """Bytes of the checkpoints of a run in training, and of as many more as are stored of it."""
    whole, picked = checkpoint_bytes(case, tuning), 4.0 * case.shape.trained(tuning)
    # The parts of sharded weights and moments are in the same files.
    sharded = tuning.kind == "full" and team.processes > 1
    return (2 + stored) * whole + (whole if sharded else picked)


def finished_bytes(case: Case, tuning: Tuning) -> float:
    """Bytes of a finished run: the checkpoint that was picked and the last one, and its items."""
    evaluations = len(case.schedule.evaluations) + 1
    return 2 * 4.0 * case.shape.trained(tuning) + evaluations * case.asked.count * 500.0
