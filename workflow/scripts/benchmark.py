"""Run the lm-evaluation-harness tasks, and prompts to refuse, on the base or checkpoints.

The models of a method are scored in one process: its base, the rows and the prompts are read once.
A model that is finished is kept in a folder that is no output of the rule, named by a key of all
that its scores depend on, so that a retry goes on with the next.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase

from forgetting.benchmarks.evaluate import LoadedTasks, evaluate_tasks, load_tasks
from forgetting.benchmarks.programs import describe
from forgetting.benchmarks.registry import SCORE_FILES, benchmark, main_metric, required_splits
from forgetting.benchmarks.scores import (
    ITEM_COLUMNS,
    RESPONSE_COLUMNS,
    SCORE_COLUMNS,
    BenchmarkResult,
)
from forgetting.benchmarks.scoring_job import ModelRef, models_to_score
from forgetting.benchmarks.tasks import HARNESS_SEED, TaskSpec
from forgetting.config.evaluation import REFUSALS_TASK
from forgetting.data.table_files import Row, source_line
from forgetting.data.tables import evenly_spaced, read_prompts
from forgetting.digests import folder_damage, sha256
from forgetting.errors import reports_input_errors
from forgetting.evaluation import refusals
from forgetting.io import (
    atomic_folder,
    content_key,
    read_table,
    remove_folder,
    warn_damaged,
    write_atomically,
    write_json,
    write_table,
)
from forgetting.models.loading import (
    Model,
    autocast,
    get_device,
    load_tokenizer,
    read_base,
    resolve_precision,
    silence_libraries,
)
from forgetting.models.tuned import AdapterSwapper, merged_adapter
from forgetting.pipeline.params import BenchmarkParams
from forgetting.system import describe_computation


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write scores, items and responses (parquet), programs that are still to be run, a record.

    Of each model that is named, in a folder of its name; without a selection, of the base.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True, help="parameters (JSON)")
    parser.add_argument("--base", type=Path, required=True, help="record of the base")
    parser.add_argument(
        "--prompts", type=Path, nargs="?", help="table of the prompts that should be refused"
    )
    parser.add_argument(
        "--selection", type=Path, nargs="?", help="choice of the method; none: the base"
    )
    parser.add_argument(
        "--checkpoints", type=Path, nargs="?", help="folder of the method's checkpoints"
    )
    parser.add_argument("--state", type=Path, required=True, help="folder of finished models")
    parser.add_argument("--output", type=Path, required=True, help="folder of the models' folders")
    options = parser.parse_args(argv)
    silence_libraries()
    params = BenchmarkParams.read(options.params)
    scorer = Scorer(params, read_base(options.base), options.prompts)
    for chosen in models_to_score(options.selection, options.checkpoints, params.models):
        finished: Path = options.state / scorer.key(chosen)
        if finished.exists() and (wrong := folder_damage(finished)):
            warn_damaged(*wrong, "the model is scored again")
            remove_folder(finished)
        if not finished.exists():
            with atomic_folder(finished) as folder:
                write_results(folder, *scorer.score(chosen))
        for file in SCORE_FILES:  # new files, since Snakemake goes by their age
            write_atomically(options.output / chosen.name / file, (finished / file).read_bytes())
        scores = read_table(finished / "scores.parquet")
        for row in scores[scores["main"].astype(bool)].to_dict("records"):
            chance = "" if pd.isna(row["chance"]) else f", chance {row['chance']:g}"
            print(f"{chosen.run}, {row['task']}: {row['value']:.3f}{chance}", flush=True)


class Scorer:
    """Scores models of one base one after the other; what they have in common is read once."""

    def __init__(
        self,
        spec: BenchmarkParams,
        base: Mapping[str, Any],
        prompts: Path | None,
    ) -> None:
        self.spec, self.base, self.prompts = spec, base, prompts
        self.digests = {
            task: {
                str(path): sha256(path)
                for split in required_splits(task, spec.benchmarks.tasks[task].num_fewshot)
                for path in [folder / f"{split}.jsonl"]
            }
            for task, folder in spec.rows.items()
        }
        self.device = get_device()
        self.precision = resolve_precision(spec.precision, self.device)
        self.models = AdapterSwapper(Path(base["path"]), self.device, base["parameters"])
        self.depends = {
            "params": spec.model_dump(mode="json", exclude={"rows", "models"}),
            "base": {key: base.get(key) for key in ("origin", "identity")},
            # Where they are does not matter.
            "rows": {task: [*files.values()] for task, files in self.digests.items()},
            "prompts": sha256(prompts) if prompts else None,
            "precision": str(self.precision),
        }

    def key(self, chosen: ModelRef) -> str:
        """Of all that the results of a model depend on."""
        return content_key({**self.depends, "model": chosen.origin, "reason": chosen.reason})

    def score(self, chosen: ModelRef) -> tuple[BenchmarkResult, dict[str, Any]]:
        """What is found of a model, and the record of it."""
        result = nothing()
        if chosen.step is None:
            result.notes.append(f"no benchmarks: {chosen.reason}")
        elif self.spec.benchmarks.tasks or self.spec.refusal_prompts:
            with (
                self.models.load(chosen.checkpoint) as model,
                autocast(self.device, self.precision),
                merged_adapter(model, self.precision),
            ):
                if self.spec.benchmarks.tasks:
                    result = evaluate_tasks(model, self.questions)
                if self.spec.refusal_prompts:
                    self.add_refusals(result, model)
        record = {
            "model": chosen.origin,
            "base": self.depends["base"],
            "tasks": about_tasks(self.spec, self.digests, result),
            "notes": result.notes,
            **describe_computation(self.device, self.precision),
        }
        return result, record

    def add_refusals(self, result: BenchmarkResult, model: Model) -> None:
        """Ask the prompts too, and add what comes of it to the tables of the benchmarks."""
        asking, settings = self.spec.refusal_prompts, self.spec.benchmarks.refusals
        assert asking and settings and self.prompts
        answers = refusals.generate_responses(
            model,
            self.tokenizer,
            self.prompt_rows,
            asking.prompt,
            settings,
            self.spec.benchmarks.batch_size,
            partial(source_line, self.prompts),
        )
        result.scores = _joined(result.scores, pd.DataFrame(refusals.refusal_scores(answers)))
        result.items = _joined(result.items, refusals.refusal_items(answers))
        result.responses = _joined(result.responses, answers[[*RESPONSE_COLUMNS, "prompt"]])
        result.examples[REFUSALS_TASK] = 0

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's, which is that of all."""
        return load_tokenizer(Path(self.base["path"]))

    @cached_property
    def questions(self) -> LoadedTasks:
        """The tasks with their rows, prompts and tokens."""
        benchmarks = self.spec.benchmarks
        specs = [TaskSpec.of(*named) for named in benchmarks.tasks.items()]
        return load_tasks(self.tokenizer, specs, self.spec.rows, benchmarks.batch_size)

    @cached_property
    def prompt_rows(self) -> Sequence[Row]:
        """The prompts that should be refused."""
        asking, settings = self.spec.refusal_prompts, self.spec.benchmarks.refusals
        assert asking and settings and self.prompts
        found = list(read_prompts(self.prompts, settings.table, asking.columns))
        return evenly_spaced(found, settings.limit)


def write_results(folder: Path, result: BenchmarkResult, record: dict[str, Any]) -> None:
    """Tables, programs and the record of one model."""
    write_table(folder / "scores.parquet", result.scores)
    write_table(folder / "items.parquet", result.items)
    write_table(folder / "responses.parquet", result.responses)
    write_json(folder / "programs.json", describe(result.programs, result.rates))
    write_json(folder / "record.json", record)


def about_tasks(
    spec: BenchmarkParams, digests: Mapping[str, dict[str, str]], result: BenchmarkResult
) -> dict[str, dict[str, Any]]:
    """What each score rests on: definition, settings and the content of the rows."""
    told: dict[str, dict[str, Any]] = {}
    for name, shots in result.examples.items():
        told[name] = {"num_fewshot": shots}
        if name == REFUSALS_TASK:
            continue
        task = spec.benchmarks.tasks[name]
        told[name] |= {
            "definition": benchmark(name).definition,
            "version": result.versions[name],
            "metric": main_metric(name, task.metric),
            "settings": task.model_dump(mode="json", exclude_none=True),
            "seed": HARNESS_SEED,
            "rows": digests[name],
        }
    return told


def nothing() -> BenchmarkResult:
    """The result of running no benchmark."""
    return BenchmarkResult(
        pd.DataFrame(columns=list(SCORE_COLUMNS)),
        pd.DataFrame(columns=list(ITEM_COLUMNS)),
        pd.DataFrame(columns=list(RESPONSE_COLUMNS)),
    )


def _joined(table: pd.DataFrame, more: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([table, more], ignore_index=True) if len(table) else more


if __name__ == "__main__":
    main()
