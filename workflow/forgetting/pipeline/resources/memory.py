"""Bytes that jobs need on the device, in the memory of the machine, and on disk.

Trained weights are float32. With AdamW they take 16 bytes each: 4 for the weight, 4 for its
gradient, 8 for two moments. Lion has one moment (12 bytes), Adafactor almost none (8). Sharded
full fine-tuning divides them by the number of processes. With bfloat16 arithmetic, frozen matrices
under an adapter take 2 bytes, other frozen weights 4, and trained matrices have a copy of 2 bytes
during a pass.
"""

from __future__ import annotations

from forgetting.config.expand import Method
from forgetting.config.variants import VARIANTS
from forgetting.pipeline.resources.workload import ProcessCount, Workload
from forgetting.study.run_groups import rows_per_pass

OPTIMIZER_MOMENTS = {"adamw": 8, "lionw": 4, "adafactor": 0.1}
"""Bytes of the optimizer's state per trained weight."""

PROCESS_BYTES = {True: 4e9, False: 1.5e9}
"""Host memory of Python and its libraries, by whether there is a GPU (with CUDA's)."""


def activation_bytes(workload: Workload, method: Method | None = None) -> float:
    """Return the bytes per token that the forward pass of a block keeps for the backward pass.

    They are 28 width + 4 (queries + 2 keys) + 8 intermediate size. Between layers, inputs and
    outputs of the norms are float32 (5 tensors). Inputs and outputs of the projections are bfloat16
    (4 tensors), as are queries, keys and values before and after rotation, and in the MLP both
    projections, the activation and the product. The graphs of Llama's and Phi's blocks hold up to a
    quarter less (tests/unit/pipeline/test_job_costs.py). Dropout before adapters keeps masks and
    outputs, a third more. Float32 arithmetic takes two thirds more.
    """
    size = workload.model_size
    sizes = 28 * size.hidden_size + 4 * (size.queries + 2 * size.keys) + 8 * size.intermediate_size
    dropout = 1.35 if method and method.kind != "full" and method.dropout else 1.0
    return sizes * dropout * (1.0 if workload.half else 1.7)


def training_row_bytes(workload: Workload, method: Method) -> float:
    """Return the bytes of one sequence in a forward and backward pass: activations and logits.

    With activation checkpointing, the input of each block is kept and one block is computed again.
    Logits exist in bfloat16 and float32, with their gradients: 12 bytes each.
    """
    size, tokens = workload.model_size, workload.training_sequences.longest
    if workload.study.training.activation_checkpointing:
        kept = 4.0 * size.hidden_size * size.blocks + activation_bytes(workload, method)
    else:
        kept = activation_bytes(workload, method) * size.blocks
    return tokens * (kept + 12.0 * size.vocab_size * workload.training_sequences.targets)


def trained_state_bytes(
    workload: Workload, method: Method, group: ProcessCount, runs: int = 1
) -> float:
    """Return the bytes of weights, gradients and moments in one process.

    Args:
        workload: the study on a device.
        method: of the runs.
        group: processes that train a run.
        runs: number of runs that share a pass.
    """
    size = workload.model_size
    trained = size.trained(method)
    per_weight = 8 + OPTIMIZER_MOMENTS[workload.study.training.optimizer]
    state = per_weight * trained
    reference = _reference_bytes(workload, method, group)
    if method.kind == "full":
        frozen = 4.0 * (size.parameters - trained)
        copies = 2.0 * size.linear if workload.half else 0.0
        # Sharded weights are gathered one block at a time, while the next is fetched.
        gathered = copies if group.processes == 1 else 2 * copies / max(1, size.blocks)
        return (state + frozen) / group.processes + gathered + reference
    rounds = workload.half and VARIANTS[method.variant].rounds_frozen_weights
    base = 4.0 * size.parameters - 2.0 * (size.adapted(method) if rounds else 0)
    if method.second_stage:
        # The second stage trains the base. When it begins, the base exists twice.
        base = 4.0 * size.parameters + max(2.0 * size.linear, 4.0 * size.parameters - state)
    return base + per_weight * (runs * trained) + reference


def _reference_bytes(workload: Workload, method: Method, group: ProcessCount) -> float:
    """Return the bytes that a mitigation compares weights or predictions with."""
    mitigation, size = method.mitigation, workload.model_size
    if not mitigation:
        return 0.0
    compared = size.adapted(method) if method.kind == "lora" else size.parameters
    sections = mitigation.sections.values()
    total = compared * sum(section.bytes_per_weight for section in sections)
    if method.kind != "lora" and any(section.needs_base_model for section in sections):
        total += 4.0 * size.parameters
    return total / shard_count(method, group)


def shard_count(method: Method, group: ProcessCount) -> int:
    """Return the number of processes that trained weights and their state are sharded over."""
    return group.processes if method.kind == "full" else 1


def evaluation_bytes(workload: Workload) -> float:
    """Return the bytes of an evaluation without the weights: key-value cache or logits."""
    study, size, probes = workload.study, workload.model_size, workload.probe_workloads
    number = 2 if workload.half else 4
    rows = min(study.evaluation.batch_size, probes.count)
    cache = rows * (probes.prompt + study.evaluation.max_new_tokens) * size.cache * number
    answers = rows * probes.answer * size.vocab_size * 8.0
    text = study.general_text
    blocks = text.batch_size * text.block * size.vocab_size * 8.0 if text else 0.0
    return max(cache, answers, blocks)


def training_bytes(
    workload: Workload, method: Method, group: ProcessCount, rows: int | None = None
) -> float:
    """Return the largest device memory of a run group: in training, evaluation or loading.

    Args:
        workload: the study on a device.
        method: of the runs.
        group: processes that train a run.
        rows: sequences of a run in a forward pass. By default the study's micro-batch, reduced to
            the memory of a GPU, since a single process that exhausts it halves the micro-batch.
    """
    passes = workload.runs_per_pass(method, group)
    peak = max(_pass_bytes(workload, method, group, runs, rows) for runs in set(passes))
    if rows is None and group.processes == 1 and workload.device.is_gpu:
        return max(
            min(peak, workload.device.usable), training_bytes(workload, method, group, rows=1)
        )
    return peak


def _pass_bytes(
    workload: Workload, method: Method, group: ProcessCount, runs: int, rows: int | None
) -> float:
    """Return the largest device memory of `runs` runs that share a pass."""
    size = workload.model_size
    state = trained_state_bytes(workload, method, group, runs)
    rows = rows or workload.rows(group)
    if not method.dropout:
        longest = workload.training_sequences.longest
        rows = rows_per_pass(rows, runs, longest, workload.device.kind)
    passed = rows * (runs * training_row_bytes(workload, method))
    evaluation = evaluation_bytes(workload)
    if method.kind == "full" and group.processes > 1:  # gathered on every process
        evaluation += (2.0 if workload.half else 4.0) * size.parameters
    if method.kind != "full" and not workload.half:  # merged, with the original matrices kept
        evaluation += 4.0 * size.adapted(method)
    return max(state + passed, state + evaluation, 4.0 * size.parameters)


def benchmark_bytes(workload: Workload) -> float:
    """Return the largest device memory of a job that runs the benchmarks on a model."""
    size, tasks = workload.model_size, workload.task_workloads.values()
    weights = 4.0 * size.parameters + (2.0 * size.linear if workload.half else 0.0)
    number, batch = (2 if workload.half else 4), workload.study.benchmarks.batch_size
    longest = max((task.prompt + task.choices + task.generated for task in tasks), default=0.0)
    return weights + batch * longest * size.cache * number + batch * 256 * size.vocab_size * 8.0


def scoring_bytes(workload: Workload) -> float:
    """Return the largest device memory of a job that evaluates the base on the probes."""
    size = workload.model_size
    weights = 4.0 * size.parameters + 2.0 * size.linear * workload.half
    return weights + evaluation_bytes(workload)


def host_bytes(workload: Workload, device_bytes: float, checkpoint: float = 0.0) -> float:
    """Return the memory of the machine for one process.

    The base is read into it in float32, and checkpoints pass through it. Without a GPU, all tensors
    are there.

    Args:
        workload: the study on a device.
        device_bytes: largest device memory.
        checkpoint: bytes of the largest checkpoint that this process writes.
    """
    libraries = PROCESS_BYTES[workload.device.is_gpu]
    if workload.device.is_gpu:
        return libraries + max(4.0 * workload.model_size.parameters, checkpoint)
    return libraries + max(device_bytes, 4.0 * workload.model_size.parameters) + checkpoint


def checkpoint_bytes(workload: Workload, method: Method) -> float:
    """Return the bytes of a checkpoint that a run resumes from: weights and moments."""
    per_weight = 4 + OPTIMIZER_MOMENTS[workload.study.training.optimizer]
    return per_weight * workload.model_size.trained(method)


def disk_bytes(workload: Workload, method: Method, group: ProcessCount) -> float:
    """Return the largest disk use of a run group: tokens, checkpoints and results.

    An unfinished run has its newest checkpoint, one that is being written, and one that may be
    selected (weights only). A finished run has up to two without moments. A trunk stores one for
    each duration.
    """
    tokens = 4.0 * workload.training_sequences.count * workload.training_sequences.tokens
    stored = len(workload.study.training.durations)
    unfinished = unfinished_bytes(workload, method, group, stored)
    training = max(workload.runs_per_pass(method, group)) * unfinished
    return tokens + training + len(method.hyperparameters) * finished_bytes(workload, method)


def unfinished_bytes(
    workload: Workload, method: Method, group: ProcessCount, stored: int = 0
) -> float:
    """Return the bytes of the checkpoints of an unfinished run, `stored` of which are kept."""
    whole = checkpoint_bytes(workload, method)
    # Shards hold weights and moments in the same files.
    is_sharded = method.kind == "full" and group.processes > 1
    selected = whole if is_sharded else 4.0 * workload.model_size.trained(method)
    return (2 + stored) * whole + selected


def finished_bytes(workload: Workload, method: Method) -> float:
    """Return the bytes of a finished run: the selected and the last checkpoint, and its items."""
    weights = 4.0 * workload.model_size.trained(method)
    items = (len(workload.schedule.evaluations) + 1) * workload.probe_workloads.count
    return 2 * weights + 500.0 * items
