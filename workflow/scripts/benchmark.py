"""Run the lm-evaluation-harness tasks, and prompts to refuse, on the base or a checkpoint."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase

from forgetting.benchmarks.harness import (
    ITEM_COLUMNS,
    RESPONSE_COLUMNS,
    SCORE_COLUMNS,
    BenchmarkResult,
    Sampling,
    TaskSpec,
    run_benchmarks,
)
from forgetting.benchmarks.known import benchmark, main_metric
from forgetting.benchmarks.programs import describe
from forgetting.benchmarks.tasks import HARNESS_SEED
from forgetting.data.rows import evenly_spaced, prompt_rows
from forgetting.data.table_files import place
from forgetting.machine import describe_machine
from forgetting.models.loading import (
    Model,
    autocast,
    load_base,
    load_tokenizer,
    pick_device,
    pick_precision,
    quieten_libraries,
)
from forgetting.models.merged import merged
from forgetting.models.tuned import ADAPTER, load_checkpoint
from forgetting.records import (
    read_json,
    sha256,
    sha256_of_all,
    tells_input_errors,
    write_json,
    write_table,
)
from forgetting.scoring.refusals import ask, score
from forgetting.sections.benchmarks import Benchmarks
from forgetting.sections.columns import Columns
from forgetting.sections.fields import Strict
from forgetting.sections.prompt import Prompt
from forgetting.sections.refusals import REFUSALS
from forgetting.sections.task import Task


class Asking(Strict):
    """How prompts are asked that a model should refuse."""

    prompt: Prompt
    columns: Columns


class Spec(Strict):
    """What the study says of the benchmarks."""

    benchmarks: Benchmarks
    precision: str
    asking: Asking | None


@tells_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write scores, items and responses (parquet), programs that are still to be run, a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="JSON: tasks, batch size, precision")
    parser.add_argument("--base", type=Path, required=True, help="record of the base")
    parser.add_argument(
        "--rows", action="append", default=[], help="TASK=FOLDER, its folder of SPLIT.jsonl"
    )
    parser.add_argument("--prompts", type=Path, help="table of the prompts that should be refused")
    parser.add_argument("--selection", type=Path, help="choice of the method; none: the base")
    parser.add_argument("--checkpoints", type=Path, help="folder of the method's checkpoints")
    parser.add_argument("--seed", type=int, help="which of the method's seeds")
    parser.add_argument("--budget", help="the end of this budget, not what is selected: budget0.5")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    options = parser.parse_args(argv)
    quieten_libraries()
    spec = Spec.model_validate_json(options.spec)
    rows = {task: Path(folder) for task, folder in (named.split("=", 1) for named in options.rows)}
    chosen = _chosen(options.selection, options.seed, options.budget)
    name = "-".join(filter(None, [f"seed{options.seed}", options.budget]))
    base = read_json(options.base)
    folder, checkpoint = Path(base["path"]), None
    device = pick_device()
    precision = pick_precision(spec.precision, device)
    result = nothing()
    if chosen is not None and chosen["step"] is None:
        result.notes.append(f"no benchmarks: {chosen['reason']}")
    elif spec.benchmarks.tasks or spec.asking:
        checkpoint = options.checkpoints / name if chosen else None
        model: Any = (
            load_checkpoint(folder, checkpoint, device) if checkpoint else load_base(folder, device)
        )
        tokenizer = load_tokenizer(folder)
        with autocast(device, precision), merged(model, precision):
            if spec.benchmarks.tasks:
                result = run_benchmarks(
                    model,
                    tokenizer,
                    [task_spec(*named) for named in spec.benchmarks.tasks.items()],
                    rows,
                    spec.benchmarks.batch_size,
                )
            if spec.asking:
                add_refusals(result, spec, options.prompts, model, tokenizer)
    who = {"run": chosen["run"], "step": chosen["step"]} if chosen else {"run": "base", "step": 0}
    record = {
        "model": who | identify(checkpoint),
        "base": {key: base.get(key) for key in ("path", "origin", "identity")},
        "tasks": about_tasks(spec, rows, result),
        "notes": result.notes,
        "device": str(device),
        "precision": str(precision).removeprefix("torch."),
        "machine": describe_machine(),
    }
    write_results(options.output, result, record)
    for row in result.scores[result.scores["main"]].to_dict("records"):
        print(f"{who['run']}, {row['task']}: {row['value']:.3f}, chance {row['chance']:g}")


def write_results(folder: Path, result: BenchmarkResult, record: dict[str, Any]) -> None:
    """Tables, programs and the record of one model."""
    write_table(folder / "scores.parquet", result.scores)
    write_table(folder / "items.parquet", result.items)
    write_table(folder / "responses.parquet", result.responses)
    write_json(folder / "programs.json", describe(result.programs, result.rates))
    write_json(folder / "record.json", record)


def task_spec(name: str, task: Task) -> TaskSpec:
    """A task as the harness's side wants it."""
    sampling = None
    if task.samples is not None:
        given = {"temperature": task.temperature, "top_p": task.top_p}
        sampling = Sampling(task.samples, **{k: v for k, v in given.items() if v is not None})
    return TaskSpec(
        name,
        num_fewshot=task.num_fewshot,
        limit=task.limit,
        max_gen_toks=task.max_new_tokens,
        chance=task.chance,
        metric=task.metric,
        sampling=sampling,
        draws=tuple(task.k) if task.k else None,
    )


def identify(checkpoint: Path | None) -> dict[str, Any]:
    """Which weights were measured: folder and content of the checkpoint; none of the base."""
    if checkpoint is None:
        return {"checkpoint": None}
    files, identity = sha256_of_all(filter(Path.is_file, sorted(checkpoint.iterdir())))
    adapter = (checkpoint / ADAPTER).exists()
    return {
        "checkpoint": str(checkpoint),
        "kind": "adapter" if adapter else "weights",
        "identity": identity,
        "files": files,
    }


def about_tasks(
    spec: Spec, rows: dict[str, Path], result: BenchmarkResult
) -> dict[str, dict[str, Any]]:
    """What each score rests on: definition, settings and the content of the rows."""
    told: dict[str, dict[str, Any]] = {}
    for name, shots in result.examples.items():
        told[name] = {"num_fewshot": shots}
        if name == REFUSALS:
            continue
        task = spec.benchmarks.tasks[name]
        told[name] |= {
            "definition": benchmark(name).definition,
            "version": result.versions[name],
            "metric": main_metric(name, task.metric),
            "settings": task.model_dump(mode="json", exclude_none=True),
            "seed": HARNESS_SEED,
            "rows": {str(path): sha256(path) for path in sorted(rows[name].glob("*.jsonl"))},
        }
    return told


def nothing() -> BenchmarkResult:
    """The result of running no benchmark."""
    return BenchmarkResult(
        pd.DataFrame(columns=list(SCORE_COLUMNS)),
        pd.DataFrame(columns=list(ITEM_COLUMNS)),
        pd.DataFrame(columns=list(RESPONSE_COLUMNS)),
    )


def add_refusals(
    result: BenchmarkResult,
    spec: Spec,
    prompts: Path,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Ask the prompts too, and add what comes of it to the tables of the benchmarks."""
    asking, settings = spec.asking, spec.benchmarks.refusals
    assert asking is not None
    assert settings is not None
    rows = evenly_spaced(list(prompt_rows(prompts, settings.table, asking.columns)), settings.limit)
    answers = ask(
        model,
        tokenizer,
        rows,
        asking.prompt,
        settings,
        spec.benchmarks.batch_size,
        partial(place, prompts),
    )
    result.scores = _joined(result.scores, pd.DataFrame([score(answers)]))
    result.items = _joined(result.items, answers[list(ITEM_COLUMNS)])
    result.responses = _joined(result.responses, answers[[*RESPONSE_COLUMNS, "prompt"]])
    result.examples[REFUSALS] = 0


def _joined(table: pd.DataFrame, more: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([table, more], ignore_index=True) if len(table) else more


def _chosen(selection: Path | None, seed: int | None, budget: str | None) -> dict[str, Any] | None:
    """Run, step and, if there is no checkpoint, the reason; None for the base."""
    if selection is None:
        return None
    rows: list[dict[str, Any]] = read_json(selection)
    row = next(row for row in rows if row["seed"] == seed)
    if budget is None:
        return row
    no_end = {"run": row["run"], "step": None, "reason": f"no run of {budget} ended well"}
    end: dict[str, Any] = row["ends"].get(budget, no_end)
    return end


if __name__ == "__main__":
    main()
