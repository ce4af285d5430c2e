"""Bring the results of all jobs of a study together in tidy tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from forgetting.analysis.intervals import t_interval, wilson_interval
from forgetting.benchmarks.programs import read_outcomes, read_programs, read_rates
from forgetting.benchmarks.scores import FAILING, PASSING, program_items, score_programs
from forgetting.config.expand import Method, run_name
from forgetting.io import read_json, read_table
from forgetting.results.churn import bounded_metrics
from forgetting.results.trajectories import aggregate_items

BASE: dict[str, Any] = {"run": "base", "method": "base", "label": "base"}


def in_study_order(
    frames: Iterable[pd.DataFrame], methods: Sequence[Method], seeds: Sequence[int]
) -> list[pd.DataFrame]:
    """The items of jobs, run by run in the order of the study, however many a job has trained."""
    run_groups = [f"{tuning.name}/seed{seed}" for tuning, seed in product(methods, seeds)]
    runs, empty = [], []
    for frame in frames:
        if frame.empty:  # of runs that all diverged: it may have no columns
            empty.append(frame)
            continue
        runs += [(str(run), items) for run, items in frame.groupby("run", sort=False)]
    places = {run_group: place for place, run_group in enumerate(run_groups)}
    runs.sort(key=lambda pair: places["/".join(pair[0].split("/")[:2])])
    return [items for _, items in runs] + empty


def trajectory_table(
    base_items: pd.DataFrame,
    run_group_items: Sequence[pd.DataFrame],
    records: Sequence[Mapping[str, Any]],
    knowledge: Mapping[str, str],
) -> pd.DataFrame:
    """Run, step, epoch, tokens, then the columns of `trajectory.aggregate`; the base is step 0.

    `tokens` is no count: it is the step times the mean number of tokens of the run's steps.
    """
    parts = [aggregate_items(base_items, knowledge).assign(run="base", step=0, epoch=0.0, tokens=0)]
    # Tokens are counted for a whole run only.
    per_step = {r["run"]: r["tokens"] / max(r["steps"], 1) for r in records}
    for items in run_group_items:
        if items.empty:
            continue
        for (run, step, epoch), group in items.groupby(["run", "step", "epoch"], sort=False):
            tokens = round(per_step[str(run)] * int(step))
            parts.append(
                aggregate_items(group, knowledge, base_items).assign(
                    run=run, step=step, epoch=epoch, tokens=tokens
                )
            )
    table = pd.concat(parts, ignore_index=True)
    first = ["run", "step", "epoch", "tokens"]
    return table[[*first, *(name for name in table.columns if name not in first)]]


def runs_table(
    base: Mapping[str, Any],
    tunings: Sequence[Method],
    seeds: Sequence[int],
    records: Sequence[Mapping[str, Any]],
    selection: pd.DataFrame,
    durations: Sequence[float] = (),
) -> pd.DataFrame:
    """One row per run, the base first: hyper-parameters, status, choice, cost.

    With durations each branch is a run, which began with the steps of its trunk. The seconds of
    runs that were trained together are even shares of what all of them took.
    """
    chosen = {row["run"]: row["step"] for row in selection.to_dict("records") if row["run"]}
    by_run = {record["run"]: record for record in records}
    rows: list[dict[str, Any]] = [
        BASE | {"kind": "base", "status": "ok", "chosen": False, "steps": 0, "epochs": 0.0}
    ]
    for tuning, seed in product(tunings, seeds):
        for setting, duration in product(tuning.hyperparameters, durations or (None,)):
            record = by_run[run_name(tuning.name, seed, setting, duration)]
            rows.append(
                {
                    "run": record["run"],
                    "method": tuning.name,
                    "kind": tuning.kind,
                    "rank": tuning.rank,
                    "label": tuning.label,
                    "learning_rate": setting.learning_rate,
                    "weight_decay": setting.weight_decay,
                    "seed": seed,
                    "duration": duration,
                    "status": record["status"],
                    "chosen": record["run"] in chosen,
                    "selected_step": chosen.get(record["run"]),
                    "steps": record["steps"],
                    "epochs": record["steps"] / record["steps_per_epoch"],
                    "tokens": record["tokens"],
                    "trainable_parameters": record["trainable_parameters"],
                    "seconds": record["wall_seconds"],
                    "tokens_per_second": record["tokens_per_second"],
                    "trained_together": record["trained_together"],
                    "peak_memory_gib": record["peak_memory_gib"],
                }
            )
    table = pd.DataFrame(rows)
    integers = ["rank", "seed", "selected_step", "steps", "tokens", "trainable_parameters"]
    integers += ["trained_together"]
    return table.astype(dict.fromkeys(integers, "Int64") | {"duration": "float"})


def benchmark_tables(
    models: Sequence[Path], labels: Mapping[str, Mapping[str, Any]]
) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Scores with 95 % intervals over items, the items themselves, and notes on what is missing.

    Args:
        models: result folders of the base and of every selected checkpoint.
        labels: method, label and seed of each run.
    """
    scores, items, notes = [], [], []
    for folder in models:
        record = read_json(folder / "record.json")
        place = _run_columns(record)
        who: dict[str, Any] = {**labels.get(place["run"] or "", {}), **place}
        name = who["run"] or folder.parent.name
        notes += [f"{name}: {note}" for note in record["notes"]]
        score = read_table(folder / "scores.parquet")
        item = read_table(folder / "items.parquet")
        programs = read_json(folder / "programs.json")
        if programs["items"]:
            more, note = _program_tables(folder, programs)
            if more is None:
                notes.append(note)
            else:
                score = pd.concat([score, more[0]], ignore_index=True)
                item = pd.concat([item, more[1]], ignore_index=True)
                notes += [note] if note else []
        shots = {task: about["num_fewshot"] for task, about in record["tasks"].items()}
        examples = score["task"].map(shots).astype("Int64")
        scores.append(score.assign(num_fewshot=examples, **who))
        items.append(item.assign(**place))
    table = pd.concat(scores, ignore_index=True) if scores else pd.DataFrame()
    every = pd.concat(items, ignore_index=True) if items else pd.DataFrame()
    return _with_intervals(table, every), every, list(dict.fromkeys(notes))


def _run_columns(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of which run, at which step, a model was benchmarked."""
    return {key: record["model"][key] for key in ("run", "step")}


def responses_table(models: Sequence[Path]) -> pd.DataFrame:
    """Run, step, task, item and response of every benchmark of every model."""
    tables = [
        read_table(folder / "responses.parquet").assign(
            **_run_columns(read_json(folder / "record.json"))
        )
        for folder in models
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def main_metric_items(scores: pd.DataFrame, items: pd.DataFrame) -> pd.DataFrame:
    """The items of each benchmark's main metric, where that can be compared answer by answer.

    Of several drawn answers to an item none is the model's.
    """
    if items.empty:
        return items
    drawn = scores[scores["metric"].str.startswith(PASSING)]["task"]
    main = scores[scores["main"].astype(bool)][["task", "metric"]].drop_duplicates()
    main = main[~main["task"].isin(drawn)]
    return bounded_metrics(items).merge(main, on=["task", "metric"])


def _program_tables(
    folder: Path, described: dict[str, Any]
) -> tuple[tuple[pd.DataFrame, pd.DataFrame] | None, str]:
    programs, rates = read_programs(described), read_rates(described)
    executed = read_outcomes(folder / "outcomes.json", programs)
    tasks = ", ".join(sorted({item["task"] for item in described["items"]}))
    if executed.sandbox is None:
        return None, (
            f"{tasks} is not scored, for want of a sandbox: {executed.why}. Make bubblewrap "
            "work where the jobs run, and run the study again (if nothing is to be done then, with "
            "--forcerun run_programs); or set `benchmarks.sandbox: none`, and what the model "
            "wrote can read and delete your files and use the network"
        )
    outcomes = executed.outcomes
    unsafe = executed.sandbox.startswith("none")
    note = f"{tasks} was executed without a sandbox: {executed.why}" if unsafe else ""
    tables = score_programs(programs, outcomes, rates), program_items(programs, outcomes, rates)
    return tables, note


def _with_intervals(scores: pd.DataFrame, items: pd.DataFrame) -> pd.DataFrame:
    """Add low and high, the 95 % interval over the items of each score."""
    if scores.empty:
        columns = ["run", "step", "method", "label", "seed", "task", "metric", "main", "value"]
        more = ["stderr", "low", "high", "n", "chance", "num_fewshot"]
        return pd.DataFrame(columns=[*columns, *more])
    values = {
        key: group["value"].astype(float).tolist()
        for key, group in items.groupby(["run", "task", "metric"], sort=False)
    }
    bounds = [
        _interval(row, values.get((row["run"], row["task"], row["metric"])))
        for row in scores.to_dict("records")
    ]
    return scores.assign(low=[low for low, _ in bounds], high=[high for _, high in bounds])


def _interval(row: Mapping[Any, Any], values: list[float] | None) -> tuple[float, float]:
    """Of shares of right answers Wilson's; of other means over items Student's; of what is no
    mean, such as a perplexity, 1.96 of the harness's standard errors."""
    if values and math.isclose(float(np.mean(values)), row["value"]):
        counts = str(row["metric"]).startswith((PASSING, FAILING))
        if not counts and min(values) >= 0.0 and max(values) <= 1.0:
            return wilson_interval(values)
        low, high = t_interval(values)
        return (max(low, 0.0) if counts else low), high
    return row["value"] - 1.96 * row["stderr"], row["value"] + 1.96 * row["stderr"]


def _sweep_edge_notes(selection: pd.DataFrame, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Methods whose chosen learning rate lies at the end of what was tried."""
    rates: dict[str, set[float]] = {}
    for record in records:
        method = record["run"].split("/")[0]
        rates.setdefault(method, set()).add(record["hyperparameters"]["learning_rate"])
    chosen = {record["run"]: record["hyperparameters"]["learning_rate"] for record in records}
    edge = [
        row["label"]
        for row in selection.drop_duplicates("method").to_dict("records")
        if row["run"]
        and len(tried := rates[row["method"]]) > 1
        and chosen[row["run"]] in (min(tried), max(tried))
    ]
    if not edge:
        return []
    return [
        "The chosen learning rate is the smallest or largest of those tried for "
        f"{', '.join(edge)}: a wider sweep may choose another."
    ]


def caveats(
    selection: pd.DataFrame,
    records: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    durations: Sequence[float] = (),
) -> list[str]:
    """What the report cannot say, in plain sentences."""
    notes = []
    if durations:
        notes.append(
            "Every point of a trajectory is the end of a training of that length, in which the "
            "learning rate has fallen to its end: "
            f"{', '.join(f'{duration:g}' for duration in sorted(durations))} epochs."
        )
    if len(seeds) == 1:
        notes.append(
            "One seed: the intervals cover the choice of questions, not that of the seed; "
            "differences between methods of the size of run-to-run noise are not evidence."
        )
    for row in selection.to_dict("records"):
        if row["status"] != "selected":
            notes.append(f"{row['label']}, seed {row['seed']}: {row['reason']}.")
    notes += _sweep_edge_notes(selection, records)
    cut = max((record["cut_rows"] for record in records), default=0)
    if cut:
        notes.append(
            f"{cut} training answers are longer than training.max_length and were cut, without an "
            "end of sequence."
        )
    diverged = [record["run"] for record in records if record["status"] == "diverged"]
    if diverged:
        notes.append(f"Diverged, and kept as such: {', '.join(diverged)}.")
    return notes
