"""A cohort: the runs of one job, fused or one after the other; those of one method and seed, or of
several whose adapters may share a pass.

A finished run is kept in a folder named by a key of everything that it depends on. A cohort that is
run again trains only what is not there yet: one learning rate more costs one run more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel

from forgetting.benchmarks.beside import apart, beside
from forgetting.data.table_files import Row
from forgetting.encoding.examples import arrange, check_model
from forgetting.machine import describe_computation
from forgetting.memory import peak_memory_gib
from forgetting.models.loading import Model, autocast, load_base, recompute_activations
from forgetting.models.merged import merged
from forgetting.records import (
    InputError,
    read_json,
    read_table,
    removal,
    remove_file,
    remove_folder,
    write_json,
)
from forgetting.scoring.drift import with_text
from forgetting.scoring.probes import measure
from forgetting.scoring.scores import metric_value
from forgetting.training.checkpoints import Progress, forget_training, restart_damaged
from forgetting.training.fused import trained_weights
from forgetting.training.fusible import shared_passes
from forgetting.training.materials import CohortSpec, Data, Materials, tokenized
from forgetting.training.mitigate import Safeguards, build_safeguards
from forgetting.training.optimize import uses_fused_kernel
from forgetting.training.parallel import gathered, is_sharded, measure_together, shard
from forgetting.training.parts import Means, prepare_together, train_parts
from forgetting.training.places import Place
from forgetting.training.recipe import Recipe
from forgetting.training.schedule import Schedule, warmup_mistake
from forgetting.training.together import END, groups, trained_together
from forgetting.training.train import train, train_together

Tell = Callable[[str, Progress, Schedule], None]


def train_cohort(
    specs: Sequence[CohortSpec],
    materials: Materials,
    inputs: Mapping[str, str],
    state: Path,
    tell: Tell,
    *,
    branches: bool = False,
) -> list[dict[str, Any]]:
    """Train every run that is not finished yet; return the records of all, in the sweep's order.

    Args:
        specs: of every method and seed of the cohort, which are alike in all else.
        branches: may the runs end within their warm-up, since longer ones share it?
    """
    team, spec = materials.team, specs[0]
    places = [
        Place.of(spec, setting, inputs, state) for spec in specs for setting in spec.tuning.settings
    ]
    missing = team.agree([place for place in places if not place.record.exists()])
    parts, data = [[number] for number in range(len(places))], None
    if missing:
        for place in missing if team.first else ():
            _forget_unfinished(place.folder)
        with team.first_alone():
            data = tokenized(spec, materials, inputs, state / "tokens")
        if data.train.cut and team.first:
            print(
                f"warning: {data.train.cut} training answers are longer than training.max_length "
                f"({spec.training.max_length} tokens) and are cut, without an end of sequence; "
                "make it larger",
                flush=True,
            )
        examples = len(arrange(data.train, spec.training))
        if (mistake := warmup_mistake(examples, spec.training)) and not branches:
            raise InputError(f"training.{mistake[0]}: {mistake[1]}")
        parts = _shared_passes([place.spec for place in places], materials, data)
    # Of finished runs too, so that a cohort that was killed goes on with the same groups.
    for part in ([places[number] for number in numbers] for numbers in parts):
        untrained = {place.folder: place for place in part if place in missing}
        if team.first:
            restart_damaged(list(untrained))
        team.wait()
        for folders in groups(list(untrained)):
            group = [untrained[folder] for folder in folders]
            assert data
            records = _train_group(group, materials, data, tell)
            for place, record in zip(group, records, strict=True):
                if team.first:
                    write_json(place.record, record | {"key": place.key})
        for place in part if team.first else ():
            # Only now: without it, a run killed before its record was written cannot go on.
            forget_training(place.folder)
            remove_file(place.folder / END)
        team.wait()
    return [
        read_json(place.record, removal(place.folder)) | {"folder": str(place.folder)}
        for place in places
    ]


def _forget_unfinished(folder: Path) -> None:
    """Remove what the same run left half done with other settings, data or code.

    Finished runs stay: when a setting is changed and changed back, nothing is trained again.
    """
    for other in folder.parent.glob("*") if folder.parent.exists() else []:
        if other != folder and not (other / "run.json").exists():
            remove_folder(other)
    folder.mkdir(parents=True, exist_ok=True)


def _shared_passes(
    specs: Sequence[CohortSpec], materials: Materials, data: Data
) -> list[list[int]]:
    """Which runs are trained together, by their numbers; of several processes, none."""
    if materials.team.size > 1:
        return [[number] for number in range(len(specs))]
    training = specs[0].training
    tokens = data.train.sizes.sum() / len(arrange(data.train, training)) * training.batch_size
    tunings = [spec.tuning for spec in specs]
    return shared_passes(tunings, materials.base, training, tokens, materials.device)


def _train_group(
    group: Sequence[Place], materials: Materials, data: Data, tell: Tell
) -> list[dict[str, Any]]:
    """Train runs in fused steps, or a single one in as many parts as it has; their records.

    Seconds of a run are its share: the time of a fused step, and of all else that a group does, is
    divided evenly among its runs, so that the sum over runs is what was spent.
    """
    started = time.monotonic()
    # The runs of a group have one method and seed.
    spec, folder = group[0].spec, group[0].folder
    examples = arrange(data.train, spec.training)
    load, guard = _base_and_guard(spec, materials, data)
    value = materials.base_value

    def evaluate(model: Model) -> tuple[pd.DataFrame, float]:
        return _evaluate(model, spec, materials)

    def tell_of(number: int, progress: Progress, plan: Schedule) -> None:
        tell(group[number].name, progress, plan)

    def fit(model: Model, recipe: Recipe, begun: Progress | None) -> Progress:
        return train(model, examples, recipe, value, evaluate, folder, partial(tell_of, 0), begun)

    means = Means(load=load, guard=guard, fit=fit)
    plans = [(place.spec.tuning, _recipe(place, materials, len(examples))) for place in group]
    if len(group) == 1:
        progress, model = train_parts(*plans[0], means, folder)
        ended, trained = [progress], [trained_weights(model)]
    else:
        recipes = [recipe for _, recipe in plans]
        model, recipes, starts = prepare_together(spec.tuning, recipes, means)
        kept = list(zip(recipes, [place.folder for place in group], strict=True))
        ended = train_together(model, examples, kept, value, evaluate, tell_of, starts)
        trained = [dict(start.weights) for start in starts]
    shared = {
        "steps_per_epoch": plans[0][1].schedule.steps_per_epoch,
        "wall_seconds": (time.monotonic() - started) / len(group),
        "peak_memory_gib": peak_memory_gib(materials.device),
        "processes": materials.team.size,
        **describe_computation(materials.device, materials.precision),
        "cut_rows": data.train.cut,
        "fused_optimizer": uses_fused_kernel(spec.training, trained[0].values()),
    }
    return [_record(*run) | shared for run in zip(group, ended, trained, strict=True)]


def _recipe(place: Place, materials: Materials, examples: int) -> Recipe:
    spec = place.spec
    return Recipe(
        setting=place.setting,
        seed=spec.seed,
        training=spec.training,
        schedule=Schedule.plan(examples, spec.training, spec.measurement.every_epochs),
        threshold=spec.selection.threshold,
        stop_after=spec.selection.stop_after,
        precision=materials.precision,
        pad=materials.tokenizer.pad_token_id,
        lora_plus_ratio=spec.tuning.lora_plus_ratio,
        team=materials.team,
    )


def _record(
    place: Place, progress: Progress, trained: Mapping[str, torch.nn.Parameter]
) -> dict[str, Any]:
    return {
        "run": place.name,
        "status": progress.status,
        "setting": place.setting.model_dump(),
        "steps": progress.step,
        "tokens": progress.tokens,
        "losses": progress.losses,
        "penalties": progress.penalties if any(progress.penalties) else [],
        "points": progress.points,
        "trainable_parameters": sum(weight.numel() for weight in trained.values()),
        "training_seconds": progress.seconds,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else 0.0,
        "trained_together": trained_together(place.folder),
    }


def _base_and_guard(
    spec: CohortSpec, materials: Materials, data: Data
) -> tuple[Callable[[], PreTrainedModel], Callable[[Model], Safeguards]]:
    """What loads the base, and what holds a model near it."""
    team, precision = materials.team, materials.precision

    def load() -> PreTrainedModel:
        # From disk for every run: training and rounding change the weights that were loaded.
        model = load_base(materials.base, materials.device, materials.parameters)
        check_model(model, data.train, spec.training)
        if spec.training.activation_checkpointing:
            recompute_activations(model)
        return model

    def load_frozen() -> Model:
        return shard(load().requires_grad_(False), team, precision)

    def guard(model: Model) -> Safeguards:
        mitigation = spec.tuning.mitigation
        # A sharded model may have rounded matrices, which compute under autocast alone.
        with autocast(materials.device, precision) if is_sharded(model) else nullcontext():
            safeguards = build_safeguards(model, mitigation, data.general, spec.seed, load_frozen)
        return replace(safeguards, replay=arrange(safeguards.replay, spec.training))

    return load, guard


def _evaluate(model: Model, spec: CohortSpec, materials: Materials) -> tuple[pd.DataFrame, float]:
    def measured(probes: Mapping[str, list[Row]]) -> pd.DataFrame:
        return measure(model, materials.tokenizer, probes, spec.prompt, spec.measurement)

    precision = materials.precision
    with autocast(materials.device, precision), gathered(model), merged(model, precision):
        items = measure_together(measured, materials.probes, materials.team)
        # Every process reads all of the text.
        items = with_text(items, model, materials.targets)
        if materials.along:
            items = beside(items, materials.along(model))
    return items, metric_value(items, spec.selection.probe, spec.selection.metric)


def cohort_items(records: Sequence[Mapping[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The items of all evaluations of all runs, of the probes and of benchmarks apart.

    Columns run, step and epoch, then those of `measure`, or of `benchmarks.beside`.
    """
    tables = []
    for record in records:
        for step, epoch, _ in record["points"]:
            folder = Path(record["folder"])
            table = read_table(folder / f"items-{int(step):07d}.parquet", removal(folder))
            table.insert(0, "run", record["run"])
            table.insert(1, "step", int(step))
            table.insert(2, "epoch", epoch)
            tables.append(table)
    return apart(pd.concat(tables, ignore_index=True) if tables else pd.DataFrame())


def write_checkpoints(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write where the checkpoints of each run are.

    The file is an output of the job in the folder of the state. Whoever deletes the state deletes
    it too, and Snakemake repeats the job before anything that needs a checkpoint.
    """
    write_json(path, {record["run"]: record["folder"] for record in records})
