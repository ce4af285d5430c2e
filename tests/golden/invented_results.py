"""Compute the golden outputs of selection, tables and page from invented results."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from forgetting.benchmarks.programs import describe
from forgetting.config.evaluation import TEXT_PROBE, SelectionConfig
from forgetting.config.expand import expand_methods, run_name
from forgetting.config.methods import Hyperparameters
from forgetting.config.study import StudyConfig
from forgetting.evaluation.metrics import PROBE_METRICS, TEXT_SCORES
from forgetting.io import read_table, write_json, write_table
from forgetting.report import summary
from forgetting.report.charts import FIGURES
from forgetting.report.frames import ReportTables
from forgetting.report.narrative import narrative
from forgetting.report.page import chart_spec
from forgetting.results.job_results import JobResults, tables_of
from forgetting.selection import choose_hyperparameters, recorded_evaluations, select_checkpoint
from support import result_tables as synthetic_tables

STUDY: dict[str, Any] = {
    "title": "A small study",
    "datasets": {"made": {"folder": "."}},
    "base": {"model": "."},
    "train": "made/new",
    "probes": {
        "new": {"table": "made/new", "knowledge": "new"},
        "old": {"table": "made/old", "knowledge": "old"},
    },
    "general_text": {"table": "made/text", "block": 24},
    "evaluation": {"max_new_tokens": 6},
    "training": {"epochs": 2, "batch_size": 4},
    "methods": [
        {"method": "lora", "rank": 4, "learning_rate": 0.01},
        {"method": "full", "learning_rate": 0.003},
    ],
    "selection": {"probe": "new", "metric": "probability", "threshold": 0.5},
    "precision": "float32",
    "seeds": [0, 1],
}


MATCHED = ("matched_differences", "matched_values")


def make_study(**changes: Any) -> StudyConfig:
    """Return the study with some sections replaced."""
    return StudyConfig.model_validate(STUDY | changes)


def select(folder: Path) -> dict[str, Any]:
    """Select hyperparameters and checkpoints of random trajectories."""
    generator = random.Random(0)
    hyperparameters = [Hyperparameters(learning_rate=rate) for rate in (1e-4, 1e-3, 1e-2)]
    outputs: dict[str, Any] = {}
    for case in range(12):
        trajectories = {
            point: [
                _trajectory(generator, 0.25 * (index + 1) * generator.random()) for _ in range(2)
            ]
            for index, point in enumerate(hyperparameters)
        }
        for rule in ("earliest", "smallest-lr"):
            selection = SelectionConfig(probe="new", hyperparameters=rule)
            chosen, why = choose_hyperparameters(trajectories, selection, None, set())
            choices = [
                select_checkpoint(points, selection.threshold, selection.if_not_reached)
                for points in (trajectories[chosen] if chosen else [])
            ]
            outputs[f"{case} {rule}"] = {
                "rate": chosen.learning_rate if chosen else None,
                "why": why,
                "choices": [
                    [choice.status, choice.point.step if choice.point else None, choice.reason]
                    for choice in choices
                ],
            }
    return outputs


def _trajectory(generator: random.Random, speed: float) -> Any:
    """Return evaluations of a run that learns at some speed, with noise."""
    values = [1 - math.exp(-speed * step) - 0.1 * generator.random() for step in range(1, 9)]
    points = [(step * 10, float(step), max(value, 0.0)) for step, value in enumerate(values, 1)]
    return recorded_evaluations(points, 0.1)


def job_results(study: StudyConfig, folder: Path) -> JobResults:
    """Return invented results of a study's runs on probes, text and a benchmark."""
    drawn = random.Random(1)
    base = _items(drawn, 0.6)
    items, records, selection = [], [], []
    for method in expand_methods(study):
        for seed in study.seeds:
            duration = next(iter(study.training.durations), None)
            run = run_name(method.name, seed, method.hyperparameters[0], duration)
            steps = [
                _items(drawn, 0.2 * step).assign(run=run, step=step, epoch=float(step))
                for step in (1, 2)
            ]
            items.append(pd.concat(steps, ignore_index=True))
            records.append(_record(run, method.hyperparameters[0]))
            selection.append(
                {"method": method.name, "label": method.label, "seed": seed, "run": run, "step": 2}
                | {"epoch": 2.0, "value": 0.4, "status": "selected", "reason": "made"}
            )
    models = [_scored(folder / run, run, drawn) for run in ("base", records[0]["run"])]
    answers = read_table(models[0] / "items.parquet").assign(response="", choice=1)
    evaluated = answers.assign(run=records[0]["run"], step=1, epoch=1.0)
    return JobResults(
        base={"parameters": 1000, "seconds": 1.0},
        data_notes=[],
        records=records,
        trunks=[],
        selection=pd.DataFrame(selection).astype({"step": "Int64"}),
        base_scored={},
        base_items=base,
        items=items,
        models=models,
        training_benchmarks=[answers, evaluated] if study.benchmarks.during_training else [],
        wise_ft=[items[0].assign(weight=weight) for weight in study.selection.wise_ft],
    )


def tables(folder: Path) -> dict[str, Any]:
    """Aggregate invented results of two methods and two seeds."""
    study = make_study()
    found = job_results(study, folder)
    made, notes = tables_of(study, found)
    kept = ("runs", "trajectory", "comparisons", "churn", "benchmarks")
    kept += ("fronts", "hypervolumes", "dominance")
    # The last evaluations are enough.
    ends = [made[name].query("step != 1") if "step" in made[name] else made[name] for name in kept]
    # The invented base knows what is new: nothing would be matched.
    lower = found.base_items.assign(probability=found.base_items["probability"] / 4)
    matched, _ = tables_of(study, replace(found, base_items=lower))
    means = {name: matched[name].query("level.isna()") for name in MATCHED}
    return {
        **{name: columns_of(table) for name, table in zip(kept, ends, strict=True)},
        **{name: columns_of(table) for name, table in means.items()},
        "notes": notes,
    }


def _items(drawn: random.Random, level: float) -> pd.DataFrame:
    """Return scores of eight questions of each probe and four blocks of text, around a level."""
    rows: list[dict[str, Any]] = []
    for probe in ("new", "old"):
        for number in range(8):
            row: dict[str, Any] = {"probe": probe, "item": f"{probe}/{number}"}
            row |= {name: min(level + 0.3 * drawn.random(), 1.0) for name in PROBE_METRICS}
            row["logprob_answer"] = math.log(row["probability"])
            row |= {
                "generated": f"It is {drawn.randint(0, 2)}.",
                "reference_tokens": 4,
                "reference": "It.",
            }
            row |= {"logprob_right": -drawn.random(), "logprobs_wrong": [-drawn.random()]}
            rows.append(row)
    for number in range(4):
        scores = {name: level + drawn.random() for name in TEXT_SCORES}
        rows.append({"probe": TEXT_PROBE, "item": f"block {number}", **scores})
    return pd.DataFrame(rows)


def _record(run: str, setting: Hyperparameters) -> dict[str, Any]:
    """Return the record of a run, as a training job writes it."""
    return {
        "hyperparameters": setting.model_dump(),
        **{"run": run, "status": "ok", "steps": 2, "steps_per_epoch": 1, "tokens": 200},
        **{"trainable_parameters": 10, "wall_seconds": 2.0, "tokens_per_second": 100.0},
        **{"batched_runs": 1, "peak_memory_gib": 1.0, "cut_rows": 0},
        **{"evaluations": [[1, 1.0, 0.2], [2, 2.0, 0.4]], "losses": [2.0, 1.0]},
    }


def _scored(folder: Path, run: str, drawn: random.Random) -> Path:
    """Write results of a model on ten items of a benchmark."""
    values = [float(drawn.random() < 0.6) for _ in range(10)]
    items = pd.DataFrame({"task": "sciq", "item": range(10), "metric": "acc,none", "value": values})
    mean = sum(values) / 10
    score = {"task": "sciq", "metric": "acc,none", "main": True, "value": mean, "stderr": 0.1}
    write_table(folder / "scores.parquet", pd.DataFrame([score | {"n": 10, "chance": 0.25}]))
    write_table(folder / "items.parquet", items)
    responses = items[["task", "item"]].assign(prompt_hash="", target="")
    responses["response"] = "[-1.0, -2.0, -3.0, -4.0]"
    responses["choice"] = pd.array([int(value) for value in values], dtype="Int64")
    write_table(folder / "responses.parquet", responses)
    write_json(folder / "programs.json", describe([]))
    record = {"model": {"run": run, "step": 2 if "/" in run else 0}, "notes": []}
    write_json(folder / "record.json", record | {"tasks": {"sciq": {"num_fewshot": 0}}})
    return folder


def report(folder: Path) -> dict[str, Any]:
    """Return the sentences of an invented study's page, and digests of a smaller one's figures.

    Figures of fewer methods and probes are faster.
    """
    made = ReportTables(**synthetic_tables.tables(never=("lora-r2",), diverged=("lora-r8",)))
    small: dict[str, Any] = {"ranks": (2,), "rates": (1e-3,), "epochs": 4, "old": ("facts",)}
    drawn = ReportTables(**synthetic_tables.tables(**small, tasks=synthetic_tables.TRAINING_TASKS))
    sentences, qualified = narrative(made)
    return {
        "answer": sentences,
        "qualified": qualified,
        "rule": summary.selection_rule(made),
        "summary": columns_of(summary.summary_frame(made)),
        "runs": len(summary.run_rows(made)),
        "figures": {
            name: text_digest(json.dumps(_plain(chart_spec(figure(drawn))), sort_keys=True))
            for name, figure in FIGURES.items()
        },
    }


def _plain(value: Any) -> Any:
    """Return a chart specification without the names that differ between runs."""
    if isinstance(value, dict):
        return {
            _plain(key): _plain(part)
            for key, part in value.items()
            if key not in ("$schema", "usermeta")
        }
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, str):
        return re.sub(r"^(data-[0-9a-f]{32}|(view|param|concat)_\d+.*)$", "named", value)
    return value


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def columns_of(table: pd.DataFrame) -> dict[str, list[Any]]:
    """Return the columns of a table as JSON values."""
    return {str(name): json.loads(table[name].to_json(orient="values")) for name in table}
