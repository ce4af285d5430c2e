"""Build the tables of runs and benchmarks from the records of all jobs of a study."""

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
from forgetting.config.expand import Method, method_of, run_name
from forgetting.io import read_json, read_table
from forgetting.results.churn import bounded_metrics

BASE: dict[str, Any] = {"run": "base", "method": "base", "label": "base"}


def in_study_order(
    frames: Iterable[pd.DataFrame], methods: Sequence[Method], seeds: Sequence[int]
) -> list[pd.DataFrame]:
    """Return the items of each run, in the order of the study's methods and seeds.

    Args:
        frames: the items of jobs, each with the items of one run or several.
        methods: the methods of the study.
        seeds: the seeds of the study.
    """
    names = [f"{method.name}/seed{seed}" for method, seed in product(methods, seeds)]
    position = {name: index for index, name in enumerate(names)}
    runs, empty = [], []
    for frame in frames:
        if frame.empty:  # all runs of the job diverged: there may be no columns
            empty.append(frame)
            continue
        runs += [(str(run), items) for run, items in frame.groupby("run", sort=False)]
    runs.sort(key=lambda pair: position["/".join(pair[0].split("/")[:2])])
    return [items for _, items in runs] + empty


def runs_table(
    methods: Sequence[Method],
    seeds: Sequence[int],
    records: Sequence[Mapping[str, Any]],
    selection: pd.DataFrame,
    durations: Sequence[float] = (),
) -> pd.DataFrame:
    """Return one row per run, the base first: hyperparameters, status, choice and cost.

    With several durations each cooldown branch is a run, whose steps include those of its trunk.
    Batched runs share the seconds evenly.
    """
    chosen = {row["run"]: row["step"] for row in selection.to_dict("records") if row["run"]}
    by_run = {record["run"]: record for record in records}
    rows: list[dict[str, Any]] = [
        BASE | {"kind": "base", "status": "ok", "chosen": False, "steps": 0, "epochs": 0.0}
    ]
    for method, seed in product(methods, seeds):
        for hyperparameters, duration in product(method.hyperparameters, durations or (None,)):
            record = by_run[run_name(method.name, seed, hyperparameters, duration)]
            rows.append(
                {
                    "run": record["run"],
                    "method": method.name,
                    "kind": method.kind,
                    "rank": method.rank,
                    "label": method.label,
                    "learning_rate": hyperparameters.learning_rate,
                    "weight_decay": hyperparameters.weight_decay,
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
                    "batched_runs": record["batched_runs"],
                    "peak_memory_gib": record["peak_memory_gib"],
                }
            )
    table = pd.DataFrame(rows)
    integers = ["rank", "seed", "selected_step", "steps", "tokens", "trainable_parameters"]
    integers += ["batched_runs"]
    return table.astype(dict.fromkeys(integers, "Int64") | {"duration": "float"})


def chosen_runs(runs: pd.DataFrame, selection: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of the chosen hyperparameters of every method and seed.

    Args:
        runs: the table of runs.
        selection: a row for each method and seed.

    Returns:
        label, seed, run (missing if no hyperparameters are chosen), status, and the last step as
        `end` of a cooldown branch. With several durations every branch has a row.
    """
    setting = ["label", "seed", "learning_rate", "weight_decay"]
    chosen = runs[runs["chosen"].astype(bool)][setting].drop_duplicates()
    found = runs.merge(chosen, on=setting)
    found["end"] = found["steps"].astype(float).where(found["duration"].notna())
    every = selection[["label", "seed"]].astype({"seed": "Int64"})
    return every.merge(found[["label", "seed", "run", "status", "end"]], how="left")


def benchmark_tables(
    models: Sequence[Path], labels: Mapping[str, Mapping[str, Any]]
) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Return scores with 95 % intervals over items, the items, and notes on missing scores.

    Args:
        models: result folders of the base and of every selected checkpoint.
        labels: method, label and seed of each run.
    """
    scores, items, notes = [], [], []
    for folder in models:
        record = read_json(folder / "record.json")
        run_columns = _run_columns(record)
        model_columns = {**labels.get(run_columns["run"] or "", {}), **run_columns}
        name = model_columns["run"] or folder.parent.name
        notes += [f"{name}: {note}" for note in record["notes"]]
        model_scores = read_table(folder / "scores.parquet")
        model_items = read_table(folder / "items.parquet")
        programs = read_json(folder / "programs.json")
        if programs["items"]:
            executed, note = _program_tables(folder, programs)
            notes += [note] if note else []
            if executed is not None:
                model_scores = pd.concat([model_scores, executed[0]], ignore_index=True)
                model_items = pd.concat([model_items, executed[1]], ignore_index=True)
        shots = {task: settings["num_fewshot"] for task, settings in record["tasks"].items()}
        num_fewshot = model_scores["task"].map(shots).astype("Int64")
        scores.append(model_scores.assign(num_fewshot=num_fewshot, **model_columns))
        items.append(model_items.assign(**run_columns))
    all_scores = pd.concat(scores, ignore_index=True) if scores else pd.DataFrame()
    all_items = pd.concat(items, ignore_index=True) if items else pd.DataFrame()
    return _with_intervals(all_scores, all_items), all_items, list(dict.fromkeys(notes))


def _run_columns(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run and the step of a benchmarked model."""
    return {key: record["model"][key] for key in ("run", "step")}


def responses_table(models: Sequence[Path]) -> pd.DataFrame:
    """Return run, step, task, item and response of every benchmark of every model."""
    tables = [
        read_table(folder / "responses.parquet").assign(
            **_run_columns(read_json(folder / "record.json"))
        )
        for folder in models
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def main_metric_items(scores: pd.DataFrame, items: pd.DataFrame) -> pd.DataFrame:
    """Return the items of each benchmark's main metric, where one answer can be compared.

    Tasks with several sampled answers to an item are left out: none of them is the model's answer.
    """
    if items.empty:
        return items
    sampled = scores[scores["metric"].str.startswith(PASSING)]["task"]
    main = scores[scores["main"].astype(bool)][["task", "metric"]].drop_duplicates()
    main = main[~main["task"].isin(sampled)]
    return bounded_metrics(items).merge(main, on=["task", "metric"])


def _program_tables(
    folder: Path, described: dict[str, Any]
) -> tuple[tuple[pd.DataFrame, pd.DataFrame] | None, str]:
    """Return scores and items of generated programs (None if they were not run), and a note."""
    programs, rates = read_programs(described), read_rates(described)
    executed = read_outcomes(folder / "outcomes.json", programs)
    tasks = ", ".join(sorted({item["task"] for item in described["items"]}))
    if executed.sandbox is None:
        return None, (
            f"{tasks} is not scored, because there is no sandbox: {executed.why}. Make bubblewrap "
            "work where the jobs run, and run the study again (if Snakemake then finds nothing to "
            "do, with --forcerun run_programs). Or set `benchmarks.sandbox: none`; the model's "
            "programs can then read and delete your files and use the network"
        )
    outcomes = executed.outcomes
    is_unsafe = executed.sandbox.startswith("none")
    note = f"{tasks} was executed without a sandbox: {executed.why}" if is_unsafe else ""
    tables = score_programs(programs, outcomes, rates), program_items(programs, outcomes, rates)
    return tables, note


def _with_intervals(scores: pd.DataFrame, items: pd.DataFrame) -> pd.DataFrame:
    """Return the scores with low and high, the 95 % interval over the items of each."""
    if scores.empty:
        columns = ["run", "step", "method", "label", "seed", "task", "metric", "main", "value"]
        columns += ["stderr", "low", "high", "n", "chance", "num_fewshot"]
        return pd.DataFrame(columns=columns)
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
    """Return the interval that suits a score.

    Wilson's for means of values in [0, 1], Student's for other means over items. A score that is no
    mean over items, such as a perplexity, has 1.96 of the harness's standard errors.
    """
    if values and math.isclose(float(np.mean(values)), row["value"]):
        is_count = str(row["metric"]).startswith((PASSING, FAILING))
        if not is_count and min(values) >= 0.0 and max(values) <= 1.0:
            return wilson_interval(values)
        low, high = t_interval(values)
        return (max(low, 0.0) if is_count else low), high
    return row["value"] - 1.96 * row["stderr"], row["value"] + 1.96 * row["stderr"]


def caveats(
    selection: pd.DataFrame,
    records: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    durations: Sequence[float] = (),
) -> list[str]:
    """Return sentences on what the results do not show."""
    notes = []
    if durations:
        lengths = ", ".join(f"{duration:g}" for duration in sorted(durations))
        notes.append(
            "Every point of a trajectory is the end of a training of its own duration, after the "
            f"decay of the learning rate: {lengths} epochs."
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
            f"{cut} training answers are longer than training.max_length. They were cut and have "
            "no end of sequence."
        )
    diverged = [record["run"] for record in records if record["status"] == "diverged"]
    if diverged:
        notes.append(f"Runs that diverged: {', '.join(diverged)}.")
    return notes


def _sweep_edge_notes(selection: pd.DataFrame, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a note on the methods whose chosen learning rate is at an edge of the sweep."""
    rate_of = {record["run"]: record["hyperparameters"]["learning_rate"] for record in records}
    rates: dict[str, set[float]] = {}
    for run, rate in rate_of.items():
        rates.setdefault(method_of(run), set()).add(rate)
    at_edge = [
        row["label"]
        for row in selection.drop_duplicates("method").to_dict("records")
        if row["run"]
        and len(tried := rates[row["method"]]) > 1
        and rate_of[row["run"]] in (min(tried), max(tried))
    ]
    if not at_edge:
        return []
    return [
        "The chosen learning rate is the smallest or largest of those tried for "
        f"{', '.join(at_edge)}: a wider sweep may choose another."
    ]
