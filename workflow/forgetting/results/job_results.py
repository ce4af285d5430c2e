"""Results of all jobs of a study, the tables that are made of them, and their provenance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from forgetting.analysis.comparisons import compare_methods
from forgetting.analysis.durations import duration_table
from forgetting.analysis.fronts import front_tables
from forgetting.analysis.laws import law_points, law_tables
from forgetting.analysis.matched_learning import compare_at_matched_learning
from forgetting.config.evaluation import TEXT_PROBE
from forgetting.config.expand import (
    duration_name,
    expand_methods,
    law_methods,
    scored_models,
    selected_models,
)
from forgetting.config.study import StudyConfig
from forgetting.evaluation.rouge import length_notes
from forgetting.io import read_json, read_table
from forgetting.results.build_tables import (
    BASE,
    benchmark_tables,
    caveats,
    chosen_runs,
    in_study_order,
    main_metric_items,
    responses_table,
    runs_table,
)
from forgetting.results.churn import churn_table
from forgetting.results.trajectories import (
    benchmark_trajectory_items,
    benchmark_trajectory_table,
    trajectory_table,
)
from forgetting.system import code_revision
from forgetting.versions import VERSIONS, stage_versions


@dataclass(frozen=True)
class JobResults:
    """The results of all jobs of a study.

    Records and items belong to the runs that are results: those of the run groups, or the cooldown
    branches of their trunks.

    Attributes:
        base: record of the base.
        data_notes: notes of the job that prepared the data.
        records: of all runs.
        trunks: records of the trunks, in a study with durations.
        selection: a row for each method and seed.
        base_items: scores of the base on every probe.
        base_scored: device and precision of these scores.
        items: scores of the runs on every probe, a table for each job.
        models: folders of the benchmarks of every scored model.
        training_benchmarks: items of the base, then of the runs; empty without such benchmarks.
        wise_ft: scores with shares of the update, a table for each selected checkpoint.
    """

    base: dict[str, Any]
    data_notes: list[str]
    records: list[dict[str, Any]]
    trunks: list[dict[str, Any]]
    selection: pd.DataFrame
    base_items: pd.DataFrame
    base_scored: dict[str, Any]
    items: list[pd.DataFrame]
    models: list[Path]
    training_benchmarks: list[pd.DataFrame]
    wise_ft: list[pd.DataFrame]


def read_job_results(study: StudyConfig, results: Path) -> JobResults:
    """Read the results of all jobs except the tables of benchmarks, which may be large.

    Args:
        study: whose results are read.
        results: folder of the study's results.
    """
    methods = expand_methods(study)
    durations = [duration_name(duration) for duration in study.training.durations]
    trained = [
        results / "runs" / method.name / f"seed{seed}" for method in methods for seed in study.seeds
    ]
    branches = [
        results / "branches" / folder.parent.name / folder.name / duration
        for folder in trained
        for duration in durations
    ]

    def read_items(table: str, folders: list[Path]) -> list[pd.DataFrame]:
        frames = [read_table(folder / f"{table}.parquet") for folder in folders]
        return in_study_order(frames, methods, study.seeds)

    training_benchmarks = []
    if study.benchmarks.during_training:
        base_benchmarks = read_table(results / "base" / "benchmarks.parquet")
        training_benchmarks = [base_benchmarks, *read_items("benchmarks", trained)]
    base_items = read_table(results / "base" / "items.parquet")
    return JobResults(
        base=read_json(results / "base" / "base.json"),
        data_notes=read_json(results / "data" / "data.json")["notes"],
        records=_read_records(branches or trained),
        trunks=_read_records(trained) if branches else [],
        selection=_read_selection([results / "selection" / f"{m.name}.json" for m in methods]),
        base_scored=base_items.attrs.pop("computed"),
        base_items=base_items,
        items=read_items("items", branches or trained),
        models=[results / "benchmarks" / model for model in scored_models(study)],
        training_benchmarks=training_benchmarks,
        wise_ft=[
            read_table(results / "wise_ft" / model / "items.parquet")
            for model in (selected_models(study) if study.selection.wise_ft else [])
        ],
    )


def _read_records(folders: list[Path]) -> list[dict[str, Any]]:
    """Return the records of all runs of several jobs."""
    return [record for folder in folders for record in read_json(folder / "runs.json")]


def _read_selection(files: list[Path]) -> pd.DataFrame:
    """Return the selections of all methods, without the files of the checkpoints."""
    table = pd.DataFrame([row for file in files for row in read_json(file)])
    table = table.drop(columns=["files", "checkpoint", "checkpoints", "ends"], errors="ignore")
    return table.astype({"step": "Int64", "epoch": "float", "value": "float"})


def tables_of(study: StudyConfig, found: JobResults) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Return every table by its name, and notes on what the report cannot show."""
    methods, durations = expand_methods(study), study.training.durations
    runs = runs_table(methods, study.seeds, found.records, found.selection, durations)
    knowledge: dict[str, str] = {name: probe.knowledge for name, probe in study.probes.items()}
    knowledge |= {TEXT_PROBE: "text"}
    labels = {
        row["run"]: {key: row[key] for key in ("method", "label", "seed")}
        for row in runs.to_dict("records")
    }
    benchmarks, scored, missing = benchmark_tables(found.models, labels | {"base": BASE})
    responses = responses_table(found.models)
    trajectories = (
        benchmark_trajectory_items(*found.training_benchmarks)
        if found.training_benchmarks
        else None
    )
    main_items = main_metric_items(benchmarks, scored)
    every = pd.concat([found.base_items.assign(run="base", step=0, epoch=0.0), *found.items])
    old = [name for name, kind in knowledge.items() if kind != "new"]
    matched = compare_at_matched_learning(
        every, chosen_runs(runs, found.selection), study.selection, old
    )
    comparisons = compare_methods(every, main_items, found.selection)
    tables = {
        "runs": runs,
        "trajectory": trajectory_table(found.base_items, found.items, found.records, knowledge),
        "items": every,
        "selection": found.selection,
        "comparisons": comparisons,
        "matched_differences": matched[0],
        "matched_values": matched[1],
        **front_tables(every, runs, found.selection, comparisons, knowledge),
        "churn": churn_table(every, responses, main_items, trajectories),
        "benchmarks": benchmarks,
        "benchmark_items": scored,
        "benchmark_responses": responses,
    }
    if trajectories is not None:
        tables["benchmark_trajectory"] = benchmark_trajectory_table(
            trajectories, benchmarks, found.records
        )
        tables["benchmark_trajectory_items"] = trajectories
    if durations:
        tables["durations"] = duration_table(benchmarks, runs)
    if study.selection.wise_ft:
        tables["wise_ft"] = pd.concat(found.wise_ft)
    law_notes: list[str] = []
    if names := [method.name for method in law_methods(study)]:
        laws, law_notes = law_tables(law_points(every, runs, names, study.selection.probe))
        tables |= laws
    notes = [
        *found.data_notes,
        *caveats(found.selection, found.records, study.seeds, durations),
        *length_notes(found.base_items, study.evaluation.max_new_tokens),
        *missing,
        *law_notes,
    ]
    return tables, notes


def provenance(results: Path, found: JobResults) -> dict[str, Any]:
    """Return what is needed to know where the numbers come from, and to reproduce them."""
    records = found.records
    data = read_json(results / "data" / "data.json")
    generated = [folder for folder in found.models if read_json(folder / "programs.json")["items"]]
    executed = [read_json(folder / "outcomes.json") for folder in generated]
    computed = [found.base_scored, *records, *found.trunks]
    computed += [found.base] if "device" in found.base else []
    computed += [read_json(folder / "record.json") for folder in found.models]
    return {
        "code_revision": code_revision(),
        # Results of another commit are kept while the versions of their stages are equal.
        "code_revision_of_runs": ", ".join(
            sorted({record["machine"].get("code_revision", "unknown") for record in records})
        ),
        "stage_versions": stage_versions(*VERSIONS),
        "packages": {
            name: ", ".join(sorted({record["machine"]["packages"][name] for record in records}))
            for name in records[0]["machine"]["packages"]
        },
        "python": ", ".join(sorted({record["machine"]["python"] for record in records})),
        "hardware": {
            **{
                key: sorted({record["machine"][key] for record in computed})
                for key in ("processor", "cores", "threads")
            },
            **{
                key: sorted({record[key] for record in computed}) for key in ("device", "precision")
            },
            "sandbox": sorted({each["sandbox"] or each["why"] for each in executed}),
        },
        "data": {
            table: {"sha256": origin["sha256"], "origin": origin["path"]}
            for table, origin in data["tables"].items()
        },
        "rows": data["rows"],
        "base": {
            key: value for key, value in found.base.items() if key not in ("files", "machine")
        },
        "seconds": {
            "pretraining": found.base.get("seconds", 0.0),
            "training": sum(record["training_seconds"] for record in records + found.trunks),
            "training and measuring": sum(
                record["wall_seconds"] for record in records + found.trunks
            ),
        },
    }
