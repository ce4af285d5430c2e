"""Gather the results of all jobs of the study in the tables that the report reads."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from forgetting.analysis.comparisons import compare_methods
from forgetting.config.evaluation import TEXT_PROBE
from forgetting.config.expand import duration_name, expand_methods, scored_models, selected_models
from forgetting.config.study import StudyConfig
from forgetting.errors import reports_input_errors
from forgetting.evaluation.rouge import length_notes
from forgetting.io import (
    read_json,
    read_table,
    write_atomically,
    write_json,
    write_table,
)
from forgetting.pipeline.params import MakeTablesParams
from forgetting.pipeline.resources.forecast import forecast_against_measured
from forgetting.results.build_tables import (
    BASE,
    benchmark_tables,
    caveats,
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


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write runs, trajectory, items, selection, benchmarks (parquet), and study.json twice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True, help="parameters (JSON)")
    parser.add_argument("--results", type=Path, required=True, help="folder of the results")
    parser.add_argument("--output", type=Path, required=True, help="folder of the tables")
    options = parser.parse_args(argv)
    params = MakeTablesParams.read(options.params)
    name, study = params.name, params.study
    models = scored_models(study)
    found = read_found(study, options.results, models)
    tables, notes = tables_of(study, found)
    if study.selection.wise_ft:
        folder = options.results / "wise_ft"
        scaled = [folder / model / "items.parquet" for model in selected_models(study)]
        tables["wise_ft"] = pd.concat(map(read_table, scaled))

    write_atomically(options.results / "study.json", study.model_dump_json(indent=2) + "\n")
    for title, table in tables.items():
        write_table(options.output / f"{title}.parquet", table)
    write_json(options.output / "runs.json", found.records)
    write_json(
        options.output / "study.json",
        {
            "study": {"name": name, **study.model_dump(mode="json")},
            "provenance": provenance(options.results, found, models),
            "forecast": forecast_against_measured(study, found.trunks or found.records),
            "notes": notes,
        },
    )
    scored = len(tables["items"])
    print(f"{len(tables['runs']) - 1} runs, {scored:,} scored answers: {options.output}")


@dataclass(frozen=True)
class Found:
    """What the jobs of a study left behind.

    Records and items are of the runs that are results: of the run groups, or of the branches of
    their trunks, which are what the runs have in common then.
    """

    base: dict[str, Any]
    data_notes: list[str]
    records: list[dict[str, Any]]
    trunks: list[dict[str, Any]]
    selection: pd.DataFrame
    base_items: pd.DataFrame
    base_scored: dict[str, Any]
    """With which device and precision the base was scored."""
    items: list[pd.DataFrame]
    models: list[Path]
    along: list[pd.DataFrame]
    """What the base was asked, then what the trainings asked."""


def read_found(study: StudyConfig, results: Path, models: list[str]) -> Found:
    """Read the results of all jobs but the tables of benchmarks, which may be large."""
    methods, durations = expand_methods(study), study.training.durations

    def read_items(table: str, folders: list[Path]) -> list[pd.DataFrame]:
        frames = [read_table(folder / f"{table}.parquet") for folder in folders]
        return in_study_order(frames, methods, study.seeds)

    run_groups = [f"{tuning.name}/seed{seed}" for tuning in methods for seed in study.seeds]
    trained = [results / "runs" / run_group for run_group in run_groups]
    branches = [
        results / "branches" / run_group / duration_name(duration)
        for run_group in run_groups
        for duration in durations
    ]
    files = [results / "selection" / f"{tuning.name}.json" for tuning in methods]
    selection = pd.DataFrame([row for file in files for row in read_json(file)])
    selection = selection.drop(
        columns=["files", "checkpoint", "checkpoints", "ends"], errors="ignore"
    )
    base_items = read_table(results / "base" / "items.parquet")
    return Found(
        base=read_json(results / "base" / "base.json"),
        data_notes=read_json(results / "data" / "data.json")["notes"],
        records=read_records(branches or trained),
        trunks=read_records(trained) if branches else [],
        selection=selection.astype({"step": "Int64", "epoch": "float", "value": "float"}),
        base_scored=base_items.attrs.pop("computed"),
        base_items=base_items,
        items=read_items("items", branches or trained),
        models=[results / "benchmarks" / model for model in models],
        along=[
            read_table(results / "base" / "benchmarks.parquet"),
            *read_items("benchmarks", trained),
        ]
        if study.benchmarks.during_training
        else [],
    )


def tables_of(study: StudyConfig, found: Found) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Every table by its name, and what the report cannot say."""
    methods, durations = expand_methods(study), study.training.durations
    runs = runs_table(found.base, methods, study.seeds, found.records, found.selection, durations)
    knowledge: dict[str, str] = {name: probe.knowledge for name, probe in study.probes.items()}
    knowledge |= {TEXT_PROBE: "text"}
    labels = {
        row["run"]: {key: row[key] for key in ("method", "label", "seed")}
        for row in runs.to_dict("records")
    }
    benchmarks, scored, missing = benchmark_tables(found.models, labels | {"base": BASE})
    responses = responses_table(found.models)
    trajectory_items = benchmark_trajectory_items(*found.along) if found.along else None
    every = pd.concat([found.base_items.assign(run="base", step=0, epoch=0.0), *found.items])
    tables = {
        "runs": runs,
        "trajectory": trajectory_table(found.base_items, found.items, found.records, knowledge),
        "items": every,
        "selection": found.selection,
        "comparisons": compare_methods(every, found.selection),
        "churn": churn_table(
            every, responses, main_metric_items(benchmarks, scored), trajectory_items
        ),
        "benchmarks": benchmarks,
        "benchmark_items": scored,
        "benchmark_responses": responses,
    }
    if trajectory_items is not None:
        tables["benchmark_trajectory"] = benchmark_trajectory_table(
            trajectory_items, benchmarks, found.records
        )
        tables["benchmark_trajectory_items"] = trajectory_items
    notes = [
        *found.data_notes,
        *caveats(found.selection, found.records, study.seeds, durations),
        *length_notes(found.base_items, study.evaluation.max_new_tokens),
        *missing,
    ]
    return tables, notes


def read_records(folders: list[Path]) -> list[dict[str, Any]]:
    """The records of all runs of several jobs."""
    return [record for folder in folders for record in read_json(folder / "runs.json")]


def provenance(results: Path, found: Found, models: list[str]) -> dict[str, Any]:
    """What is needed to know where the numbers come from, and to get them again."""
    records = found.records
    data = read_json(results / "data" / "data.json")
    folders = [results / "benchmarks" / model for model in models]
    wrote = [folder for folder in folders if read_json(folder / "programs.json")["items"]]
    executed = [read_json(folder / "outcomes.json") for folder in wrote]
    computed = [found.base_scored, *found.records, *found.trunks]
    computed += [found.base] if "device" in found.base else []  # else it was trained elsewhere
    computed += [read_json(folder / "record.json") for folder in folders]
    return {
        "code_revision": code_revision(),
        # Results that another commit made are kept while the versions of their stages are equal.
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
            "processor": sorted({record["machine"]["processor"] for record in computed}),
            "cores": sorted({record["machine"]["cores"] for record in computed}),
            "threads": sorted({record["machine"]["threads"] for record in computed}),
            "device": sorted({record["device"] for record in computed}),
            "precision": sorted({record["precision"] for record in computed}),
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


if __name__ == "__main__":
    main()
