"""Train a run group: all runs of one method and seed, in one job.

A finished run is kept in a folder whose name is a digest of everything that the run depends on. A
repeated job trains only the missing runs, so a further learning rate costs one further run.
Runs are trained one after the other, or as batched LoRA in shared forward passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel

from forgetting.benchmarks.during_training import merge_items
from forgetting.config.expand import RunGroupConfig
from forgetting.config.training import TrainingConfig
from forgetting.data.dataset import TokenizedDataset, example_lengths, pack_dataset, tokenize
from forgetting.data.table_files import Row
from forgetting.data.tokenize import Example
from forgetting.errors import InputError
from forgetting.evaluation.divergence import append_divergence
from forgetting.evaluation.metrics import mean_score
from forgetting.evaluation.prefix_tree import supports_custom_mask
from forgetting.evaluation.probes import evaluate_probes
from forgetting.io import content_key, read_json, removal_command, remove_folder, write_json
from forgetting.models.forward import context_length
from forgetting.models.loading import Model, autocast, load_base, recompute_activations
from forgetting.models.tuned import merged_adapter
from forgetting.schedule import LrSchedule, validate_warmup
from forgetting.system import describe_computation, peak_memory_gib
from forgetting.training.batched_lora import runs_per_pass, trained_weights
from forgetting.training.checkpoints import (
    TrainState,
    batch_members,
    discard_damaged,
    drop_training_state,
    resume_groups,
)
from forgetting.training.distributed import (
    ProcessGroup,
    evaluate_distributed,
    is_sharded,
    shard_model,
    unsharded,
)
from forgetting.training.mitigations import Mitigations, build_mitigations
from forgetting.training.optimizer import uses_fused_kernel
from forgetting.training.run_config import RunConfig
from forgetting.training.stages import RunFactory, prepare_batched_runs, train_stages
from forgetting.training.trainer import train_batched, train_run
from forgetting.training.training_job import RunContext, RunFolder, TrainingJob


@dataclass(frozen=True)
class TrainingData:
    """The tokenized tables of a run group.

    Attributes:
        train: examples of the new knowledge.
        sequences: what a batch consists of: the same examples, packed if the study says so.
        general: examples of the mitigation's tables, by table.
        replay: replayed examples, packed as `sequences` are.
    """

    train: TokenizedDataset
    sequences: Sequence[Example]
    general: Mapping[str, TokenizedDataset]
    replay: Sequence[Example]

    def tokens_per_step(self, training: TrainingConfig) -> float:
        """Return the mean number of tokens of an optimizer step of one run."""
        return float(self.train.lengths.sum() / len(self.sequences) * training.batch_size)


def load_training_data(job: TrainingJob) -> TrainingData:
    """Tokenize all tables into files, which all run groups of a study share, and pack them."""
    config, context, inputs = job.config, job.context, job.inputs

    def read(table: str, rows: Iterable[Row], digest: str | None, blocks: bool) -> TokenizedDataset:
        key = {"digest": digest, "prompt": config.prompt.model_dump(), "blocks": blocks}
        key |= {name: inputs.get(name) for name in ("base", "versions")}
        key |= {name: getattr(config.training, name) for name in ("max_length", "packing")}
        if table in config.columns:
            key["columns"] = config.columns[table].model_dump()
        return tokenize(
            rows,
            context.tokenizer,
            config.prompt,
            config.training,
            job.state / "tokens" / f"{table.replace('/', '-')}-{content_key(key)}.arrow",
            blocks=blocks,
            locate=context.source_line,
        )

    train = read("train", context.train, inputs.get("train"), blocks=True)
    general = {
        table: read(table, rows, inputs.get(f"table {table}"), blocks=False)
        for table, rows in context.general_text.items()
    }
    replay = config.method.mitigation.replay if config.method.mitigation else None
    return TrainingData(
        train,
        pack_dataset(train, config.training),
        general,
        pack_dataset(general[replay.table], config.training) if replay else (),
    )


def train_run_group(job: TrainingJob, *, branches: bool = False) -> list[dict[str, Any]]:
    """Train every run that is not finished yet; return the records of all, in the sweep's order.

    Args:
        job: the runs, and all that they share.
        branches: whether the runs are cooldown branches, which may be shorter than the warm-up.

    Raises:
        InputError: the warm-up is longer than the runs, or the data or the method does not fit.
    """
    process_group = job.context.process_group
    runs = [job.run(setting) for setting in job.config.method.hyperparameters]
    missing = process_group.broadcast([run for run in runs if not run.record.exists()])
    groups, data = [[run] for run in runs], None
    if missing:
        for run in missing if process_group.is_main else ():
            _remove_unfinished(run.folder)
        with process_group.main_first():
            data = load_training_data(job)
        _check_training_data(data, job.config.training, process_group, branches=branches)
        groups = _groups_by_pass(job, runs, data)
    for group in groups:
        if data:
            _train_group(job, [run for run in group if run in missing], data)
        for run in group if process_group.is_main else ():
            # After the record: without this state, a run without a record could not resume.
            drop_training_state(run.folder)
        process_group.barrier()
    return [
        read_json(run.record, removal_command(run.folder)) | {"folder": str(run.folder)}
        for run in runs
    ]


def _groups_by_pass(
    job: TrainingJob, runs: Sequence[RunFolder], data: TrainingData
) -> list[list[RunFolder]]:
    """Return the runs that share each pass.

    Finished runs keep their place in the groups, so that a killed job resumes the same groups.
    """
    context, training = job.context, job.config.training
    if context.process_group.world_size > 1:
        return [[run] for run in runs]
    tokens = data.tokens_per_step(training)
    sizes = runs_per_pass(
        job.config.method, len(runs), context.base, training, tokens, context.device
    )
    remaining = iter(runs)
    return [list(islice(remaining, size)) for size in sizes]


def _train_group(job: TrainingJob, runs: Sequence[RunFolder], data: TrainingData) -> None:
    """Train unfinished runs in groups that can resume from one step; write their records."""
    process_group = job.context.process_group
    run_of = {run.folder: run for run in runs}
    if process_group.is_main:
        discard_damaged(list(run_of))
    process_group.barrier()
    for folders in resume_groups(list(run_of)):
        batch = [run_of[folder] for folder in folders]
        records = _train_runs(job, batch, data)
        for run, record in zip(batch, records, strict=True):
            if process_group.is_main:
                write_json(run.record, record | {"key": run.key})


def _remove_unfinished(folder: Path) -> None:
    """Remove unfinished runs of the same name with other settings, data or stage versions.

    Finished runs stay, so that a setting that is changed and changed back retrains nothing.
    """
    for other in folder.parent.glob("*") if folder.parent.exists() else []:
        if other != folder and not (other / "run.json").exists():
            remove_folder(other)
    folder.mkdir(parents=True, exist_ok=True)


def _check_training_data(
    data: TrainingData, training: TrainingConfig, process_group: ProcessGroup, *, branches: bool
) -> None:
    if data.train.cut and process_group.is_main:
        print(
            f"warning: {data.train.cut} training answers are longer than training.max_length "
            f"({training.max_length} tokens) and are cut, without an end of sequence; "
            "make it larger",
            flush=True,
        )
    if (mistake := validate_warmup(len(data.sequences), training)) and not branches:
        raise InputError(f"training.{mistake[0]}: {mistake[1]}")


def _train_runs(
    job: TrainingJob, runs: Sequence[RunFolder], data: TrainingData
) -> list[dict[str, Any]]:
    """Train several runs in shared steps, or a single run in its stages; return their records.

    The time of shared work is divided evenly among the runs.
    """
    started = time.monotonic()
    config, context = job.config, job.context
    load, build = _load_base_and_mitigations(config, context, data)

    def evaluate(model: Model) -> tuple[pd.DataFrame, float]:
        return evaluate_run_items(model, config, context)

    def log(index: int, progress: TrainState, schedule: LrSchedule) -> None:
        job.log(runs[index].name, progress, schedule)

    def train(model: Model, run_config: RunConfig, previous: TrainState | None) -> TrainState:
        folder = runs[0].folder
        return train_run(
            model, data.sequences, run_config, evaluate, folder, partial(log, 0), previous
        )

    factory = RunFactory(load_base=load, build_mitigations=build, train=train)
    configs = [_run_config(config, run, context, len(data.sequences)) for run in runs]
    if len(runs) == 1:
        state, model = train_stages(config.method, configs[0], factory, runs[0].folder)
        states = [state]
    else:
        model, configs = prepare_batched_runs(config.method, configs, factory)
        plans = [(each, run.folder) for each, run in zip(configs, runs, strict=True)]
        states = train_batched(model, data.sequences, plans, evaluate, log)
    trained = list(trained_weights(model).values())
    shared = {
        "trainable_parameters": sum(weight.numel() for weight in trained),
        "steps_per_epoch": configs[0].schedule.steps_per_epoch,
        "wall_seconds": (time.monotonic() - started) / len(runs),
        "peak_memory_gib": peak_memory_gib(context.device),
        "processes": context.process_group.world_size,
        **describe_computation(context.device, context.precision),
        "cut_rows": data.train.cut,
        "fused_optimizer": uses_fused_kernel(config.training, trained),
    }
    return [_run_record(run, state) | shared for run, state in zip(runs, states, strict=True)]


def _run_config(
    config: RunGroupConfig, run: RunFolder, context: RunContext, sequences: int
) -> RunConfig:
    return RunConfig(
        hyperparameters=run.hyperparameters,
        seed=config.seed,
        training=config.training,
        schedule=LrSchedule.plan(sequences, config.training, config.evaluation.every_epochs),
        base_value=context.base_value,
        threshold=config.selection.threshold,
        stop_after_evaluations=config.selection.stop_after_evaluations,
        precision=context.precision,
        pad=context.tokenizer.pad_token_id,
        process_group=context.process_group,
    )


def _run_record(run: RunFolder, progress: TrainState) -> dict[str, Any]:
    return {
        "run": run.name,
        "status": progress.status,
        "hyperparameters": run.hyperparameters.model_dump(),
        "steps": progress.step,
        "tokens": progress.tokens,
        "losses": progress.losses,
        "penalties": progress.penalties if any(progress.penalties) else [],
        "evaluations": progress.evaluations,
        "training_seconds": progress.seconds,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else 0.0,
        "batched_runs": batch_members(run.folder),
    }


def _load_base_and_mitigations(
    config: RunGroupConfig, context: RunContext, data: TrainingData
) -> tuple[Callable[[], PreTrainedModel], Callable[[Model], Mitigations]]:
    """Return functions that load the base model and build the mitigations of a model."""
    process_group, precision = context.process_group, context.precision

    def load() -> PreTrainedModel:
        # Each run reads the base from disk, because training and rounding change the weights.
        model = load_base(context.base, context.device, context.parameters)
        check_model_inputs(model, data.train, config.training)
        if config.training.activation_checkpointing:
            recompute_activations(model)
        return model

    def load_frozen() -> Model:
        return shard_model(load().requires_grad_(False), process_group, precision)

    def build(model: Model) -> Mitigations:
        mitigation = config.method.mitigation
        # A sharded model may have rounded matrices, which need autocast.
        with autocast(context.device, precision) if is_sharded(model) else nullcontext():
            return build_mitigations(
                model, mitigation, data.general, data.replay, config.seed, load_frozen
            )

    return load, build


def evaluate_run_items(
    model: Model, config: RunGroupConfig, context: RunContext
) -> tuple[pd.DataFrame, float]:
    """Return the items of all probes, and the value of the selection metric."""

    def evaluate(probes: Mapping[str, list[Row]]) -> pd.DataFrame:
        return evaluate_probes(model, context.tokenizer, probes, config.prompt, config.evaluation)

    precision = context.precision
    with autocast(context.device, precision), unsharded(model), merged_adapter(model, precision):
        items = evaluate_distributed(evaluate, context.probes, context.process_group)
        # Every process reads the whole general text.
        items = append_divergence(items, model, context.base_predictions)
        if context.training_benchmarks:
            items = merge_items(items, context.training_benchmarks(model))
    return items, mean_score(items, config.selection.probe, config.selection.metric)


def check_model_inputs(model: Model, examples: Sequence[Example], training: TrainingConfig) -> None:
    """Raise InputError for examples longer than the model's context, and for unsafe packing."""
    limit, longest = context_length(model), max(example_lengths(examples))
    if limit is not None and longest > limit:
        raise InputError(
            f"training.max_length: the longest training sequence has {longest} tokens, the model "
            f"reads {limit}; take at most {limit}"
        )
    if training.packing and not supports_custom_mask(model):
        raise InputError(
            f"training.packing: in this model ({model.config.model_type}) a token sees more than "
            "the attention mask allows, so packed examples would influence each other; set "
            "packing: false"
        )
