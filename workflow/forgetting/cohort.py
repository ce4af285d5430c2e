"""A cohort: all runs of one method and seed, one after the other in one process.

A finished run is kept in a folder named by a key of everything that it depends on. A cohort that is
run again trains only what is not there yet: one learning rate more costs one run more.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgetting.checkpoints import Progress, forget_training
from forgetting.columns import Columns
from forgetting.data import Row
from forgetting.drift import BaseTargets, with_text
from forgetting.examples import arrange, check_model, tokenize
from forgetting.fields import Strict
from forgetting.machine import describe_machine
from forgetting.memory import peak_memory_gib
from forgetting.merged import merged
from forgetting.mitigate import Safeguards, build_safeguards
from forgetting.models import Model, autocast, load_base, recompute_activations
from forgetting.optimize import Schedule
from forgetting.parallel import gathered, is_sharded, measure_together, shard
from forgetting.parts import Means, train_parts
from forgetting.plan import Tuning, run_name
from forgetting.probes import measure
from forgetting.recipe import Recipe
from forgetting.records import content_key, read_json, write_json
from forgetting.scores import metric_value
from forgetting.store import Stored
from forgetting.study import Measurement, Prompt, Selection, Setting, Training
from forgetting.team import ALONE, Team
from forgetting.train import train


class CohortSpec(Strict):
    """What the study says of one cohort; passed to the program as JSON."""

    tuning: Tuning
    seed: int
    prompt: Prompt
    training: Training
    measurement: Measurement
    selection: Selection
    precision: str
    knowledge: dict[str, str]
    columns: dict[str, Columns] = Field(default_factory=dict)


@dataclass(frozen=True)
class Materials:
    """What all runs of a cohort share."""

    base: Path
    tokenizer: PreTrainedTokenizerBase
    train: Iterable[Row]
    probes: Mapping[str, list[Row]]
    base_value: float
    device: torch.device
    precision: torch.dtype
    general: Mapping[str, Iterable[Row]] = field(default_factory=dict)
    """Tables of general text that the method's mitigation reads."""
    targets: BaseTargets | None = None
    """What the base predicts on the study's general text."""
    team: Team = ALONE


Tell = Callable[[str, Progress, Schedule], None]


def run_key(spec: CohortSpec, setting: Setting, inputs: Mapping[str, str]) -> str:
    """Digest of all that a run depends on: its settings, its inputs' digests, the code."""
    described = spec.model_dump(exclude={"tuning": {"settings", "fixed", "label"}})
    # How much memory a pass takes changes no number.
    del described["training"]["activation_checkpointing"]
    # The rule decides which checkpoint is kept; how hyper-parameters are compared does not matter.
    described["selection"] = {
        key: described["selection"][key] for key in ("probe", "metric", "threshold", "stop_after")
    }
    # A trunk is the same for any shorter budgets: one more is a branch more.
    described["training"]["budgets"] = bool(spec.training.budgets)
    return content_key({"spec": described, "setting": setting.model_dump(), **inputs})


def train_cohort(
    spec: CohortSpec,
    materials: Materials,
    inputs: Mapping[str, str],
    state: Path,
    tell: Tell,
) -> list[dict[str, Any]]:
    """Train every run that is not finished yet; return the records of all, in the sweep's order."""
    team, records = materials.team, []
    for setting in spec.tuning.settings:
        name = run_name(spec.tuning.name, spec.seed, setting)
        key = run_key(spec, setting, inputs)
        folder = state / name / key
        if not team.agree((folder / "run.json").exists()):
            if team.first:
                _forget_unfinished(folder)
            with team.first_alone():
                data = _tokenized(spec, materials, inputs, state / "tokens")
            record = _train_run(spec, setting, name, materials, data, folder, tell)
            if team.first:
                write_json(folder / "run.json", record | {"key": key})
        # Only now: without it, a run that was killed before its record was written cannot go on.
        if team.first:
            forget_training(folder)
        team.wait()
        records.append(read_json(folder / "run.json") | {"folder": str(folder)})
    return records


def _forget_unfinished(folder: Path) -> None:
    """Remove what the same run left half done with other settings, data or code.

    Finished runs stay: when a setting is changed and changed back, nothing is trained again.
    """
    for other in folder.parent.glob("*") if folder.parent.exists() else []:
        if other != folder and not (other / "run.json").exists():
            shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True)
class Data:
    """The examples of the new knowledge and of the mitigation's tables."""

    train: Stored
    general: Mapping[str, Stored]


def _tokenized(
    spec: CohortSpec, materials: Materials, inputs: Mapping[str, str], folder: Path
) -> Data:
    """All tables as examples, in files that all cohorts of a study share."""

    def read(table: str, rows: Iterable[Row], digest: str | None, blocks: bool) -> Stored:
        decided = {"digest": digest, "prompt": spec.prompt.model_dump(), "blocks": blocks}
        decided |= {name: inputs.get(name) for name in ("base", "code")}
        decided |= {name: getattr(spec.training, name) for name in ("max_length", "packing")}
        if table in spec.columns:
            decided["columns"] = spec.columns[table].model_dump()
        path = folder / f"{table.replace('/', '-')}-{content_key(decided)}.arrow"
        return tokenize(rows, materials.tokenizer, spec.prompt, spec.training, path, blocks=blocks)

    return Data(
        read("train", materials.train, inputs.get("train"), blocks=True),
        {
            table: read(table, rows, inputs.get(f"table {table}"), blocks=False)
            for table, rows in materials.general.items()
        },
    )


def _train_run(
    spec: CohortSpec,
    setting: Setting,
    name: str,
    materials: Materials,
    data: Data,
    folder: Path,
    tell: Tell,
) -> dict[str, Any]:
    started = time.monotonic()
    examples = arrange(data.train, spec.training)
    schedule = Schedule.plan(len(examples), spec.training, spec.measurement.every_epochs)
    recipe = Recipe(
        setting=setting,
        seed=spec.seed,
        training=spec.training,
        schedule=schedule,
        threshold=spec.selection.threshold,
        stop_after=spec.selection.stop_after,
        precision=materials.precision,
        pad=materials.tokenizer.pad_token_id,
        lora_plus_ratio=spec.tuning.lora_plus_ratio,
        team=materials.team,
    )

    def fit(model: Model, recipe: Recipe, begun: Progress | None) -> Progress:
        return train(
            model,
            examples,
            recipe,
            materials.base_value,
            lambda model: _evaluate(model, spec, materials),
            folder,
            lambda progress, plan: tell(name, progress, plan),
            begun,
        )

    load, guard = _base_and_guard(spec, materials, data)
    means = Means(load=load, guard=guard, fit=fit)
    progress, model = train_parts(spec.tuning, recipe, means, folder)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "run": name,
        "status": progress.status,
        "setting": setting.model_dump(),
        "steps": progress.step,
        "steps_per_epoch": schedule.steps_per_epoch,
        "tokens": progress.tokens,
        "losses": progress.losses,
        "points": progress.points,
        "trainable_parameters": trainable,
        "training_seconds": progress.seconds,
        "wall_seconds": time.monotonic() - started,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else 0.0,
        "peak_memory_gib": peak_memory_gib(materials.device),
        "precision": str(materials.precision).removeprefix("torch."),
        "device": device_name(materials.device),
        "processes": materials.team.size,
        "machine": describe_machine(),
        "cut_rows": data.train.cut,
    }


def _base_and_guard(
    spec: CohortSpec, materials: Materials, data: Data
) -> tuple[Callable[[], PreTrainedModel], Callable[[Model], Safeguards]]:
    """What loads the base, and what holds a model near it."""
    team, precision = materials.team, materials.precision

    def load() -> PreTrainedModel:
        # From disk for every run: training and rounding change the weights that were loaded.
        model = load_base(materials.base, materials.device)
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
    return items, metric_value(items, spec.selection.probe, spec.selection.metric)


def cohort_items(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The items of all evaluations of all runs: columns run and step, then those of `measure`."""
    tables = []
    for record in records:
        for step, epoch, _ in record["points"]:
            table = pd.read_parquet(Path(record["folder"]) / f"items-{int(step):07d}.parquet")
            table.insert(0, "run", record["run"])
            table.insert(1, "step", int(step))
            table.insert(2, "epoch", epoch)
            tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def device_name(device: torch.device) -> str:
    """The GPU's name, or the number of threads on the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"
