"""A cohort: all runs of one method and seed in one process, fused or one after the other.

A finished run is kept in a folder named by a key of everything that it depends on. A cohort that is
run again trains only what is not there yet: one learning rate more costs one run more.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from forgetting.checkpoints import Progress
from forgetting.data import Row
from forgetting.encode import Example, encode_pair, encode_text
from forgetting.fields import Strict
from forgetting.fused import asks_for_plain_adapters, outline, runs_in_a_step
from forgetting.machine import describe_machine
from forgetting.memory import peak_memory_gib
from forgetting.mitigate import build_safeguards
from forgetting.models import Model, attach, autocast, load_base, round_frozen
from forgetting.optimize import Schedule
from forgetting.plan import Tuning, run_name
from forgetting.probes import measure
from forgetting.recipe import Recipe
from forgetting.records import InputError, content_key, read_json, write_json
from forgetting.scores import metric_value
from forgetting.study import Measurement, Prompt, Selection, Setting, Training
from forgetting.together import END, groups
from forgetting.train import train_together


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
class Place:
    """One run of the sweep, and where it is kept."""

    setting: Setting
    name: str
    key: str
    folder: Path

    @property
    def record(self) -> Path:
        """What is written when the run is finished."""
        return self.folder / "run.json"


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


Tell = Callable[[str, Progress, Schedule], None]


def run_key(spec: CohortSpec, setting: Setting, inputs: Mapping[str, str]) -> str:
    """Digest of all that a run depends on: its settings, its inputs' digests, the code."""
    described = spec.model_dump(exclude={"tuning": {"settings", "fixed", "label"}})
    # The rule decides which checkpoint is kept; how hyper-parameters are compared does not matter.
    described["selection"] = {
        key: described["selection"][key] for key in ("probe", "metric", "threshold", "stop_after")
    }
    # Alone or fused, a run comes to the same.
    del described["training"]["fuse"]
    return content_key({"spec": described, "setting": setting.model_dump(), **inputs})


def train_cohort(
    spec: CohortSpec,
    materials: Materials,
    inputs: Mapping[str, str],
    state: Path,
    tell: Tell,
) -> list[dict[str, Any]]:
    """Train every run that is not finished yet; return the records of all, in the sweep's order."""
    places = []
    for setting in spec.tuning.settings:
        name, key = run_name(spec.tuning.name, spec.seed, setting), run_key(spec, setting, inputs)
        places.append(Place(setting, name, key, state / name / key))
    missing = [place for place in places if not place.record.exists()]
    for place in missing:
        _forget_unfinished(place.folder)
    rows = _encode_all(spec, materials) if missing else Rows([], {})
    size = _runs_in_a_step(spec, materials, rows.train) if len(missing) > 1 else 1
    # By places in the sweep, so that a cohort that was killed goes on with the same groups.
    for part in evenly(places, size):
        untrained = {place.folder: place for place in part if place in missing}
        for folders in groups(list(untrained)):
            group = [untrained[folder] for folder in folders]
            records = _train_group(spec, group, materials, rows, tell)
            for place, record in zip(group, records, strict=True):
                write_json(place.record, record | {"key": place.key})
        for place in part:
            _forget_training(place.folder)
    return [read_json(place.record) | {"folder": str(place.folder)} for place in places]


def evenly(items: Sequence[Any], most: int) -> list[list[Any]]:
    """Consecutive parts of at most so many items, whose sizes differ by one at most."""
    count = math.ceil(len(items) / most)
    size, more = divmod(len(items), max(1, count))
    ends = [(number + 1) * size + min(number + 1, more) for number in range(count)]
    return [list(items[begin:end]) for begin, end in pairwise([0, *ends])]


def _forget_training(folder: Path) -> None:
    """Of a finished run, remove what it would go on from.

    Only now: without it, a run that was killed before its record was written cannot go on.
    """
    for optimizer_state in folder.glob("step-*/optimizer.safetensors"):
        optimizer_state.unlink()
    (folder / END).unlink(missing_ok=True)


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


@dataclass(frozen=True)
class Rows:
    """The examples of the new knowledge, and of the mitigation's tables."""

    train: list[Example]
    general: Mapping[str, list[Example]]


def _encode_all(spec: CohortSpec, materials: Materials) -> Rows:
    general = materials.general.items()
    return Rows(
        _encode(materials.train, spec, materials.tokenizer),
        {table: _encode(rows, spec, materials.tokenizer) for table, rows in general},
    )


def _runs_in_a_step(spec: CohortSpec, materials: Materials, examples: Sequence[Example]) -> int:
    """How many runs of the cohort are trained together; 1 where they are not fused."""
    if not spec.training.fuse or not asks_for_plain_adapters(spec.tuning):
        return 1
    mean = sum(len(example.ids) for example in examples) / len(examples)
    return runs_in_a_step(
        outline(materials.base, spec.tuning),
        spec.training,
        mean * spec.training.batch_size,
        materials.device,
    )


def _train_group(
    spec: CohortSpec,
    group: Sequence[Place],
    materials: Materials,
    rows: Rows,
    tell: Tell,
) -> list[dict[str, Any]]:
    """Train runs in fused steps, or a single one; their records.

    Seconds of a run are its share: the time of a fused step, and of all else that a group does, is
    divided evenly among its runs, so that the sums over runs are what was spent.
    """
    started = time.monotonic()
    # From disk for every group: training and rounding change the weights that were loaded.
    model = attach(load_base(materials.base, materials.device), spec.tuning, spec.seed)
    recipe = Recipe(
        setting=group[0].setting,
        seed=spec.seed,
        training=spec.training,
        schedule=Schedule.plan(len(rows.train), spec.training, spec.measurement.every_epochs),
        threshold=spec.selection.threshold,
        stop_after=spec.selection.stop_after,
        precision=materials.precision,
        pad=materials.tokenizer.pad_token_id,
        lora_plus_ratio=spec.tuning.lora_plus_ratio,
        safeguards=build_safeguards(model, spec.tuning.mitigation, rows.general, spec.seed),
    )
    round_frozen(model, materials.precision)

    def evaluate(model: Model) -> tuple[pd.DataFrame, float]:
        with autocast(materials.device, materials.precision):
            items = measure(
                model, materials.tokenizer, materials.probes, spec.prompt, spec.measurement
            )
        return items, metric_value(items, spec.selection.probe, spec.selection.metric)

    ended = train_together(
        model,
        rows.train,
        [(replace(recipe, setting=place.setting), place.folder) for place in group],
        materials.base_value,
        evaluate,
        lambda number, progress, plan: tell(group[number].name, progress, plan),
    )
    eos = materials.tokenizer.eos_token_id
    shared = {
        "steps_per_epoch": recipe.schedule.steps_per_epoch,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "wall_seconds": (time.monotonic() - started) / len(group),
        "trained_together": len(group),
        "peak_memory_gib": peak_memory_gib(materials.device),
        "precision": str(materials.precision).removeprefix("torch."),
        "device": device_name(materials.device),
        "machine": describe_machine(),
        "cut_rows": sum(example.ids[-1] != eos for example in rows.train),
    }
    return [_record(*run) | shared for run in zip(group, ended, strict=True)]


def _record(place: Place, progress: Progress) -> dict[str, Any]:
    return {
        "run": place.name,
        "status": progress.status,
        "setting": place.setting.model_dump(),
        "steps": progress.step,
        "tokens": progress.tokens,
        "losses": progress.losses,
        "points": progress.points,
        "training_seconds": progress.seconds,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else 0.0,
    }


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
