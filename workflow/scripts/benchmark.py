"""Run the lm-evaluation-harness tasks, and prompts to refuse, on the base or a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase

from forgetting.benchmarks.harness import (
    ITEM_COLUMNS,
    RESPONSE_COLUMNS,
    SCORE_COLUMNS,
    BenchmarkResult,
    TaskSpec,
    run_benchmarks,
)
from forgetting.columns import Columns
from forgetting.data import evenly_spaced, prompt_rows
from forgetting.fields import Strict
from forgetting.merged import merged
from forgetting.models import (
    Model,
    autocast,
    load_base,
    load_tokenizer,
    pick_device,
    pick_precision,
    quieten_libraries,
)
from forgetting.prompts import REFUSALS
from forgetting.records import read_json, tells_input_errors, write_json, write_table
from forgetting.refusals import ask, score
from forgetting.study import Benchmarks, Prompt
from forgetting.tuned import load_checkpoint


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
    """Write scores, items and responses (parquet), and the programs that are still to be run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="JSON: tasks, batch size, precision")
    parser.add_argument("--base", type=Path, required=True, help="record of the base")
    parser.add_argument("--rows", type=Path, required=True, help="folder of TASK/SPLIT.jsonl")
    parser.add_argument("--prompts", type=Path, help="table of the prompts that should be refused")
    parser.add_argument("--selection", type=Path, help="choice of the method; none: the base")
    parser.add_argument("--checkpoints", type=Path, help="folder of the method's checkpoints")
    parser.add_argument("--seed", type=int, help="which of the method's seeds")
    parser.add_argument("--budget", help="the end of this budget, not what is selected: budget0.5")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    options = parser.parse_args(argv)
    quieten_libraries()
    spec = Spec.model_validate_json(options.spec)
    chosen = _chosen(options.selection, options.seed, options.budget)
    name = "-".join(filter(None, [f"seed{options.seed}", options.budget]))
    folder = Path(read_json(options.base)["path"])
    device = pick_device()
    result = nothing()
    if chosen is not None and chosen["step"] is None:
        result.notes.append(f"no benchmarks: {chosen['reason']}")
    elif spec.benchmarks.tasks or spec.asking:
        model: Any = (
            load_base(folder, device)
            if chosen is None
            else load_checkpoint(folder, options.checkpoints / name, device)
        )
        tokenizer = load_tokenizer(folder)
        precision = pick_precision(spec.precision, device)
        with autocast(device, precision), merged(model, precision):
            if spec.benchmarks.tasks:
                result = run_benchmarks(
                    model,
                    tokenizer,
                    [
                        TaskSpec(name, task.num_fewshot, task.limit, task.max_new_tokens)
                        for name, task in spec.benchmarks.tasks.items()
                    ],
                    options.rows,
                    spec.benchmarks.batch_size,
                )
            if spec.asking:
                add_refusals(result, spec, options.prompts, model, tokenizer)
    who = {"run": chosen["run"], "step": chosen["step"]} if chosen else {"run": "base", "step": 0}
    write_table(options.output / "scores.parquet", result.scores)
    write_table(options.output / "items.parquet", result.items)
    write_table(options.output / "responses.parquet", result.responses)
    write_json(
        options.output / "programs.json",
        {
            "model": who,
            "notes": result.notes,
            "examples": result.examples,
            "programs": [program.to_dict() for program in result.programs],
        },
    )
    for row in result.scores[result.scores["main"]].to_dict("records"):
        print(f"{who['run']}, {row['task']}: {row['value']:.3f}, chance {row['chance']:g}")


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
    answers = ask(model, tokenizer, rows, asking.prompt, settings, spec.benchmarks.batch_size)
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
