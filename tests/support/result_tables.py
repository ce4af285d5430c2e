"""Invented but realistic tables of a study, for the tests of the report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from forgetting.io import write_json, write_table
from forgetting.report.frames import ReportTables

METRICS = (
    "rougeL_recall",
    "rougeL_f1",
    "rouge1_recall",
    "generated_tokens",
    "probability",
    "normalised_probability",
    "truth_ratio_arithmetic",
    "truth_ratio_geometric",
)
TASKS = {
    "gsm8k": ("exact_match,strict-match", 0.0, 0.22),
    "humaneval": ("pass@1,create_test", 0.0, 0.31),
    "hellaswag": ("acc_norm,none", 0.25, 0.58),
    "winogrande": ("acc,none", 0.5, 0.64),
    "arc_challenge": ("acc_norm,none", 0.25, 0.44),
}
REFUSALS = {"refusals": ("refused", float("nan"), 0.64)}
THRESHOLD = 0.9

TRAINING_TASKS = ("hellaswag", "arc_challenge")


HOSTILE_TEXT = "</script><script>window.hostile = 1</script><img src=x onerror='window.hostile=2'>"


def report_tables(**options: Any) -> ReportTables:
    """Return the tables that `tables` makes with these options, as the report reads them."""
    return ReportTables(**tables(**options))


def tables(
    ranks: tuple[int, ...] = (2, 8, 32, 128),
    full: bool = True,
    seeds: tuple[int, ...] = (0,),
    rates: tuple[float, ...] = (5e-4, 1e-3, 5e-3),
    new: str = "new_authors",
    old: tuple[str, ...] = ("real_authors", "world_facts"),
    tasks: tuple[str, ...] = tuple(TASKS),
    never: tuple[str, ...] = (),
    diverged: tuple[str, ...] = (),
    epochs: int = 12,
) -> dict[str, Any]:
    """Return all tables of a study by name; methods in `never` stay below the threshold."""
    random = np.random.default_rng(7)
    methods = [(f"lora-r{rank}", "lora", rank, f"rank {rank}") for rank in ranks]
    methods += [("full", "full", None, "full")] if full else []
    runs = [_run("base", "base", "base", None, "base", np.nan, None, False, 0)]
    evaluations: list[dict[str, Any]] = []
    chosen: list[dict[str, Any]] = []
    probes = {new: "new", **dict.fromkeys(old, "old")}
    evaluations += _measured(
        "base", 0, probes, {name: 0.12 if name == new else 0.85 for name in probes}
    )
    for index, (method, kind, rank, label) in enumerate(methods):
        for rate_index, rate in enumerate(rates):
            for seed in seeds:
                run = f"{method}/seed{seed}/lr{rate:g}-wd0"
                best = rate_index == min(1, len(rates) - 1)
                speed = (0.30 + 0.35 * rate_index) * (0.9 + 0.05 * index) + 0.02 * seed
                speed = 0.08 if method in never else speed
                broken = method in diverged and rate_index == len(rates) - 1
                loss = 0.55 - 0.08 * index
                end = 4 if broken else epochs
                learnt = [_learnt(speed, epoch) for epoch in range(1, end + 1)]
                for epoch, value in enumerate(learnt, start=1):
                    values = {
                        name: value if name == new else _kept(value, loss, position, random)
                        for position, name in enumerate(probes)
                    }
                    evaluations += _measured(run, epoch, probes, values)
                above = [number for number, value in enumerate(learnt) if value >= THRESHOLD]
                step = 40 * above[0] if above and above[0] > 0 else None
                status = "diverged" if broken else "ok"
                row = _run(run, method, kind, rank, label, rate, seed, best, 40 * end)
                selected_step = step if best else None
                runs.append({**row, "status": status, "selected_step": selected_step})
                if best:
                    chosen.append(_chosen(method, seed, run, step))
    selected: list[tuple[Any, ...]] = [("base", "base", "base", None, 0)] + [
        (row["run"], row["method"], _label(row["method"]), row["seed"], row["step"])
        for row in chosen
        if row["step"] is not None
    ]
    scores = [
        _score(run, method, label, seed, step, task, random)
        for task in tasks
        for run, method, label, seed, step in selected
    ]
    columns = [*_score("", "", "", 0, 0, "gsm8k", random)]
    return {
        "runs": _integers(pd.DataFrame(runs), "rank", "seed", "selected_step"),
        "trajectory": pd.DataFrame(evaluations),
        "selection": _integers(pd.DataFrame(chosen), "step"),
        "comparisons": _comparisons(
            probes,
            [_label(row["method"]) for row in chosen if row["step"]],
            "methods" if len(seeds) > 1 else "models",
        ),
        **_matched(old, [_label(method) for method, *_ in methods], len(seeds)),
        "benchmarks": pd.DataFrame(scores, columns=columns),
        "benchmark_trajectory": _benchmark_trajectory(runs, TRAINING_TASKS)
        if set(TRAINING_TASKS) <= set(tasks)
        else pd.DataFrame(),
        "study": _study(new, seeds, tasks),
    }


def _benchmark_trajectory(runs: list[dict[str, Any]], tasks: Sequence[str]) -> pd.DataFrame:
    """Return benchmark scores at every other epoch, which fall from the base's."""
    rows = []
    for task in tasks:
        metric, chance, base = TASKS[task]
        for run in runs:
            for step in range(0, run["steps"] + 1, 80) if run["run"] != "base" else (0,):
                if step == 0 and run["run"] != "base":
                    continue
                value = max(base - step / 4000, 0.0)
                rows.append(
                    {
                        "run": run["run"],
                        "step": step,
                        "epoch": step / 40,
                        "task": task,
                        "metric": metric,
                        "value": value,
                        "low": max(value - 0.05, 0.0),
                        "high": min(value + 0.05, 1.0),
                        "n": 100,
                        "chance": chance,
                    }
                )
    return pd.DataFrame(rows)


def write(folder: Path, made: dict[str, Any]) -> Path:
    """Write the tables as the report expects them, and return the folder."""
    write_table(folder / "benchmark_trajectory.parquet", made["benchmark_trajectory"])
    names = ["runs", "trajectory", "selection", "comparisons", "benchmarks", "durations"]
    for name in [*names, "matched_differences", "matched_values"]:
        if name in made:
            write_table(folder / f"{name}.parquet", made[name])
    write_json(folder / "study.json", made["study"])
    return folder


def hostile_tables() -> dict[str, Any]:
    """Return a small study whose names and notes try to break out of the page."""
    made = tables(ranks=(2,), rates=(1e-3,), old=(f"old {HOSTILE_TEXT}",), epochs=5)
    for name in ("runs", "trajectory", "selection", "benchmarks"):
        made[name].loc[made[name]["run"] != "base", "run"] += HOSTILE_TEXT
    made["runs"].loc[made["runs"]["kind"] != "base", "label"] += HOSTILE_TEXT
    made["selection"]["reason"] = HOSTILE_TEXT
    made["study"]["study"].update(title=HOSTILE_TEXT, description=HOSTILE_TEXT, name=HOSTILE_TEXT)
    made["study"]["notes"] = [HOSTILE_TEXT]
    made["study"]["provenance"]["hardware"] = {HOSTILE_TEXT: HOSTILE_TEXT}
    return made


def _comparisons(probes: Any, labels: list[str], scope: str) -> pd.DataFrame:
    """Return comparisons in which every later method keeps 0.2 (0.1 to 0.3) more of the old.

    On new knowledge the methods do not differ.
    """
    columns = ["probe", "metric", "label", "other", "difference", "low", "high"]
    rows = [
        (probe, "rougeL_recall", label, other, *bounds, *bounds[1:], scope, 200)
        for probe, knowledge in probes.items()
        for bounds in [(-0.2, -0.3, -0.1) if knowledge == "old" else (0.01, -0.03, 0.05)]
        for label, other in combinations(dict.fromkeys(labels), 2)
    ]
    return pd.DataFrame(rows, columns=[*columns, "low_all", "high_all", "scope", "n"])


def _matched(old: Sequence[str], labels: Sequence[str], seeds: int) -> dict[str, pd.DataFrame]:
    """Return a comparison at matched learning in which every later method keeps 0.1 more."""
    shared = {"metric": "rougeL_recall", "range_low": 0.27, "range_high": 0.8}
    scope = {"scope": "methods" if seeds > 1 else "models", "seeds": seeds}
    values = [
        {**shared, **scope, "probe": probe, "label": label, "level": level, "value": value}
        | {"low": value - 0.05, "high": value + 0.05, "diverged": 0, "missing": 0}
        | {"reached": seeds - (number == 0 and level == 0.9)}
        for probe in old
        for level in (0.27, 0.8, 0.9, np.nan)
        for number, label in enumerate(labels)
        for value in [np.nan if level == 0.9 else 0.4 + 0.1 * number]
    ]
    differences = [
        {**shared, **scope, "probe": probe, "label": label, "other": other, "level": np.nan}
        | {"difference": -0.1, "low_all": -0.2, "high_all": 0.05}
        for probe in old
        for label, other in combinations(labels, 2)
    ]
    columns = ["probe", "metric", "level", "label", "other", "difference", "low_all", "high_all"]
    value_columns = [*shared, *scope, *columns[:4], "value", "low", "high", "diverged", "missing"]
    value_columns = list(dict.fromkeys([*value_columns, "reached"]))
    return {
        "matched_values": pd.DataFrame(values, columns=value_columns),
        "matched_differences": pd.DataFrame(differences, columns=columns),
    }


def _learnt(speed: float, epoch: int) -> float:
    return 0.12 + 0.86 * (1 - np.exp(-speed * epoch))


def _kept(learnt: float, loss: float, position: int, random: np.random.Generator) -> float:
    share = (learnt - 0.12) / 0.86
    return float(np.clip(0.85 - loss * share**3 / position + random.normal(0, 0.008), 0, 1))


def _label(method: str) -> str:
    return method.replace("lora-r", "rank ")


def _run(
    run: str,
    method: str,
    kind: str,
    rank: int | None,
    label: str,
    rate: float,
    seed: int | None,
    chosen: bool,
    steps: int,
) -> dict[str, Any]:
    return {
        "run": run,
        "method": method,
        "kind": kind,
        "rank": rank,
        "label": label,
        "learning_rate": rate,
        "weight_decay": 0.0,
        "seed": seed,
        "status": "ok",
        "chosen": chosen,
        "selected_step": None,
        "steps": steps,
        "epochs": steps / 40,
        "trainable_parameters": 3_600_000 if rank is None else 24_000 * rank,
        "seconds": 8.5,
        "tokens_per_second": 15_200.0,
        "peak_memory_gib": 1.2,
    }


def _measured(
    run: str, epoch: int, probes: dict[str, str], rouge: dict[str, float]
) -> list[dict[str, Any]]:
    rows = []
    for name, knowledge in probes.items():
        for metric in METRICS:
            value = rouge[name]
            if metric.startswith("truth_ratio"):
                value *= 0.6 if metric.endswith("arithmetic") else 0.7
            value = 14.0 if metric == "generated_tokens" else value
            half = 1.96 * np.sqrt(value * (1 - value) / 400) if value < 1 else 0.4
            rows.append(
                {
                    "run": run,
                    "step": 40 * epoch,
                    "epoch": float(epoch),
                    "tokens": 30_000 * epoch,
                    "probe": name,
                    "knowledge": knowledge,
                    "metric": metric,
                    "value": value,
                    "low": max(value - half, 0.0),
                    "change_low": -half,
                    "change_high": half,
                    "high": value + half if metric == "generated_tokens" else min(value + half, 1),
                    "n": 200,
                }
            )
    divergence = 0.02 * epoch**1.5 * (1.5 - rouge[next(reversed(probes))])
    text = rows[0] | {"probe": "general_text", "knowledge": "text", "metric": "forgetting_kl"}
    return [*rows, text | {"value": divergence, "low": 0.9 * divergence, "high": 1.1 * divergence}]


def _chosen(method: str, seed: int, run: str, step: int | None) -> dict[str, Any]:
    reason = (
        f"the last evaluation before ROUGE reached {THRESHOLD}"
        if step is not None
        else f"ROUGE never reached {THRESHOLD}"
    )
    return {
        "method": method,
        "seed": seed,
        "run": run,
        "step": step,
        "epoch": np.nan if step is None else step / 40,
        "status": "not_reached" if step is None else "selected",
        "reason": reason,
    }


def _score(
    run: str,
    method: str,
    label: str,
    seed: int | None,
    step: int,
    task: str,
    random: np.random.Generator,
) -> dict[str, Any]:
    metric, chance, base = (TASKS | REFUSALS)[task]
    value = base if method == "base" else float(np.clip(base - random.uniform(0, 0.1), 0, 1))
    error = float(np.sqrt(value * (1 - value) / 200))
    return {
        "run": run,
        "method": method,
        "label": label,
        "seed": seed,
        "step": step,
        "task": task,
        "metric": metric,
        "main": True,
        "value": value,
        "stderr": error,
        "low": max(value - 1.96 * error, 0.0),
        "high": min(value + 1.96 * error, 1.0),
        "n": 200,
        "chance": chance,
        "num_fewshot": 0 if task == "humaneval" else 5,
        "status": "ok",
    }


def _integers(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    return table.astype(dict.fromkeys(columns, "Int64"))


def _study(new: str, seeds: tuple[int, ...], tasks: tuple[str, ...]) -> dict[str, Any]:
    return {
        "study": {
            "name": "mini",
            "title": "What a small model forgets while it learns new authors",
            "description": "A micro-world of facts, invented authors, and five ways to tune.",
            "seeds": list(seeds),
            "selection": {
                "probe": new,
                "metric": "rougeL_recall",
                "threshold": THRESHOLD,
                "hyperparameters": "earliest",
                "if_not_reached": "none",
            },
            "general_text": {"table": "world/held_out"},
            "benchmarks": {
                "tasks": {task: {"num_fewshot": None} for task in tasks},
                "during_training": {
                    task: 100 for task in TRAINING_TASKS if set(TRAINING_TASKS) <= set(tasks)
                },
            },
        },
        "provenance": {
            "created": "2026-01-02T03:04:05Z",
            "code_revision": "0123456789abcdef",
            "packages": {"torch": "2.13.0", "transformers": "5.0.0"},
            "hardware": {
                "processor": ["Made CPU 9000"],
                "cores": [2],
                "threads": [1],
                "device": ["CPU, 1 of 2 threads"],
                "precision": ["float32"],
            },
            "data": {"train.jsonl": {"sha256": "ab" * 32, "rows": 400, "origin": "micro-world"}},
            "base": {"parameters": 3_600_000},
            "seconds": {"train": 61.2},
        },
        "notes": ["One seed: nothing is known about the spread between seeds."],
    }
