"""A run group: the runs of one job, fused or one after the other; those of one method and seed, or
of several whose adapters may share a pass.

A finished run is kept in a folder named by a key of everything that it depends on. A run group that
is run again trains only what is not there yet: one learning rate more costs one run more.

What the runs of a run group share: what the study says of them, and what they are trained on.

Where a run is kept: in a folder named by a key of everything that it depends on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgetting.benchmarks.during_training import merge_items, split_items
from forgetting.config.expand import RunGroupConfig, run_name
from forgetting.config.methods import Hyperparameters
from forgetting.config.training import TrainingConfig
from forgetting.data.dataset import TokenizedDataset, example_lengths, pack_dataset, tokenize
from forgetting.data.table_files import Locate, Row
from forgetting.data.tokenize import (
    Example,
)
from forgetting.errors import InputError
from forgetting.evaluation.divergence import BasePredictions, append_divergence
from forgetting.evaluation.metrics import mean_score
from forgetting.evaluation.prefix_tree import supports_custom_mask
from forgetting.evaluation.probes import evaluate_probes
from forgetting.io import (
    content_key,
    read_json,
    read_table,
    removal_command,
    remove_file,
    remove_folder,
    write_json,
)
from forgetting.models.forward import context_length
from forgetting.models.loading import Model, autocast, load_base, recompute_activations
from forgetting.models.tuned import merged_adapter
from forgetting.schedule import LrSchedule, validate_warmup
from forgetting.system import describe_computation, peak_memory_gib
from forgetting.training.batched_lora import batchable_groups, trained_weights
from forgetting.training.checkpoints import (
    FINAL,
    TrainState,
    batch_members,
    discard_damaged,
    drop_training_state,
    resume_groups,
)
from forgetting.training.distributed import (
    SINGLE_PROCESS,
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


@dataclass(frozen=True)
class RunFolder:
    """One run of the run group, and where it is kept."""

    config: RunGroupConfig
    hyperparameters: Hyperparameters
    name: str
    key: str
    folder: Path

    @classmethod
    def of(
        cls, spec: RunGroupConfig, setting: Hyperparameters, inputs: Mapping[str, str], state: Path
    ) -> RunFolder:
        """Where the folder of all states holds a run."""
        name, key = run_name(spec.method.name, spec.seed, setting), run_key(spec, setting, inputs)
        return cls(spec, setting, name, key, state / name / key)

    @property
    def record(self) -> Path:
        """What is written when the run is finished."""
        return self.folder / "run.json"


def run_key(spec: RunGroupConfig, setting: Hyperparameters, inputs: Mapping[str, str]) -> str:
    """Digest of all that a run depends on: its settings, its inputs, the versions."""
    described = spec.model_dump(
        exclude={"method": {"hyperparameters", "selected_hyperparameters", "label"}}
    )
    # How much memory a pass takes changes no number; alone or fused, a run comes to the same.
    for key in ("activation_checkpointing", "batched_lora"):
        del described["training"][key]
    if not spec.method.dropout:  # its masks are drawn per pass
        del described["training"]["micro_batch_size"]
    # The rule decides which checkpoint is kept; how hyper-parameters are compared does not matter.
    described["selection"] = {
        key: described["selection"][key]
        for key in ("probe", "metric", "threshold", "stop_after_evaluations")
    }
    # A trunk is the same for any shorter durations: one more is a branch more.
    described["training"]["durations"] = bool(spec.training.durations)
    return content_key({"spec": described, "hyperparameters": setting.model_dump(), **inputs})


@dataclass(frozen=True)
class RunContext:
    """What all runs of a run group share."""

    base: Path
    tokenizer: PreTrainedTokenizerBase
    train: Iterable[Row]
    probes: Mapping[str, list[Row]]
    base_value: float
    device: torch.device
    precision: torch.dtype
    general_text: Mapping[str, Iterable[Row]] = field(default_factory=dict)
    """Tables of general text that the method's mitigation reads."""
    base_predictions: BasePredictions | None = None
    """What the base predicts on the study's general text."""
    training_benchmarks: Callable[[Model], pd.DataFrame] | None = None
    """Asks a model the benchmarks of every evaluation, if there are any."""
    process_group: ProcessGroup = SINGLE_PROCESS
    parameters: int | None = None
    """How many the base has, by its record."""
    source_line: Locate = str
    """For messages: the file and the line of a row."""


@dataclass(frozen=True)
class TrainingData:
    """The examples of the new knowledge and of the mitigation's tables."""

    train: TokenizedDataset
    general: Mapping[str, TokenizedDataset]


def tokenized_datasets(
    spec: RunGroupConfig, context: RunContext, inputs: Mapping[str, str], folder: Path
) -> TrainingData:
    """All tables as examples, in files that all run groups of a study share."""

    def read(table: str, rows: Iterable[Row], digest: str | None, blocks: bool) -> TokenizedDataset:
        decided = {"digest": digest, "prompt": spec.prompt.model_dump(), "blocks": blocks}
        decided |= {name: inputs.get(name) for name in ("base", "versions")}
        decided |= {name: getattr(spec.training, name) for name in ("max_length", "packing")}
        if table in spec.columns:
            decided["columns"] = spec.columns[table].model_dump()
        path = folder / f"{table.replace('/', '-')}-{content_key(decided)}.arrow"
        return tokenize(
            rows,
            context.tokenizer,
            spec.prompt,
            spec.training,
            path,
            blocks=blocks,
            where=context.source_line,
        )

    return TrainingData(
        read("train", context.train, inputs.get("train"), blocks=True),
        {
            table: read(table, rows, inputs.get(f"table {table}"), blocks=False)
            for table, rows in context.general_text.items()
        },
    )


Log = Callable[[str, TrainState, LrSchedule], None]


def train_run_group(
    specs: Sequence[RunGroupConfig],
    context: RunContext,
    inputs: Mapping[str, str],
    state: Path,
    tell: Log,
    *,
    branches: bool = False,
) -> list[dict[str, Any]]:
    """Train every run that is not finished yet; return the records of all, in the sweep's order.

    Args:
        specs: of every method and seed of the run group, which are alike in all else.
        branches: may the runs end within their warm-up, since longer ones share it?
    """
    process_group, spec = context.process_group, specs[0]
    places = [
        RunFolder.of(spec, setting, inputs, state)
        for spec in specs
        for setting in spec.method.hyperparameters
    ]
    missing = process_group.broadcast([place for place in places if not place.record.exists()])
    parts, data = [[number] for number in range(len(places))], None
    if missing:
        for place in missing if process_group.is_main else ():
            _remove_unfinished(place.folder)
        with process_group.main_first():
            data = tokenized_datasets(spec, context, inputs, state / "tokens")
        if data.train.cut and process_group.is_main:
            print(
                f"warning: {data.train.cut} training answers are longer than training.max_length "
                f"({spec.training.max_length} tokens) and are cut, without an end of sequence; "
                "make it larger",
                flush=True,
            )
        examples = len(pack_dataset(data.train, spec.training))
        if (mistake := validate_warmup(examples, spec.training)) and not branches:
            raise InputError(f"training.{mistake[0]}: {mistake[1]}")
        parts = _batchable([place.config for place in places], context, data)
    # Of finished runs too, so that a run group that was killed goes on with the same groups.
    for part in ([places[number] for number in numbers] for numbers in parts):
        untrained = {place.folder: place for place in part if place in missing}
        if process_group.is_main:
            discard_damaged(list(untrained))
        process_group.barrier()
        for folders in resume_groups(list(untrained)):
            group = [untrained[folder] for folder in folders]
            assert data
            records = _train_batched(group, context, data, tell)
            for place, record in zip(group, records, strict=True):
                if process_group.is_main:
                    write_json(place.record, record | {"key": place.key})
        for place in part if process_group.is_main else ():
            # Only now: without it, a run killed before its record was written cannot go on.
            drop_training_state(place.folder)
            remove_file(place.folder / FINAL)
        process_group.barrier()
    return [
        read_json(place.record, removal_command(place.folder)) | {"folder": str(place.folder)}
        for place in places
    ]


def _remove_unfinished(folder: Path) -> None:
    """Remove what the same run left half done with other settings, data or code.

    Finished runs stay: when a setting is changed and changed back, nothing is trained again.
    """
    for other in folder.parent.glob("*") if folder.parent.exists() else []:
        if other != folder and not (other / "run.json").exists():
            remove_folder(other)
    folder.mkdir(parents=True, exist_ok=True)


def _batchable(
    specs: Sequence[RunGroupConfig], context: RunContext, data: TrainingData
) -> list[list[int]]:
    """Which runs are trained together, by their numbers; of several processes, none."""
    if context.process_group.world_size > 1:
        return [[number] for number in range(len(specs))]
    training = specs[0].training
    tokens = data.train.sizes.sum() / len(pack_dataset(data.train, training)) * training.batch_size
    tunings = [spec.method for spec in specs]
    return batchable_groups(tunings, context.base, training, tokens, context.device)


def _train_batched(
    group: Sequence[RunFolder], context: RunContext, data: TrainingData, tell: Log
) -> list[dict[str, Any]]:
    """Train runs in fused steps, or a single one in as many parts as it has; their records.

    Seconds of a run are its share: the time of a fused step, and of all else that a group does, is
    divided evenly among its runs, so that the sum over runs is what was spent.
    """
    started = time.monotonic()
    # The runs of a group have one method and seed.
    spec, folder = group[0].config, group[0].folder
    examples = pack_dataset(data.train, spec.training)
    load, guard = _load_base_and_mitigations(spec, context, data)
    value = context.base_value

    def evaluate(model: Model) -> tuple[pd.DataFrame, float]:
        return _evaluate_items(model, spec, context)

    def tell_of(number: int, progress: TrainState, plan: LrSchedule) -> None:
        tell(group[number].name, progress, plan)

    def fit(model: Model, recipe: RunConfig, begun: TrainState | None) -> TrainState:
        return train_run(
            model, examples, recipe, value, evaluate, folder, partial(tell_of, 0), begun
        )

    means = RunFactory(load_base=load, build_mitigations=guard, train=fit)
    plans = [(place.config.method, _run_config(place, context, len(examples))) for place in group]
    if len(group) == 1:
        progress, model = train_stages(*plans[0], means, folder)
        ended, trained = [progress], [trained_weights(model)]
    else:
        recipes = [recipe for _, recipe in plans]
        model, recipes, starts = prepare_batched_runs(spec.method, recipes, means)
        kept = list(zip(recipes, [place.folder for place in group], strict=True))
        ended = train_batched(model, examples, kept, value, evaluate, tell_of, starts)
        trained = [dict(start.weights) for start in starts]
    shared = {
        "steps_per_epoch": plans[0][1].schedule.steps_per_epoch,
        "wall_seconds": (time.monotonic() - started) / len(group),
        "peak_memory_gib": peak_memory_gib(context.device),
        "processes": context.process_group.world_size,
        **describe_computation(context.device, context.precision),
        "cut_rows": data.train.cut,
        "fused_optimizer": uses_fused_kernel(spec.training, trained[0].values()),
    }
    return [_run_record(*run) | shared for run in zip(group, ended, trained, strict=True)]


def _run_config(place: RunFolder, context: RunContext, examples: int) -> RunConfig:
    spec = place.config
    return RunConfig(
        hyperparameters=place.hyperparameters,
        seed=spec.seed,
        training=spec.training,
        schedule=LrSchedule.plan(examples, spec.training, spec.evaluation.every_epochs),
        threshold=spec.selection.threshold,
        stop_after_evaluations=spec.selection.stop_after_evaluations,
        precision=context.precision,
        pad=context.tokenizer.pad_token_id,
        loraplus_lr_ratio=spec.method.loraplus_lr_ratio,
        process_group=context.process_group,
    )


def _run_record(
    place: RunFolder, progress: TrainState, trained: Mapping[str, torch.nn.Parameter]
) -> dict[str, Any]:
    return {
        "run": place.name,
        "status": progress.status,
        "hyperparameters": place.hyperparameters.model_dump(),
        "steps": progress.step,
        "tokens": progress.tokens,
        "losses": progress.losses,
        "penalties": progress.penalties if any(progress.penalties) else [],
        "evaluations": progress.evaluations,
        "trainable_parameters": sum(weight.numel() for weight in trained.values()),
        "training_seconds": progress.seconds,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else 0.0,
        "trained_together": batch_members(place.folder),
    }


def _load_base_and_mitigations(
    spec: RunGroupConfig, context: RunContext, data: TrainingData
) -> tuple[Callable[[], PreTrainedModel], Callable[[Model], Mitigations]]:
    """What loads the base, and what holds a model near it."""
    process_group, precision = context.process_group, context.precision

    def load() -> PreTrainedModel:
        # From disk for every run: training and rounding change the weights that were loaded.
        model = load_base(context.base, context.device, context.parameters)
        check_model_inputs(model, data.train, spec.training)
        if spec.training.activation_checkpointing:
            recompute_activations(model)
        return model

    def load_frozen() -> Model:
        return shard_model(load().requires_grad_(False), process_group, precision)

    def guard(model: Model) -> Mitigations:
        mitigation = spec.method.mitigation
        # A sharded model may have rounded matrices, which compute under autocast alone.
        with autocast(context.device, precision) if is_sharded(model) else nullcontext():
            mitigations = build_mitigations(model, mitigation, data.general, spec.seed, load_frozen)
        return replace(mitigations, replay=pack_dataset(mitigations.replay, spec.training))

    return load, guard


def _evaluate_items(
    model: Model, spec: RunGroupConfig, context: RunContext
) -> tuple[pd.DataFrame, float]:
    def measured(probes: Mapping[str, list[Row]]) -> pd.DataFrame:
        return evaluate_probes(model, context.tokenizer, probes, spec.prompt, spec.evaluation)

    precision = context.precision
    with autocast(context.device, precision), unsharded(model), merged_adapter(model, precision):
        items = evaluate_distributed(measured, context.probes, context.process_group)
        # Every process reads all of the text.
        items = append_divergence(items, model, context.base_predictions)
        if context.training_benchmarks:
            items = merge_items(items, context.training_benchmarks(model))
    return items, mean_score(items, spec.selection.probe, spec.selection.metric)


def run_group_items(records: Sequence[Mapping[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The items of all evaluations of all runs, of the probes and of benchmarks apart.

    Columns run, step and epoch, then those of `evaluate_probes`, or of `benchmarks.beside`.
    """
    tables = []
    for record in records:
        for step, epoch, _ in record["evaluations"]:
            folder = Path(record["folder"])
            table = read_table(folder / f"items-{int(step):07d}.parquet", removal_command(folder))
            table.insert(0, "run", record["run"])
            table.insert(1, "step", int(step))
            table.insert(2, "epoch", epoch)
            tables.append(table)
    return split_items(pd.concat(tables, ignore_index=True) if tables else pd.DataFrame())


def write_checkpoint_index(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write where the checkpoints of each run are.

    The file is an output of the job in the folder of the state. Whoever deletes the state deletes
    it too, and Snakemake repeats the job before anything that needs a checkpoint.
    """
    write_json(path, {record["run"]: record["folder"] for record in records})


def check_model_inputs(model: Model, examples: Sequence[Example], training: TrainingConfig) -> None:
    """Refuse what is longer than the model reads, and packing where examples would leak."""
    room, longest = context_length(model), max(example_lengths(examples))
    if room is not None and longest > room:
        raise InputError(
            f"training.max_length: the longest training sequence has {longest} tokens, the model "
            f"reads {room}; take at most {room}"
        )
    if training.packing and not supports_custom_mask(model):
        raise InputError(
            f"training.packing: in this model ({model.config.model_type}) the attention mask alone "
            "does not decide what a token sees, so that packed examples would not be apart; set "
            "packing: false"
        )
