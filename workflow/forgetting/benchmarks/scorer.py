"""Score the base or selected checkpoints on lm-evaluation-harness tasks and prompts to refuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase

from forgetting.benchmarks.evaluate import LoadedTasks, evaluate_tasks, load_tasks
from forgetting.benchmarks.programs import describe
from forgetting.benchmarks.registry import benchmark, main_metric, required_splits
from forgetting.benchmarks.scores import (
    ITEM_COLUMNS,
    RESPONSE_COLUMNS,
    SCORE_COLUMNS,
    BenchmarkResult,
)
from forgetting.benchmarks.tasks import HARNESS_SEED, TaskSpec
from forgetting.config.evaluation import REFUSALS_TASK, ScoringConfig
from forgetting.data.table_files import Row, source_line
from forgetting.data.tables import evenly_spaced, read_prompts
from forgetting.digests import folder_damage, sha256, sha256_of_all, visible_files
from forgetting.evaluation import refusals
from forgetting.io import (
    atomic_folder,
    content_key,
    damage_error,
    read_json,
    removal_command,
    remove_folder,
    warn_damaged,
    write_json,
    write_table,
)
from forgetting.models.loading import (
    Model,
    autocast,
    get_device,
    load_tokenizer,
    resolve_precision,
)
from forgetting.models.tuned import ADAPTER, AdapterSwapper, checkpoint_damage, merged_adapter
from forgetting.system import describe_computation


@dataclass(frozen=True)
class ModelRef:
    """A model to score.

    Attributes:
        name: name of its folder: `base`, `seed0` or `seed0-duration0.5`.
        run, step: the training it comes from; `step` is None if there is no checkpoint.
        reason: why there is no checkpoint.
        checkpoint: folder of its weights; None for the base.
        origin: run, step and digests of the weights, for the record.
    """

    name: str
    run: str | None
    step: int | None
    reason: str
    checkpoint: Path | None
    origin: dict[str, Any]


def models_to_score(
    selection: Path | None, folder: Path | None, names: list[str]
) -> list[ModelRef]:
    """Return the named models from the selection of a method, or the base.

    Args:
        selection: file of the selected checkpoints, one row per seed; None for the base.
        folder: folder of the selected checkpoints, by name; None for the base.
        names: `seed0` or `seed0-duration0.5`.

    Raises:
        InputError: a checkpoint has other files than the ones that were selected.
    """
    if selection is None or folder is None:
        origin = {"run": "base", "step": 0, **score_identity(None)}
        return [ModelRef("base", "base", 0, "", None, origin)]
    rows: list[dict[str, Any]] = read_json(selection)
    models = []
    for name in names:
        seed, separator, duration = name.removeprefix("seed").partition("-duration")
        row = next(row for row in rows if str(row["seed"]) == seed)
        if separator:
            duration = f"duration{duration}"
            no_end = {"run": row["run"], "step": None, "reason": f"no run of {duration} ended well"}
            row = row["ends"].get(duration, no_end)
        checkpoint = None if row["step"] is None else folder / name
        run, step = row["run"], row["step"]
        reason = row["reason"] if step is None else ""
        origin = {"run": run, "step": step, **score_identity(checkpoint)}
        if checkpoint is not None:
            _check_checkpoint(checkpoint, origin["files"], row)
        models.append(ModelRef(name, run, step, reason, checkpoint, origin))
    return models


def _check_checkpoint(checkpoint: Path, present: dict[str, str], row: dict[str, Any]) -> None:
    """Raise `InputError` if the files of a checkpoint differ from those that were selected."""
    selected: dict[str, str] = row["files"]
    differing = sorted(
        name for name in {*present, *selected} if present.get(name) != selected.get(name)
    )
    if not differing:
        return
    path = checkpoint / differing[0]
    reason = "differs from what was selected (sha256)" if path.exists() else "is missing"
    # The files may be hard links to those of the run, so damage affects both.
    origin, removed = Path(row["checkpoint"]), [checkpoint.parent]
    if checkpoint_damage(origin):
        removed += [origin.parent, Path(row["checkpoints"])]
    raise damage_error(path, reason, removal_command(*removed))


def score_identity(checkpoint: Path | None) -> dict[str, Any]:
    """Return the folder and the digests of a checkpoint, for the record of its scores."""
    if checkpoint is None:
        return {"checkpoint": None}
    files, identity = sha256_of_all(visible_files(checkpoint))
    adapter = (checkpoint / ADAPTER).exists()
    return {
        "checkpoint": str(checkpoint),
        "kind": "adapter" if adapter else "weights",
        "identity": identity,
        "files": files,
    }


class Scorer:
    """Score models of one base one after the other; what they share is read once.

    Args:
        config: the tasks, and the template of the prompts that a model should refuse.
        rows: folder of SPLIT.jsonl by task.
        versions: version of the stage.
        base: record of the base.
        prompts: table of the prompts that a model should refuse.
    """

    def __init__(
        self,
        config: ScoringConfig,
        rows: Mapping[str, Path],
        versions: str,
        base: Mapping[str, Any],
        prompts: Path | None,
    ) -> None:
        self.config, self.rows = config, rows
        self.base, self.prompts = base, prompts
        self.digests = {
            task: {
                str(path): sha256(path)
                for split in required_splits(task, config.benchmarks.tasks[task].num_fewshot)
                for path in [folder / f"{split}.jsonl"]
            }
            for task, folder in rows.items()
        }
        self.device = get_device()
        self.precision = resolve_precision(config.precision, self.device)
        self.models = AdapterSwapper(Path(base["path"]), self.device, base["parameters"])
        self.depends = {
            "config": config.model_dump(mode="json", include=set(ScoringConfig.model_fields)),
            "versions": versions,
            "base": {key: base.get(key) for key in ("origin", "identity")},
            # The contents count, not the folders.
            "rows": {task: [*files.values()] for task, files in self.digests.items()},
            "prompts": sha256(prompts) if prompts else None,
            "precision": str(self.precision),
        }

    def key(self, chosen: ModelRef) -> str:
        """Return a key of all that the results of a model depend on."""
        return content_key({**self.depends, "model": chosen.origin, "reason": chosen.reason})

    def score(self, chosen: ModelRef) -> tuple[BenchmarkResult, dict[str, Any]]:
        """Return the scores of a model and their record."""
        result = empty_result()
        if chosen.step is None:
            result.notes.append(f"no benchmarks: {chosen.reason}")
        elif self.config.benchmarks.tasks or self.config.refusal_prompts:
            with (
                self.models.load(chosen.checkpoint) as model,
                autocast(self.device, self.precision),
                merged_adapter(model, self.precision),
            ):
                if self.config.benchmarks.tasks:
                    result = evaluate_tasks(model, self.questions)
                if self.config.refusal_prompts:
                    self.add_refusals(result, model)
        record = {
            "model": chosen.origin,
            "base": self.depends["base"],
            "tasks": describe_tasks(self.config, self.digests, result),
            "notes": result.notes,
            **describe_computation(self.device, self.precision),
        }
        return result, record

    def add_refusals(self, result: BenchmarkResult, model: Model) -> None:
        """Generate responses to the prompts and add them to the tables of the benchmarks."""
        prompting, settings = self.config.refusal_prompts, self.config.benchmarks.refusals
        assert prompting and settings and self.prompts
        answers = refusals.generate_responses(
            model,
            self.tokenizer,
            self.prompt_rows,
            prompting.prompt,
            settings,
            self.config.benchmarks.batch_size,
            partial(source_line, self.prompts),
        )
        result.scores = _joined(result.scores, pd.DataFrame(refusals.refusal_scores(answers)))
        result.items = _joined(result.items, refusals.refusal_items(answers))
        result.responses = _joined(result.responses, answers[[*RESPONSE_COLUMNS, "prompt"]])
        result.examples[REFUSALS_TASK] = 0

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the base and of all models."""
        return load_tokenizer(Path(self.base["path"]))

    @cached_property
    def questions(self) -> LoadedTasks:
        """The tasks with their rows, prompts and tokens."""
        benchmarks = self.config.benchmarks
        specs = [TaskSpec.of(*named) for named in benchmarks.tasks.items()]
        return load_tasks(self.tokenizer, specs, self.rows, benchmarks.batch_size)

    @cached_property
    def prompt_rows(self) -> Sequence[Row]:
        """The prompts that should be refused."""
        prompting, settings = self.config.refusal_prompts, self.config.benchmarks.refusals
        assert prompting and settings and self.prompts
        found = list(read_prompts(self.prompts, settings.table, prompting.columns))
        return evenly_spaced(found, settings.limit)


def write_results(folder: Path, result: BenchmarkResult, record: dict[str, Any]) -> None:
    """Write tables, programs and the record of one model."""
    write_table(folder / "scores.parquet", result.scores)
    write_table(folder / "items.parquet", result.items)
    write_table(folder / "responses.parquet", result.responses)
    write_json(folder / "programs.json", describe(result.programs, result.rates))
    write_json(folder / "record.json", record)


def describe_tasks(
    config: ScoringConfig, digests: Mapping[str, dict[str, str]], result: BenchmarkResult
) -> dict[str, dict[str, Any]]:
    """Return definition, settings and digests of the rows of every task."""
    described: dict[str, dict[str, Any]] = {}
    for name, shots in result.examples.items():
        described[name] = {"num_fewshot": shots}
        if name == REFUSALS_TASK:
            continue
        task = config.benchmarks.tasks[name]
        described[name] |= {
            "definition": benchmark(name).definition,
            "version": result.versions[name],
            "metric": main_metric(name, task.metric),
            "settings": task.model_dump(mode="json", exclude_none=True),
            "seed": HARNESS_SEED,
            "rows": digests[name],
        }
    return described


def empty_result() -> BenchmarkResult:
    """Return the result of running no benchmark."""
    return BenchmarkResult(
        pd.DataFrame(columns=list(SCORE_COLUMNS)),
        pd.DataFrame(columns=list(ITEM_COLUMNS)),
        pd.DataFrame(columns=list(RESPONSE_COLUMNS)),
    )


def _joined(table: pd.DataFrame, more: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([table, more], ignore_index=True) if len(table) else more


def finished_folder(scorer: Scorer, state: Path, model: ModelRef) -> Path:
    """Return the folder of the finished results of a model, which is scored if there is none."""
    finished = state / scorer.key(model)
    if finished.exists() and (wrong := folder_damage(finished)):
        warn_damaged(*wrong, "the model is scored again")
        remove_folder(finished)
    if not finished.exists():
        with atomic_folder(finished) as folder:
            write_results(folder, *scorer.score(model))
    return finished


def format_scores(run: str | None, scores: pd.DataFrame) -> list[str]:
    """Return a line for the main metric of every task."""
    lines = []
    for row in scores[scores["main"].astype(bool)].to_dict("records"):
        chance = "" if pd.isna(row["chance"]) else f", chance {row['chance']:g}"
        lines.append(f"{run}, {row['task']}: {row['value']:.3f}{chance}")
    return lines
