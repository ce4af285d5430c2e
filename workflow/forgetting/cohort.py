"""A cohort: all runs of one method and seed, one after the other in one process.

A finished run is kept in a folder named by a key of everything that it depends on. A cohort that is
run again trains only what is not there yet: one learning rate more costs one run more.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgetting.checkpoints import Progress, finish
from forgetting.data import Row
from forgetting.encode import Example, encode_pair, encode_text
from forgetting.fields import Strict
from forgetting.machine import describe_machine
from forgetting.memory import peak_memory_gib
from forgetting.mitigate import Safeguards, build_safeguards
from forgetting.models import (
    Model,
    attach,
    autocast,
    load_base,
    recompute_activations,
    round_frozen,
)
from forgetting.optimize import Schedule
from forgetting.parallel import ALONE, Team, gathered, is_sharded, measure_together, shard
from forgetting.plan import Tuning, run_name
from forgetting.probes import measure
from forgetting.recipe import Recipe
from forgetting.records import InputError, content_key, read_json, write_json
from forgetting.scores import metric_value
from forgetting.study import Measurement, Prompt, Selection, Setting, Training
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


@dataclass(frozen=True)
class Materials:
    """What all runs of a cohort share."""

    base: Path
    tokenizer: PreTrainedTokenizerBase
    train: list[Row]
    probes: Mapping[str, list[Row]]
    base_value: float
    device: torch.device
    precision: torch.dtype
    general: Mapping[str, list[Row]] = field(default_factory=dict)
    """Tables of general text that the method's mitigation reads."""
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
    return content_key({"spec": described, "setting": setting.model_dump(), **inputs})


def train_cohort(
    spec: CohortSpec,
    materials: Materials,
    inputs: Mapping[str, str],
    state: Path,
    tell: Tell,
) -> list[dict[str, Any]]:
    """Train every run that is not finished yet; return the records of all, in the sweep's order."""
    team = materials.team
    records = []
    for setting in spec.tuning.settings:
        name = run_name(spec.tuning.name, spec.seed, setting)
        key = run_key(spec, setting, inputs)
        folder = state / name / key
        if not team.agree((folder / "run.json").exists()):
            if team.first:
                _forget_unfinished(folder)
            record = _train_run(spec, setting, name, materials, folder, tell)
            if team.first:
                write_json(folder / "run.json", record | {"key": key})
        # Only now: without it, a run that was killed before its record was written cannot go on.
        if team.first:
            finish(folder)
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


def _encode(
    rows: Sequence[Row], spec: CohortSpec, tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """Questions with their answers in the study's prompt, and texts as they are."""
    limit = spec.training.max_length
    examples = [
        encode_text(tokenizer, row["text"], limit)
        if "text" in row
        else encode_pair(tokenizer, spec.prompt, row["question"], row["answer"], limit)
        for row in rows
    ]
    if cut := [row["id"] for row, e in zip(rows, examples, strict=True) if e.targets < 1]:
        raise InputError(
            f"training.max_length: {limit} tokens leave nothing of the answer "
            f"of {cut[0]} and {len(cut) - 1} more; make it longer"
        )
    return examples


def _train_run(
    spec: CohortSpec,
    setting: Setting,
    name: str,
    materials: Materials,
    folder: Path,
    tell: Tell,
) -> dict[str, Any]:
    examples = _encode(materials.train, spec, materials.tokenizer)
    general = {
        table: _encode(rows, spec, materials.tokenizer) for table, rows in materials.general.items()
    }
    cut_rows = sum(e.ids[-1] != materials.tokenizer.eos_token_id for e in examples)
    started = time.monotonic()
    model, safeguards = _prepare(spec, materials, general)
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
        safeguards=safeguards,
        team=materials.team,
    )
    progress = train(
        model,
        examples,
        recipe,
        materials.base_value,
        lambda model: _evaluate(model, spec, materials),
        folder,
        lambda progress, plan: tell(name, progress, plan),
    )
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
        "cut_rows": cut_rows,
    }


def _prepare(
    spec: CohortSpec, materials: Materials, general: Mapping[str, Sequence[Example]]
) -> tuple[Model, Safeguards]:
    """The model that is trained, and what holds it near the base."""
    team, precision = materials.team, materials.precision

    def load() -> PreTrainedModel:
        return load_base(materials.base, materials.device)

    # From disk for every run: training and rounding change the weights that were loaded.
    model = shard(attach(load(), spec.tuning, spec.seed), team, precision)
    if spec.training.activation_checkpointing:
        recompute_activations(model)
    # A sharded model may have rounded matrices, which compute under autocast alone.
    with autocast(materials.device, precision) if is_sharded(model) else nullcontext():
        safeguards = build_safeguards(
            model,
            spec.tuning.mitigation,
            general,
            spec.seed,
            lambda: shard(load().requires_grad_(False), team, precision),
        )
    round_frozen(model, precision)
    return model, safeguards


def _evaluate(model: Model, spec: CohortSpec, materials: Materials) -> tuple[pd.DataFrame, float]:
    def measured(probes: Mapping[str, list[Row]]) -> pd.DataFrame:
        return measure(model, materials.tokenizer, probes, spec.prompt, spec.measurement)

    with autocast(materials.device, materials.precision), gathered(model):
        items = measure_together(measured, materials.probes, materials.team)
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
