"""Gather the results of all jobs of the study in the tables that the report reads."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd

from forgetting.costs.calibrate import by_method
from forgetting.records import read_json, tells_input_errors, write_json, write_table
from forgetting.results.churn import churn_table
from forgetting.results.collect import (
    BASE,
    benchmark_tables,
    main_items,
    missing_notes,
    responses_table,
    runs_table,
    trajectory_table,
)
from forgetting.results.comparisons import compare_methods
from forgetting.scoring.references import reference_notes
from forgetting.sections.measurement import TEXT_PROBE
from forgetting.settings.plan import budget_name, tunings
from forgetting.settings.study import Study


@tells_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write runs, trajectory, items, selection, benchmarks (parquet) and study.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="name of the study")
    parser.add_argument("--study", type=Path, required=True, help="the resolved study (JSON)")
    parser.add_argument("--results", type=Path, required=True, help="folder of the results")
    parser.add_argument("--models", nargs="*", default=[], help="models with benchmark results")
    parser.add_argument(
        "--scaled", type=Path, nargs="*", default=[], help="items of models with a scaled update"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the tables")
    options = parser.parse_args(argv)
    study = Study.model_validate_json(options.study.read_text())
    results: Path = options.results
    methods = tunings(study)
    base = read_json(results / "base" / "base.json")
    budgets = study.training.budgets
    cohorts = [Path(tuning.name, f"seed{seed}") for tuning in methods for seed in study.seeds]
    trained = [results / "cohorts" / cohort for cohort in cohorts]
    branches = [
        results / "branches" / cohort / budget_name(budget)
        for cohort in cohorts
        for budget in budgets
    ]
    finished = branches or trained
    records = read_records(finished)
    trunks = read_records(trained) if branches else []
    selection = pd.DataFrame(
        [
            row
            for tuning in methods
            for row in read_json(results / "selection" / f"{tuning.name}.json")
        ]
    ).drop(columns=["files", "ends"], errors="ignore")
    selection = selection.astype({"step": "Int64", "epoch": "float", "value": "float"})
    runs = runs_table(base, methods, study.seeds, records, selection, budgets)
    base_items = pd.read_parquet(results / "base" / "items.parquet")
    items = [pd.read_parquet(folder / "items.parquet") for folder in finished]
    knowledge: dict[str, str] = {name: probe.knowledge for name, probe in study.probes.items()}
    knowledge |= {TEXT_PROBE: "text"}
    labels = {
        row["run"]: {key: row[key] for key in ("method", "label", "seed")}
        for row in runs.to_dict("records")
    }
    models = [results / "benchmarks" / model for model in options.models]
    benchmarks, benchmark_items, notes = benchmark_tables(models, labels | {"base": BASE})
    every = pd.concat([base_items.assign(run="base", step=0, epoch=0.0), *items])

    write_table(options.output / "runs.parquet", runs)
    write_table(
        options.output / "trajectory.parquet",
        trajectory_table(base_items, items, records, knowledge),
    )
    write_table(options.output / "items.parquet", every)
    write_table(options.output / "selection.parquet", selection)
    write_table(options.output / "comparisons.parquet", compare_methods(every, selection))
    responses = responses_table(models)
    churn = churn_table(every, responses, main_items(benchmarks, benchmark_items))
    write_table(options.output / "churn.parquet", churn)
    write_table(options.output / "benchmarks.parquet", benchmarks)
    write_table(options.output / "benchmark_items.parquet", benchmark_items)
    write_table(options.output / "benchmark_responses.parquet", responses)
    if options.scaled:
        write_table(
            options.output / "wise_ft.parquet", pd.concat(map(pd.read_parquet, options.scaled))
        )
    write_json(options.output / "runs.json", records)
    write_json(
        options.output / "study.json",
        {
            "study": {"name": options.name, **study.model_dump(mode="json")},
            "provenance": provenance(results, base, records, trunks, options.models),
            "forecast": by_method(study, trunks or records),
            "notes": [
                *read_json(results / "data" / "data.json")["notes"],
                *missing_notes(selection, records, study.seeds, budgets),
                *reference_notes(base_items, study.measurement.max_new_tokens),
                *notes,
            ],
        },
    )
    print(f"{len(runs) - 1} runs, {len(every):,} scored answers: {options.output}")


def read_records(folders: list[Path]) -> list[dict[str, Any]]:
    """The records of all runs of several jobs."""
    return [record for folder in folders for record in read_json(folder / "runs.json")]


def provenance(
    results: Path,
    base: dict[str, Any],
    records: list[dict[str, Any]],
    trunks: list[dict[str, Any]],
    models: list[str],
) -> dict[str, Any]:
    """What is needed to know where the numbers come from, and to get them again.

    The trunks are what the runs have in common, where these are branches.
    """
    data = read_json(results / "data" / "data.json")
    executed = [read_json(results / "benchmarks" / model / "outcomes.json") for model in models]
    return {
        "code_revision": code_revision(),
        "packages": {
            name: ", ".join(sorted({record["machine"]["packages"][name] for record in records}))
            for name in records[0]["machine"]["packages"]
        },
        "python": sorted({record["machine"]["python"] for record in records}),
        "hardware": {
            "processor": sorted({record["machine"]["processor"] for record in records}),
            "cores": sorted({record["machine"]["cores"] for record in records}),
            "device": sorted({record["device"] for record in records}),
            "precision": sorted({record["precision"] for record in records}),
            "sandbox": sorted({each["sandbox"] or each["why"] for each in executed}),
        },
        "data": {
            table: {"sha256": origin["sha256"], "origin": origin["path"]}
            for table, origin in data["tables"].items()
        },
        "rows": data["rows"],
        "base": {key: value for key, value in base.items() if key != "files"},
        "seconds": {
            "pretraining": base.get("seconds", 0.0),
            "training": sum(record["training_seconds"] for record in records + trunks),
            "training and measuring": sum(record["wall_seconds"] for record in records + trunks),
        },
    }


def code_revision() -> str:
    """The commit of this workflow, marked where files were changed since; `unknown` without git."""
    folder = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip()


if __name__ == "__main__":
    main()
